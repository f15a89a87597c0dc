"""Convolution, attention and aggregation as operators that nearly every tool knows: `grid_sample` and products.

For converters and runtimes that take neither our operators nor ONNX's DeformConv, such as ExecuTorch. torch alone is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.roi_pool import POOLING

__all__ = ["grid_sample_decompositions"]


def grid_sample_decompositions() -> dict[Callable, Callable[..., Tensor]]:
    """Return what writes our operators with `grid_sample`, for `ExportedProgram.run_decompositions`.

    `deform_conv2d`: `columns = mask * grid_sample(input, positions)`, `out = conv2d(columns, weight as 1x1)`, about 40
    operators, for any groups, offset groups, padding, stride, dilation and dynamic sizes. The columns of a whole call
    are in memory at once: K times the input's channels at the output's size.

    `ms_deform_attn`: `out = sum over levels of sum over points of weight * grid_sample(level, locations)`, for every
    option and dynamic sizes. The samples of one level are in memory at once: P times the result.

    `deform_aggregate2d`: the same with its map as the only level, output pixels as queries and groups as heads. The
    samples of a call are in memory at once: K times the result.

    All of it is ATen's core operators. float16 and bfloat16 are computed in float32. `grid_sample` takes positions in
    parts of the map, so samples move by up to 1e-7 of its size: outputs differ by some 1e-6 of the largest, by 1e-5 for
    noise on maps of 200 pixels.

    Raises:
        NotImplementedError: when a program is decomposed that pools regions; the message names the operator.

    Example:
        >>> import torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3).eval(), torch.randn(1, 4, 8, 8)
        >>> program = torch.export.export(layer, (x,)).run_decompositions(
        ...     {**torch.export.default_decompositions(), **grid_sample_decompositions()}
        ... )
        >>> any("dcn_plugin" in str(node.target) for node in program.graph.nodes)
        False
        >>> torch.allclose(program.module()(x), layer(x), atol=1e-5)
        True
    """
    ours = torch.ops.dcn_plugin
    refused = {getattr(ours, name).default: _refusal(name) for name in POOLING}
    return {
        ours.deform_conv2d.default: _deform_conv2d,
        ours.ms_deform_attn.default: ms_deform_attn,
        ours.deform_aggregate2d.default: deform_aggregate2d,
        **refused,
    }


def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    stored = input.dtype
    acc = torch.promote_types(stored, torch.float32)
    input, offset, weight = (t.to(acc) for t in (input, offset, weight))
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kh * kw
    offset_groups = offset.shape[1] // (2 * taps)

    def axis(count: int, taps: int, i: int) -> tuple[Tensor, Tensor]:
        """Where the window begins for each output, and how far from there each tap is."""
        numbers = (torch.arange(size, dtype=acc, device=input.device) for size in (count, taps))
        outputs, inside = numbers
        return outputs * float(stride[i]) - float(padding[i]), inside * float(dilation[i])

    rows, tap_rows = axis(out_h, kh, 0)
    columns, tap_columns = axis(out_w, kw, 1)
    shift = offset.reshape(n * offset_groups, kh, kw, 2, out_h, out_w)
    y = shift[:, :, :, 0] + rows[:, None] + tap_rows[:, None, None, None]
    x = shift[:, :, :, 1] + columns + tap_columns[:, None, None]
    # From pixels to [-1, 1] over the map. What lies outside stays just outside, where nothing is read: runtimes count
    # pixels in integers, which infinite positions do not fit.
    grid = torch.stack(
        [(t.clamp(-2, size + 1) * 2.0 + 1.0) / size - 1.0 for t, size in ((x, width), (y, height))],
        dim=-1,
    ).reshape(n * offset_groups, taps * out_h, out_w, 2)
    maps = input.reshape(n * offset_groups, channels // offset_groups, height, width)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if mask is not None:
        sampled = sampled * mask.to(acc).reshape(n * offset_groups, 1, taps * out_h, out_w)
    out = F.conv2d(
        sampled.reshape(n, channels * taps, out_h, out_w),
        weight.reshape(out_channels, group_channels * taps, 1, 1),
        None if bias is None else bias.to(acc),
        groups=channels // group_channels,
    )
    return out.to(stored)


class Level(NamedTuple):
    """What attention samples on one level, its positions made and its weights ready."""

    height: int
    width: int
    first: int  # its first pixel among those of all levels
    locations: Tensor  # [N, Q, M, P, 2] (x, y) in units of the map, at least float32
    weights: Tensor | None  # [N, Q, M, P]; None: all ones


def levels(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: Sequence[int],
    points: Sequence[int],
    softmax: bool,
    offset_scale: float,
) -> Iterator[Level]:
    """Yield what `ms_deform_attn` with these arguments samples, level by level."""
    acc = torch.promote_types(value.dtype, torch.float32)
    given = sampling_locations.to(acc)
    weights = None if attention_weights is None else attention_weights.to(acc)
    if weights is not None and softmax:
        weights = weights.softmax(-1)
    reference = None if reference_points is None else reference_points.to(acc)[:, :, None]  # [N, Q, 1, L or 1, 2 or 4]
    first = first_point = 0
    for level, count in enumerate(points):
        height, width = spatial_shapes[2 * level : 2 * level + 2]
        locations = given.narrow(3, first_point, count)
        if reference is not None:
            own = reference.narrow(3, min(level, reference.shape[3] - 1), 1)
            if own.shape[-1] == 4:
                locations = own[..., :2] + locations * own[..., 2:] * (offset_scale / count)
            else:  # sizes may be symbols, of which there are no tensors
                locations = own + torch.stack([locations[..., 0] / width, locations[..., 1] / height], -1)
        own_weights = None if weights is None else weights.narrow(3, first_point, count)
        yield Level(height, width, first, locations, own_weights)
        first, first_point = first + height * width, first_point + count


def ms_deform_attn(value: Tensor, sampling_locations: Tensor, *arguments: Any) -> Tensor:
    """The operator as a `grid_sample` for each level and a weighted sum, in at least float32; arguments as it has."""
    n, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    maps = value.to(torch.promote_types(value.dtype, torch.float32)).permute(0, 2, 3, 1)
    maps = maps.reshape(n * heads, channels, pixels)
    sums = []
    for level in levels(value, sampling_locations, *arguments):
        here, count = maps.narrow(2, level.first, level.height * level.width), level.locations.shape[3]
        # What lies outside stays where nothing is read: runtimes count pixels in integers.
        grid = (level.locations * 2.0 - 1.0).clamp(-3, 3).transpose(1, 2)
        sampled = F.grid_sample(
            here.reshape(n * heads, channels, level.height, level.width),
            grid.reshape(n * heads, queries, count, 2),
            mode="bilinear", padding_mode="zeros", align_corners=False,
        )  # fmt: skip
        if level.weights is not None:
            sampled = sampled * level.weights.transpose(1, 2).reshape(n * heads, 1, queries, count)
        sums.append(sampled.sum(-1))
    out = sum(sums[1:], sums[0])
    # Not transposed last: onnxruntime would make that a part of the product behind it, which takes no empty batch.
    out = out.reshape(n, heads, channels, queries).permute(0, 3, 1, 2)
    return out.reshape(n, queries, heads * channels).to(value.dtype)


def deform_aggregate2d(
    value: Tensor,
    offset: Tensor,
    weight: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    official_order: bool,
    *,
    attend: Callable[..., Tensor] = ms_deform_attn,
) -> Tensor:
    """The operator as `attend`, attention with the map as its only level; arguments otherwise as it has."""
    n, height, width, channels = value.shape
    out_h, out_w, groups = offset.shape[1:4]
    taps = kernel_size[0] * kernel_size[1]
    acc = torch.promote_types(value.dtype, torch.float32)

    def axis(i: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Where the kernel's centre lies for each output, and the taps from there, in numbers of the map."""
        centre = dilation[i] * (kernel_size[i] - 1) // 2
        middle, inside = (torch.arange(size, dtype=acc, device=value.device) for size in (outputs, kernel_size[i]))
        at = middle * float(stride[i]) + float(centre - padding[i])
        placed = (inside * float(dilation[i]) - float(centre)) * offset_scale
        of_taps = (placed[:, None] if i == 0 else placed).expand(*kernel_size)
        placed = (of_taps.transpose(0, 1) if official_order else of_taps).reshape(taps)
        if remove_center:
            placed = torch.cat([placed[: taps // 2], placed[taps // 2 + 1 :]])
        return at, placed

    (rows, tap_rows), (columns, tap_columns) = axis(0, out_h), axis(1, out_w)
    taps -= int(remove_center)
    if weight is None and offset.dim() == 5:  # packed
        offset, weight = offset[..., : 2 * taps].unflatten(-1, (taps, 2)), offset[..., 2 * taps :]
    first, second = (t * offset_scale for t in offset.to(acc).unbind(-1))  # [N, H', W', G, K]
    y, x = (second, first) if official_order else (first, second)
    y = y + tap_rows + rows[:, None, None, None]
    x = x + tap_columns + columns[:, None, None]
    locations = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1)
    out = attend(
        value.reshape(n, height * width, groups, channels // groups),
        locations.reshape(n, out_h * out_w, groups, taps, 2),
        None if weight is None else weight.reshape(n, out_h * out_w, groups, taps),
        None, [height, width], [taps], softmax, 1.0,
    )  # fmt: skip
    return out.reshape(n, out_h, out_w, channels)


def _refusal(name: str) -> Callable[..., Tensor]:
    def refuse(*_: object, **__: object) -> Tensor:
        raise NotImplementedError(
            f"grid_sample_decompositions: expected convolution, attention and aggregation alone, got {name}, which no "
            "graph of grid_sample computes: dcn_plugin.export.onnx.export_onnx writes it for ONNX runtimes"
        )

    return refuse
