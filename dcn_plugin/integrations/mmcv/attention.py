"""mmcv's multi-scale deformable attention on our operator.

On a GPU mmcv calls its compiled module, which is `FUNCTIONS` here. On a CPU it calls a function in PyTorch of its own,
in whose place `_around` puts `multi_scale_deformable_attn_pytorch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops._check import shape, tensor
from ...ops._operator import wanted_bits
from ._wide import plain

Shapes = Tensor | Sequence[Sequence[int]]


def _check(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> list[list[int]]:
    """Return the sizes of the levels, if they are what the pixels are cut into."""
    tensor(value, "value", 4, "[N, pixels, heads, C]")
    tensor(locations, "sampling_locations", 6, "[N, Q, heads, levels, points, 2]")
    count, pixels, heads, _ = value.shape
    queries, levels, points = locations.shape[1], *locations.shape[3:5]
    shape(locations, "sampling_locations", (count, queries, heads, levels, points, 2))
    shape(weights, "attention_weights", (count, queries, heads, levels, points))
    shape(shapes, "value_spatial_shapes", (levels, 2))
    shape(starts, "value_level_start_index", (levels,))
    sizes, firsts, first = shapes.tolist(), starts.tolist(), 0
    for (height, width), given in zip(sizes, firsts, strict=True):
        if min(height, width) < 1 or given != first:
            raise ValueError(
                f"value_spatial_shapes: expected levels one after the other from pixel 0 on, got {height} x {width} "
                f"from pixel {given} on, behind {first}"
            )
        first += height * width
    if first != pixels:
        raise ValueError(f"value_spatial_shapes: expected levels of {pixels} pixels together, got {first}: {sizes}")
    return sizes


def _positions(locations: Tensor) -> Tensor:
    """mmcv gives them in the type of the values; what half precision has rounded is not rounded any more."""
    return locations.to(torch.promote_types(locations.dtype, torch.float32))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return `sum_{level, point} weight * bilinear(value of the level, location)` for each query and head, 0 outside.

    Args:
        value: `[N, pixels of all levels, heads, C]`.
        value_spatial_shapes: `[levels, 2]`, height and width of each.
        value_level_start_index: `[levels]`, its first pixel.
        sampling_locations: `[N, Q, heads, levels, points, 2]`, x and y from 0 to 1.
        attention_weights: `[N, Q, heads, levels, points]`.
        im2col_step: how many images mmcv works on at once; nothing changes with it here.

    Returns:
        `[N, Q, heads * C]`.
    """
    sizes = _check(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    with plain(value.device):
        return ops.ms_deform_attn(value, sizes, _positions(sampling_locations), attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients of `ms_deform_attn_forward` to the three tensors given for them."""
    sizes = _check(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    # Levels and points side by side, and no reference points, softmax or part of a box.
    locations, weights = _positions(sampling_locations).flatten(3, 4), attention_weights.flatten(3, 4)
    flat, points = [size for pair in sizes for size in pair], [sampling_locations.shape[4]] * len(sizes)
    wanted = wanted_bits(("value", "sampling_locations", "attention_weights"))
    found = torch.ops.dcn_plugin.ms_deform_attn_backward(
        grad_output, value, locations, weights, None, flat, points, False, 0.5, wanted
    )
    for into, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=False):
        into.add_(gradient.view_as(into))


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return what mmcv's function of this name does, which models on a CPU call, from our operator.

    Args:
        value: `[N, pixels of all levels, heads, C]`.
        value_spatial_shapes: height and width of each level, as a tensor `[levels, 2]` or pairs.
        sampling_locations: `[N, Q, heads, levels, points, 2]`, x and y from 0 to 1.
        attention_weights: `[N, Q, heads, levels, points]`.

    Returns:
        `[N, Q, heads * C]`.
    """
    return ops.ms_deform_attn(value, value_spatial_shapes, _positions(sampling_locations), attention_weights)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}
