"""A detector as a dict: what it says, what it leaves out, and where its layers stand in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from .._config import plain


def detector_spec(model: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """Return the specification of a detector for so many classes of objects; `model` may say their number itself."""
    if not isinstance(model, Mapping) or "name" not in model:
        raise ValueError(f"model: expected dict(name='faster_rcnn' or 'rfcn', backbone=..., ...), got {model!r}")
    spec = plain(model)
    if num_classes is None and isinstance(spec.get("num_classes"), int):
        num_classes = spec["num_classes"] - 1
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1 class of objects, got {num_classes!r}")
    if spec.setdefault("num_classes", num_classes + 1) != num_classes + 1:
        got = f"model.num_classes={spec['num_classes']} with num_classes={num_classes}"
        raise ValueError(f"model.num_classes: expected none, or one more for the background, got {got}")
    return spec


def layer_order(body: nn.Module, prefix: str = "backbone.body.") -> Callable[..., Callable[[str], int]]:
    """Return what timm calls `group_matcher`: from a parameter's name to its place, by stages of the backbone.

    Args:
        body: the timm model that gives the maps.
        prefix: what its parameters' names begin with in the whole model.
    """
    stages = [stage["module"] for stage in cast(Any, body).feature_info.info]
    parameters = [name for name, _ in body.named_parameters()]
    places: dict[str, int] = {}
    for i, stage in enumerate(stages, 1):
        # What makes a map may be the last step of its stage, without parameters.
        holder = stage.rpartition(".")[0]
        alone = holder and sum(other.startswith(f"{holder}.") for other in stages) == 1
        # Where the features come from a flattened model, its names have underscores; where it is asked for them, a
        # prefix.
        names = [
            f"{kind}."
            for name in (stage, *([holder] if alone else []))
            for kind in (name, name.replace(".", "_"), f"model.{name}")
        ]
        found = next((name for name in names if any(parameter.startswith(name) for parameter in parameters)), None)
        if found is not None:
            places[prefix + found] = i

    def place(name: str) -> int:
        if not name.startswith(prefix):
            return len(stages) + 1
        return next((i for start, i in places.items() if name.startswith(start)), 0)

    return lambda coarse=False: place


def without_pretrained_backbone(model: Any) -> Any:
    """Return the specification of a model on a backbone (a detector, a segmenter) without the backbone's weights."""
    spec = plain(model)
    backbone = spec.get("backbone") if isinstance(spec, dict) else None
    if isinstance(backbone, dict) and (backbone.get("pretrained") or backbone.get("checkpoint_path")):
        spec["backbone"] = {key: value for key, value in backbone.items() if key != "checkpoint_path"}
        spec["backbone"]["pretrained"] = False
        # A pretrained backbone has other defaults, which have to stay.
        for key, default in dict(trainable_backbone_layers=3, norm_eval=True).items():
            if spec.get(key) is None:
                spec[key] = default
    return spec


def saved_spec(model: nn.Module, spec: Any) -> dict[str, Any] | None:
    """Return what a file holds of a detector; None for a model that is none."""
    if not isinstance(model, GeneralizedRCNN):
        return None
    if not isinstance(spec, Mapping) or not {"name", "num_classes"} <= set(spec):
        raise ValueError(f"spec: expected dict(name=..., num_classes=..., ...) of a detector, got {spec!r}")
    return without_pretrained_backbone(spec)
