"""What is done to an image before a classifier: as asked for, or as its own pretrained weights had it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import nn


def image_mode(input_size: int | Sequence[int] | None) -> str:
    """Return Pillow's mode of the images that such an input takes."""
    return "L" if isinstance(input_size, Sequence) and len(input_size) == 3 and input_size[0] == 1 else "RGB"


def resolve(preprocessing: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """Return timm's data config: what `preprocessing` says, and for what it leaves at None the model's own.

    Raises:
        ValueError: an `input_size` that is no size, or has other channels than the model's first convolution.
    """
    given = {key: value for key, value in preprocessing.items() if value is not None}
    size = given.pop("input_size", None)
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) not in (2, 3) or min(sides) < 1:
            wanted = "a side, (height, width) or (channels, height, width)"
            raise ValueError(f"input_size: expected {wanted}, got {size}")
        given["input_size"] = sides if len(sides) == 3 else (3, *sides)
    own = getattr(model, "pretrained_cfg", None) or {}
    config = resolve_data_config(given, pretrained_cfg=own, model=None) if given or own else {}
    config = config or resolve_data_config(dict(input_size=(3, 224, 224)))
    for key in ("mean", "std"):
        config[key] = tuple(adapt_to_chs(config[key], config["input_size"][0]))
    first = None if model is None else next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != config["input_size"][0]:
        raise ValueError(
            f"input_size: expected ({first.in_channels}, height, width) for a model of {first.in_channels} channels, "
            f"got {config['input_size']}"
        )
    return config
