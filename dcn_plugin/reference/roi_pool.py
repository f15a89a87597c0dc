"""Pooling over regions of interest in plain PyTorch (Dai et al. 2017, section 2.2; Zhu et al. 2019; Dai et al. 2016).

Symbols: R regions, P_h x P_w bins, D output channels, k x k position-sensitive groups of channels. An operator finds
where its samples lie, and `_pool` averages them. A caller may give another function with the same arguments as `pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._dense import dense_arguments
from .bilinear import bilinear_sample


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


class _Axis(NamedTuple):
    """Samples of every bin along one axis: `position` and `read` are `[R, classes, P_h, P_w, samples]`."""

    position: Tensor  # clamped to the map
    read: Tensor  # whether it is one of the bin's samples and on the map; NaN positions count as on it
    divisor: Tensor  # how many samples the average is over; broadcasts against [R, classes, P_h, P_w]


class _Rule(NamedTuple):
    """What an operator makes of the corners of a region."""

    half: float  # pixels of the map that its start is moved up and to the left by
    least: float | None  # size on the map; None: that of a region which is inside out is negative
    whole: bool = False  # rounded half away from zero to pixels of the image, the last one included


def _rule_of_roi_pool(aligned: bool) -> _Rule:
    return _Rule(0.5, None) if aligned else _Rule(0.0, 1)


_RULE_OF_PS_POOL = _Rule(0.5, 0.1, whole=True)


class Frame(NamedTuple):
    """`start` and `size` of regions, `[R, 2]` each, (y, x) in pixels of the image."""

    start: Tensor
    size: Tensor


def roi_frame(rois: Tensor, spatial_scale: float, aligned: bool) -> Frame:
    """What `deform_roi_pool` takes for start and size of regions `[R, 5]`; NaN where they are not finite."""
    return _on_image(rois, spatial_scale, _rule_of_roi_pool(aligned))


def ps_roi_frame(rois: Tensor, spatial_scale: float) -> Frame:
    """What `deform_ps_roi_pool` takes for start and size of regions `[R, 5]`; NaN where they are not finite."""
    return _on_image(rois, spatial_scale, _RULE_OF_PS_POOL)


@dense_arguments
def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    aligned: bool = True,
    pool: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.deform_roi_pool`; same arguments (rois as a tensor), any device.

    `out[r,c,p] = mask[r,p] / S * sum_s bilinear(input[n_r,c], start + bin * p + gamma * size * offset[r,p] + s)`
    """
    regions = _regions(rois, input.shape[0], input.dtype, spatial_scale, _rule_of_roi_pool(aligned))
    bins = _pair(output_size)

    def axis(i: int) -> _Axis:
        start, size = regions[i]
        step = size / bins[i]
        # Without a ratio the number of samples follows the size, and is 0 where that is not positive.
        grid = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil().clamp(min=0).nan_to_num(1)
        origin = _origins(start, step, bins, i, _shift(offset, i, gamma * size, bins, input))
        inside = (-1, input.shape[2 + i])
        return _spread(origin, step / grid.clamp(min=1), 0.5, grid, sampling_ratio, inside, input, i)

    return (pool or _pool)(input, rois, axis(0), axis(1), mask, bins, 1)


