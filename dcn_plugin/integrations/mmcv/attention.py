"""mmcv's multi-scale deformable attention, by torch's `grid_sample`.

On a CPU mmcv does the same by itself and never comes here; on a GPU it calls its compiled module.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._check import shape, tensor
from ._wide import wide


def _attend(value: Tensor, sizes: list[list[int]], starts: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return `[N, Q, heads * C]`, as `ms_deform_attn_forward` says."""
    count, _, heads, channels = value.shape
    queries = locations.shape[1]
    by_head = value.permute(0, 2, 3, 1).flatten(0, 1)  # [N * heads, C, pixels]
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [N * heads, Q, levels, points, 2]
    factor = weights.transpose(1, 2).flatten(0, 1)[:, None]  # [N * heads, 1, Q, levels, points]
    found = value.new_zeros(count * heads, channels, queries)
    for level, ((height, width), start) in enumerate(zip(sizes, starts, strict=True)):
        plane = by_head[:, :, start : start + height * width].unflatten(2, (height, width))
        samples = F.grid_sample(plane, grid[:, :, level], align_corners=False)
        found = found + (samples * factor[:, :, :, level]).sum(3)
    return found.unflatten(0, (count, heads)).permute(0, 3, 1, 2).flatten(2)


def _check(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> None:
    tensor(value, "value", 4, "[N, pixels, heads, C]")
    tensor(locations, "sampling_locations", 6, "[N, Q, heads, levels, points, 2]")
    count, _, heads, _ = value.shape
    queries, levels, points = locations.shape[1], *locations.shape[3:5]
    shape(locations, "sampling_locations", (count, queries, heads, levels, points, 2))
    shape(weights, "attention_weights", (count, queries, heads, levels, points))
    shape(shapes, "value_spatial_shapes", (levels, 2))
    shape(starts, "value_level_start_index", (levels,))


def _levels(value: Tensor, shapes: Tensor, starts: Tensor) -> tuple[list[list[int]], list[int]]:
    """Return sizes and first pixels as numbers, within the pixels that there are."""
    sizes, firsts = shapes.tolist(), starts.tolist()
    for (height, width), first in zip(sizes, firsts, strict=True):
        if min(height, width) < 1 or first < 0 or first + height * width > value.shape[1]:
            raise ValueError(
                f"value_spatial_shapes: expected levels within {value.shape[1]} pixels, got {height} x {width} from "
                f"pixel {first} on"
            )
    return sizes, firsts


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
    _check(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    levels = _levels(value, value_spatial_shapes, value_level_start_index)
    given = (wide(each) for each in (value, sampling_locations, attention_weights))
    first, *others = given
    return _attend(first, *levels, *others).to(value.dtype)


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
    _check(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    levels = _levels(value, value_spatial_shapes, value_level_start_index)
    with torch.enable_grad():
        tensors = (value, sampling_locations, attention_weights)
        given = tuple(wide(each).detach().requires_grad_() for each in tensors)
        found = _attend(given[0], *levels, *given[1:])
    gradients = torch.autograd.grad(found, given, wide(grad_output).view_as(found))
    for into, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        into.add_(gradient)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ms_deform_attn_forward": ms_deform_attn_forward,
    "ms_deform_attn_backward": ms_deform_attn_backward,
}
