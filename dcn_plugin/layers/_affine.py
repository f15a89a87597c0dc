"""Offsets of all taps of a kernel from a few numbers: how it is turned, scaled, sheared and shifted as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from .samples import Window

#: What a predictor gives for each position and offset group, by the form that its offsets have.
NUMBERS = {"affine": 6, "similarity": 4}


def offset_form(value: Any) -> str | None:
    """Return `value` if it names a form of offsets; None: each tap has its own."""
    if value is not None and (not isinstance(value, str) or value not in NUMBERS):
        raise ValueError(f"offset_form: expected {', '.join(map(repr, NUMBERS))} or None, got {value!r}")
    return value


def offsets_of_taps(numbers: Tensor, form: str, window: Window) -> Tensor:
    """Return offsets `[N, 2*G*K, H', W']` in pixels, (y, x), in float32 at least.

    `offset_k = B * tap_k + t`, taps from the middle of the kernel. "affine": B and t are `[[0, 1], [2, 3]]` and
    `[4, 5]` of the six numbers; "similarity": `[[0, -1], [1, 0]]` and `[2, 3]` of four, so that 1 + B is a scale times
    a rotation.

    Args:
        numbers: `[N, 6*G, H', W']` or `[N, 4*G, H', W']`.
        form: "affine" or "similarity".
        window: of the layer.
    """
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    first, second, *others = numbers.unflatten(1, (-1, NUMBERS[form])).unbind(2)
    if form == "affine":
        third, fourth, *shift = others
        pairs = (first, third), (second, fourth), shift
    else:
        pairs = (first, second), (-second, first), others
    by_y, by_x, by = (torch.stack(tuple(pair), 2)[:, :, None, None] for pair in pairs)  # [N, G, 1, 1, 2, H', W']
    rows, columns = (
        ((torch.arange(size, device=numbers.device, dtype=numbers.dtype) - (size - 1) / 2) * step).view(-1, 1, 1, 1)
        for size, step in zip(window.kernel_size, window.dilation, strict=True)
    )
    # A number for each row and each column of the kernel, until the last sum.
    return (by_y * rows[:, None] + by + by_x * columns).flatten(1, 4)


# Symbolic tracing records this as a call: it looks at shapes.
torch.fx.wrap("offsets_of_taps")