@dense_arguments
def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    output_dim: int,
    group_size: int,
    output_size: int | Sequence[int],
    part_size: int | Sequence[int] | None = None,
    samples_per_part: int = 4,
    spatial_scale: float = 1.0,
    offset_scale: float = 0.1,
    pool: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.deform_ps_roi_pool`; same arguments (rois as a tensor).

    As `deform_roi_pool`, but bin p reads the channels of its own group, and the average is over samples inside.
    """
    regions = _regions(rois, input.shape[0], input.dtype, spatial_scale, _RULE_OF_PS_POOL)
    bins, parts = _pair(output_size), _pair(output_size if part_size is None else part_size)

    def axis(i: int) -> _Axis:
        start, size = regions[i]
        step = size / bins[i]
        origin = _origins(start, step, bins, i, _shift(offset, i, offset_scale * size, bins, input, parts))
        grid = torch.full_like(step, samples_per_part)
        inside = (-0.5, input.shape[2 + i] - 0.5)
        spread = _spread(origin, step / samples_per_part, 0, grid, samples_per_part, inside, input, i)
        return spread._replace(divisor=spread.read.sum(-1))

    mask = None if mask is None else of_bins(mask, bins, parts)
    return (pool or _pool)(input, rois, axis(0), axis(1), mask, bins, group_size)


@dense_arguments
def ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    *,
    output_dim: int,
    group_size: int,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    pool: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.ps_roi_pool`; same arguments (rois as a tensor).

    The average of the whole pixels that a bin touches, in the channels of its own group; 0 where it touches none.
    """
    regions = _regions(rois, input.shape[0], input.dtype, spatial_scale, _Rule(0.0, 0.1, whole=True))
    bins = _pair(output_size)

    def axis(i: int) -> _Axis:
        start, size = regions[i]
        number = _numbers(bins, i).to(size)
        # Divided last, so that whole edges stay whole.
        first, last = (_last(start) + n * _last(size) / bins[i] for n in (number, number + 1))  # [R, P] along this axis
        shape = (rois.shape[0], 1, *((bins[0], 1) if i == 0 else (1, bins[1])))
        low, high = (edge.reshape(shape).clamp(0, input.shape[2 + i]) for edge in (first.floor(), last.ceil()))
        pixels = (high - low).nan_to_num(0)
        most = input.shape[2 + i] if _is_mapped(rois) else max(int(pixels.max()), 1) if len(rois) else 1
        position = low[..., None] + torch.arange(most).to(low)
        read = ~(position >= high[..., None])
        expand = (-1, -1, *bins)
        return _Axis(position.expand(*expand, -1), read.expand(*expand, -1), read.sum(-1).expand(expand))

    return (pool or _pool)(input, rois, axis(0), axis(1), None, bins, group_size)


def _regions(rois: Tensor, images: float, dtype: torch.dtype, scale: float, rule: _Rule) -> list[tuple[Tensor, Tensor]]:
    """Start and size along y, and along x, each [R], on the map and in at least float32.

    Both are NaN for an invalid region, which names none of the `images` or is not finite on the map.
    """
    number, lower, upper = rois.detach().split((1, 2, 2), 1)
    # Upper corners are looked at here because clamping the size would hide an infinite one.
    valid = (number >= 0) & (number < images) & (number == number.trunc()) & upper.isfinite()
    lower, upper = (t.to(torch.promote_types(dtype, torch.float32)) for t in (lower, upper))
    if rule.whole:
        lower, upper = (t.sign() * (t.abs() + 0.5).floor() for t in (lower, upper))
        upper = upper + 1
    start = lower * scale - rule.half
    size = upper * scale - rule.half - start
    size = size if rule.least is None else size.clamp(min=rule.least)
    valid = (valid & start.isfinite() & size.isfinite()).all(1, keepdim=True)
    start, size = (torch.where(valid, t, torch.nan) for t in (start, size))
    return [(start[:, i], size[:, i]) for i in (1, 0)]


def _on_image(rois: Tensor, scale: float, rule: _Rule) -> Frame:
    (top, height), (left, width) = _regions(rois, torch.inf, torch.float64, scale, rule)
    return Frame((torch.stack((top, left), 1) + rule.half) / scale, torch.stack((height, width), 1) / scale)


def _last(t: Tensor) -> Tensor:
    return t[:, None]


def _numbers(bins: Sequence[int], i: int) -> Tensor:
    return torch.arange(bins[i])


def _is_mapped(t: Tensor) -> bool:
    """Whether the values of `t` cannot be read: `torch.compile` traces, `torch.func.vmap` hides a dimension."""
    if torch.compiler.is_compiling():
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def of_bins(t: Tensor, bins: Sequence[int], parts: Sequence[int]) -> Tensor:
    """Take for each bin the value of the part it lies in: [..., parts] to [..., bins]."""
    for i in (0, 1):
        t = t.index_select(
            t.dim() - 2 + i, (_numbers(bins, i) * parts[i]).div(bins[i], rounding_mode="trunc").to(t.device)
        )
    return t


def _shift(
    offset: Tensor | None, i: int, unit: Tensor, bins: Sequence[int], input: Tensor, parts: Sequence[int] | None = None
) -> Tensor | None:
    """Offsets of axis i in pixels, [R, classes, P_h, P_w]."""
    if offset is None:
        return None
    return _bins(unit) * of_bins(offset, bins, parts or bins)[:, i::2].to(unit.dtype)


def _origins(start: Tensor, step: Tensor, bins: Sequence[int], i: int, shift: Tensor | None) -> Tensor:
    """Where each bin begins along axis i, [R, classes, P_h, P_w]."""
    edges = _last(start) + _numbers(bins, i).to(step) * _last(step)
    edges = edges[:, None, :, None] if i == 0 else edges[:, None, None, :]
    return edges.expand(-1, -1, *bins) if shift is None else edges + shift


def _spread(
    origin: Tensor,
    step: Tensor,
    phase: float,
    grid: Tensor,
    known: int,
    inside: tuple[float, float],
    input: Tensor,
    i: int,
) -> _Axis:
    """Samples at `origin + (0, 1, ... + phase) * step`, `grid` [R] of them: `known` in every region, unless that is 0.

    Those within `inside`, ends included, are read, at the nearest point of the map.
    """
    extent = input.shape[2 + i]
    first = torch.zeros_like(origin)
    on_map = 2 * extent + 8  # at most: where a region has several, they lie half a pixel apart or more
    if known > 0:
        most = known
    elif not _is_mapped(grid) and (len(grid) == 0 or grid.max() <= on_map):
        most = max(int(grid.max()), 1) if len(grid) else 1
    else:
        most = on_map
        first = ((inside[0] - origin.detach()) / _bins(step)).nan_to_num(0).sub(2).floor().clamp(min=0)
    number = first[..., None] + torch.arange(most).to(origin)
    position = origin[..., None] + (number + phase) * _bins(step)[..., None]
    read = (number < _bins(grid)[..., None]) & ~((position < inside[0]) | (position > inside[1]))
    # Beyond the centres of the outer pixels the value does not change with the position: no derivative.
    fixed = (position < 0) | (position >= extent - 1)
    position = torch.where(fixed, position.detach().clamp(0, extent - 1), position)
    return _Axis(position, read, _bins(grid))


def _bins(of_region: Tensor) -> Tensor:
    """[R] to [R, 1, 1, 1], for each bin."""
    return of_region[:, None, None, None]


def _pool(
    input: Tensor, rois: Tensor, vertical: _Axis, horizontal: _Axis, mask: Tensor | None, bins: Sequence[int], k: int
) -> Tensor:
    """Average the samples of every bin, read from the channels of its class and group, times the mask."""
    n, channels, height, width = input.shape
    acc = torch.promote_types(input.dtype, torch.float32)
    # The images of the batch lie one below the other: one tall map, whose rows float32 may not hold exactly.
    below = (rois[:, 0].detach().double() * height)[:, None, None, None, None]
    read = vertical.read[..., :, None] & horizontal.read[..., None, :]
    y = torch.where(read, (vertical.position.double() + below)[..., :, None], torch.inf)
    x = torch.where(read, horizontal.position.double()[..., None, :], torch.inf)
    classes = max(y.shape[1], 1 if mask is None else mask.shape[1])
    y, x = (t.expand(-1, classes, *t.shape[2:]) for t in (y, x))
    maps = input.to(acc).transpose(0, 1).reshape(classes, channels // classes // k**2, k, k, n * height, width)
    rows, columns = ([range(-(-g * b // k), -(-(g + 1) * b // k)) for g in range(k)] for b in bins)

    def cell(c: int, gh: int, gw: int) -> Tensor:
        where = (slice(None), c, slice(rows[gh].start, rows[gh].stop), slice(columns[gw].start, columns[gw].stop))
        at_y, at_x = y[where], x[where]
        samples = bilinear_sample(maps[None, c, :, gh, gw], at_y.reshape(1, -1), at_x.reshape(1, -1))
        total = samples.reshape(maps.shape[1], *at_y.shape[:3], at_y.shape[3] * at_y.shape[4]).sum(-1)
        return total.transpose(0, 1)  # [R, D / classes, bins of the cell]

    cells = [
        torch.cat([torch.cat([cell(c, gh, gw) for gw in range(k)], 3) for gh in range(k)], 2) for c in range(classes)
    ]
    divisor = (vertical.divisor * horizontal.divisor).clamp(min=1)
    weight = (1 / divisor.double()).expand(-1, classes, -1, -1)
    if mask is not None:
        weight = weight * mask.double()
    out = torch.cat(cells, 1)
    return (out * weight.repeat_interleave(out.shape[1] // classes, 1)).to(input.dtype)
