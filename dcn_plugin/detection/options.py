"""Arguments of torchvision's detectors: which there are, what they default to, and what follows from a backbone."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from .._config import did_you_mean
from .backbone import DetectionBackbone

_ASPECT_RATIOS = (0.5, 1.0, 2.0)
# What users of torchvision's and mmdetection's constructors may look for.
_ELSEWHERE = {
    "weights": "load a detector's weights with dcn_plugin.load_checkpoint",
    "weights_backbone": "backbone=dict(name=..., pretrained=True) or dict(name=..., checkpoint_path=...)",
    "pretrained": "backbone=dict(name=..., pretrained=True)",
    "pretrained_backbone": "backbone=dict(name=..., pretrained=True)",
    "frozen_stages": "trainable_backbone_layers counts the stages that train, the stem is one",
}


def _defaults(*classes: type) -> dict[str, Any]:
    """Return the arguments with defaults of torchvision's classes; their `**kwargs` would swallow a misspelt one."""
    parameters = [p for cls in classes for p in inspect.signature(cls).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty and not p.name.startswith("_")}


# Every option of torchvision's that is passed on, with its default.
OPTIONS = {**_defaults(GeneralizedRCNNTransform), **_defaults(FasterRCNN)}
for _built_here in ("num_classes", "box_head", "box_predictor"):
    del OPTIONS[_built_here]


def check_options(name: str, num_classes: int, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise on options that a detector does not have, and on a number of classes that leaves nothing to detect."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, as it counts the background, got {num_classes!r}")
    for key in options:
        if key not in known:
            hint = f" ({_ELSEWHERE[key]})" if key in _ELSEWHERE else did_you_mean(key, known)
            raise TypeError(f"{name}: expected torchvision's options {', '.join(known)}, got {key!r}{hint}")


def fill_in(backbone: DetectionBackbone, options: dict[str, Any], sizes: Sequence[Sequence[int]]) -> None:
    """Fill in what follows from the backbone: normalisation by its preprocessing, anchors by its strides."""
    for key, value in (("image_mean", backbone.mean), ("image_std", backbone.std)):
        if options.get(key) is None:
            options[key] = value
        if not isinstance(options[key], Sequence) or len(options[key]) != backbone.in_chans:
            raise ValueError(f"{key}: expected one number for each of {backbone.in_chans} channels, got {options[key]}")
    anchors = options.get("rpn_anchor_generator") or {}
    if isinstance(anchors, Mapping):
        unknown = set(anchors) - {"sizes", "aspect_ratios"}
        if unknown:
            raise TypeError(f"rpn_anchor_generator: expected keys out of sizes, aspect_ratios, got {min(unknown)!r}")
        chosen = anchors.get("sizes", sizes)
        ratios = anchors.get("aspect_ratios", (_ASPECT_RATIOS,) * len(chosen))
        if len(chosen) != len(sizes) or len(ratios) != len(sizes):
            raise ValueError(
                f"rpn_anchor_generator: expected sizes and aspect_ratios for each of {len(sizes)} maps, "
                f"got {len(chosen)} and {len(ratios)}"
            )
        options["rpn_anchor_generator"] = AnchorGenerator(tuple(map(tuple, chosen)), tuple(map(tuple, ratios)))


def choose(name: str, given: Any, kinds: Mapping[str, Callable]) -> tuple[Callable, dict[str, Any]]:
    """Split dict(type=..., **arguments) into the class and the arguments."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected dict(type=..., ...) with type out of {', '.join(kinds)}, got {given!r}")
    arguments = dict(given)
    kind = arguments.pop("type", next(iter(kinds)))
    if kind not in kinds:
        raise ValueError(f"{name}: expected type out of {', '.join(kinds)}, got {kind!r}")
    known = [p for p in inspect.signature(kinds[kind]).parameters if p != "self"]
    for key in arguments:
        if key not in known:
            hint = did_you_mean(key, known)
            raise TypeError(f"{name}: expected arguments of {kind} ({', '.join(known)}), got {key!r}{hint}")
    return kinds[kind], arguments
