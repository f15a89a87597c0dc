"""A segmenter as a dict: what it says, and what a file holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._config import plain
from ..detection.spec import without_pretrained_backbone
from .segmenters import Segmenter


def segmenter_spec(model: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """Return the specification of a segmenter for so many classes; `model` may say their number itself."""
    if not isinstance(model, Mapping) or "name" not in model:
        raise ValueError(f"model: expected dict(name='deeplab', 'deeplabv3' or 'fcn', ...), got {model!r}")
    spec = plain(model)
    if num_classes is not None and spec.setdefault("num_classes", num_classes) != num_classes:
        got = f"{spec['num_classes']} in model and {num_classes}"
        raise ValueError(f"num_classes: expected one number of classes, got {got}")
    return spec


def saved_spec(model: nn.Module, spec: Any) -> dict[str, Any] | None:
    """Return what a file holds of a segmenter; None for a model that is none."""
    if not isinstance(model, Segmenter):
        return None
    if not isinstance(spec, Mapping) or not {"name", "num_classes"} <= set(spec):
        raise ValueError(f"spec: expected dict(name=..., num_classes=..., ...) of a segmenter, got {spec!r}")
    return without_pretrained_backbone(spec)
