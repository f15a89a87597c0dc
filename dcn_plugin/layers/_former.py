"""What other implementations call the tensors of a convolution that predicts its offsets, and with which masks.

A layout is a row of `LAYOUTS`. The layers look for the names of each row among the keys of a state dict, so that plain
`load_state_dict` takes them as `load_checkpoint` does.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The names of one implementation, behind the name of the layer.

    Fields:
        branch: what predicts the offsets, and what the masks where that is another module: joined, in this order,
            along the outputs, they are `conv_offset`. One that begins with `_` lies beside the layer: `conv2_offset`.
        conv: the module that holds weight and bias; empty where the layer itself does.
        masks: the `mask_activation` of weights in this layout.
        used_by: where it comes from.
    """

    branch: tuple[str, ...]
    conv: str
    masks: str
    used_by: str


LAYOUTS = (
    Layout(
        ("conv_offset_mask",), "", "sigmoid", "chengdazhi, CharlesShang; CenterNet, YOLACT++, FairMOT; EDVR's first"
    ),
    Layout(("_offset",), "", "sigmoid", "mmdetection before 2.0, detectron2, DBNet"),
    Layout(("offset_conv", "modulator_conv"), "regular_conv", "2*sigmoid", "BiRefNet"),
    Layout(("offset_mask",), "dcn", "sigmoid", "FaPN on torchvision's operator"),
)


def _key(prefix: str, name: str, kind: str) -> str:
    return f"{prefix[:-1] if name.startswith('_') else prefix}{name}.{kind}"


def rename(state: MutableMapping[str, Any], prefix: str, modulated: bool) -> dict[str, str]:
    """Give the tensors of one layer its own names, in place, and return old names to new ones.

    Nothing is renamed to a key that is there already.
    """
    renamed: dict[str, str] = {}
    for layout in LAYOUTS:
        parts = layout.branch if modulated else layout.branch[:1]
        if parts[0].startswith("_") and not prefix:
            continue  # nothing lies beside a layer that is by itself
        if _key(prefix, parts[0], "weight") not in state and _key(prefix, parts[0], "bias") not in state:
            continue
        for kind in ("weight", "bias"):
            old = [key for part in parts if (key := _key(prefix, part, kind)) in state]
            _move(state, old, f"{prefix}conv_offset.{kind}", renamed)
            if layout.conv:
                inner = f"{prefix}{layout.conv}.{kind}"
                _move(state, [inner] if inner in state else [], f"{prefix}{kind}", renamed)
    return renamed


def _move(state: MutableMapping[str, Any], old: list[str], new: str, renamed: dict[str, str]) -> None:
    values = [state[key] for key in old]
    together = len(values) == 1 or all(
        isinstance(value, Tensor) and value.dim() and value.shape[1:] == values[0].shape[1:] for value in values
    )
    if not values or new in state or not together:
        return
    for key in old:
        del state[key]
        renamed[key] = new
    state[new] = values[0] if len(values) == 1 else torch.cat(values)


def masks_of(renamed: Mapping[str, str]) -> str:
    """Return the `mask_activation` that the weights of these renamed keys were trained with."""
    for layout in LAYOUTS:
        for name in layout.branch:
            end = name if name.startswith("_") else f".{name}"
            if any(f".{key}".rpartition(".")[0].endswith(end) for key in renamed):
                return layout.masks
    return ""
