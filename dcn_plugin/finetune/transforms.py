"""Transforms of images and their targets by name, as configs give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from .._config import arguments, build_object

TRANSFORMS = {
    name: value for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)
}

# What comes after all others.
LAST = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def build_transforms(where: str, specs: Sequence[Mapping[str, Any]], of_masks: int | None = None) -> list[v2.Transform]:
    """Build transforms of `torchvision.transforms.v2` from `dict(type=..., ...)`, also those in `transforms=[...]`.

    Args:
        where: what messages call the list.
        specs: the transforms.
        of_masks: what transforms that fill in pixels give masks there; None leaves it to torchvision, which fills
            masks as it does images.
    """
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
        raise TypeError(f"{where}: expected a list of dict(type=..., ...), got {specs!r}")
    built = []
    for i, spec in enumerate(specs):
        if isinstance(spec, Mapping) and isinstance(spec.get("transforms"), (list, tuple)):
            inner = build_transforms(f"{where}[{i}].transforms", spec["transforms"], of_masks)
            spec = {**spec, "transforms": inner}
        if of_masks is not None and isinstance(spec, Mapping) and "fill" in _arguments(spec.get("type")):
            spec = {**spec, "fill": {tv_tensors.Mask: of_masks, "others": spec.get("fill", 0)}}
        built.append(build_object(f"{where}[{i}]", spec, TRANSFORMS))
    return built


def _arguments(name: Any) -> list[str]:
    return arguments(TRANSFORMS[name]) if name in TRANSFORMS else []
