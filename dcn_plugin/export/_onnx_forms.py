"""What torch's exporter writes into an ONNX graph in the place of our operators; imported when it does.

`deform_conv2d` becomes DeformConv, `ms_deform_attn` and `deform_aggregate2d` GridSample and a sum or TensorRT's plugin,
RoI pooling a Scan over the regions, each among other standard operators. torch alone is needed: operators of torch's
`onnx` namespace are nodes of the graph, their keyword arguments its attributes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops.roi_pool import POOLING
from . import grid_sample, tensorrt

# The first opset that has an operator of ours; torch's exporter itself writes 18 and then converts it.
_FIRST = {"DeformConv": 19, "GridSample": 16}
OPSET = _FIRST["DeformConv"]


@torch.library.custom_op(
    "onnx::DeformConv.opset19",
    mutates_args=(),
    schema="(Tensor X, Tensor W, Tensor offset, Tensor? B, Tensor? mask, *, SymInt[] dilations, int group, "
    "SymInt[] kernel_shape, int offset_group, SymInt[] pads, SymInt[] strides) -> Tensor",
)
def _deform_conv_node(
    X: Tensor, W: Tensor, offset: Tensor, B: Tensor | None, mask: Tensor | None, *, dilations: list[int], group: int,
    kernel_shape: list[int], offset_group: int, pads: list[int], strides: list[int],
) -> Tensor:  # fmt: skip
    """DeformConv as ONNX defines it, which is our operator; without defaults, so that no attribute is left out."""
    return torch.ops.dcn_plugin.deform_conv2d(X, offset, W, B, mask, strides, pads, dilations)


@_deform_conv_node.register_fake
def _(X, W, offset, B, mask, *, dilations, group, kernel_shape, offset_group, pads, strides):
    return torch.ops.dcn_plugin.deform_conv2d(X, offset, W, B, mask, strides, pads, dilations)


@torch.library.custom_op(
    "onnx::Slice.opset13", mutates_args=(), schema="(Tensor data, Tensor starts, Tensor ends, Tensor axes) -> Tensor"
)
def _slice_node(data: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    """Slice from and to where the graph finds out as it runs; the axes are those of `_axes_of_window`."""
    for axis, start, end in zip(_axes_of_window(data), starts.tolist(), ends.tolist(), strict=True):
        data = data.narrow(axis, start, end - start)
    return data.clone()


@_slice_node.register_fake
def _(data, starts, ends, axes):
    axes = _axes_of_window(data)
    sizes = {axis: torch.library.get_ctx().new_dynamic_size(min=1) for axis in axes}
    return data.new_empty([sizes.get(axis, size) for axis, size in enumerate(data.shape)])


def _axes_of_window(data: Tensor) -> list[int]:
    """Image, rows and columns of maps `[N, G, D, H, W]`; pixels of weights `[G, B, extent]`."""
    return [0, 3, 4] if data.dim() == 5 else [2]


def _deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """DeformConv, whose zero padding and border rule are ours."""
    _check_opset("DeformConv")
    channels, (_, group_channels, *kernel), offsets = input.shape[1], weight.shape, offset.shape[1]
    if not all(isinstance(size, int) for size in (channels, group_channels, *kernel, offsets)):
        raise ValueError(
            "input: expected fixed channels and a fixed kernel, got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    # Runtimes may compute positions in the type that they are given; here that is float32 at least.
    acc = torch.promote_types(input.dtype, torch.float32)
    given = [None if t is None else t.to(acc) for t in (input, weight, offset, bias, mask)]
    out = torch.ops.onnx.DeformConv.opset19(
        *given,
        dilations=dilation,
        group=channels // group_channels,
        kernel_shape=kernel,
        offset_group=offsets // (2 * kernel[0] * kernel[1]),
        pads=padding,
        strides=stride,
    )
    return out.to(input.dtype)


def _check_opset(operator: str) -> None:
    version, first = _asked_opset(), _FIRST[operator]
    if version is not None and version < first:
        raise ValueError(
            f"opset_version: expected at least {first}, which brought {operator}, got {version}: give "
            f"opset_version={first}, or leave it out"
        )


def _asked_opset() -> int | None:
    """The `opset_version` that torch.onnx.export was called with; None, and a warning, where torch keeps it elsewhere.

    torch tells it to translations alone, and would write an operator that the opset lacks without a word.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.onnx._internal.exporter._core":
            if "opset_version" in frame.f_locals:
                return frame.f_locals["opset_version"]
        frame = frame.f_back
    _warn_of_opset()
    return None


@cache
def _warn_of_opset() -> None:
    warnings.warn(
        f"torch.onnx.export: torch {torch.__version__} keeps its opset_version where dcn_plugin does not find it, so "
        f"an opset without DeformConv or GridSample is not refused: ask for {OPSET} or later",
        RuntimeWarning,
        stacklevel=2,
    )


def _ms_deform_attn(*args: Any) -> Tensor:
    """GridSample for each level and a weighted sum, or the plugin that was asked for."""
    if (version := tensorrt.asked()) is not None:
        return tensorrt.ms_deform_attn(version, *args)
    _check_opset("GridSample")
    return grid_sample.ms_deform_attn(*args)


def _deform_aggregate2d(*args: Any) -> Tensor:
    """Attention over the taps of a kernel, and so what that becomes."""
    return grid_sample.deform_aggregate2d(*args, attend=_ms_deform_attn)


def _roi_pooling(name: str) -> Callable[..., Tensor]:
    """The definition in plain PyTorch, with its samples summed up along each axis first.

    Results are the operators', to rounding, and NaN for a region that names no image. A pixel that is not finite
    reaches every bin of the regions around it, in its channel.
    """
    names = [argument.name for argument in getattr(torch.ops.dcn_plugin, name).default._schema.arguments]

    @torch.no_grad()  # a Scan that is also traced for gradients has two sets of unknown sizes
    def decompose(*args: Any) -> Tensor:
        detached = (arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        given = dict(zip(names, detached, strict=True))
        # Runtimes disagree on what is empty, so there is always a region: a last one, left out of the result.
        for of_regions in ("rois", "offset", "mask"):
            if (t := given.get(of_regions)) is not None:
                given[of_regions] = torch.cat((t, t.new_zeros(1, *t.shape[1:])))
        return getattr(reference, name)(**given, pool=_pool_windows)[:-1]

    return decompose


def _pool_windows(
    input: Tensor, rois: Tensor, vertical: Any, horizontal: Any, mask: Tensor | None, bins: Sequence[int], k: int
) -> Tensor:
    """As the definition's own average over the samples of `vertical` and `horizontal`, on `_sum_windows`.

    Samples of a bin form a grid and bilinear weights are products, so each axis has weights of its own. They are
    formed from no more samples than can lie on the map, and multiplied in the region's window alone.
    """
    n, channels, height, width = input.shape
    classes = max(vertical.position.shape[1], 1 if mask is None else mask.shape[1])
    # Bins of a group along y and x read the same channels; where k does not divide them, each is a group.
    groups = [k if size % k == 0 else size for size in bins]
    maps = input.to(torch.promote_types(input.dtype, torch.float32))
    maps = maps.reshape(n, classes, channels // classes // k**2, k, k, height, width)
    for i, (size, group) in enumerate(zip(bins, groups, strict=True)):
        if group != k:
            number = torch.arange(size, device=input.device)
            maps = maps.index_select(3 + i, number.mul(k).div(size, rounding_mode="trunc"))
    maps = maps.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 3)
    inner = [size // group for size, group in zip(bins, groups, strict=True)]

    def weights(axis: Any, extent: int) -> Tensor:
        """[R, G, B, extent]."""
        of_bin = reference.axis_weights(axis.position, axis.read, extent) / axis.divisor.clamp(min=1)[..., None]
        of_bin = of_bin.expand(-1, classes, *bins, extent)
        of_bin = of_bin.reshape(-1, classes, groups[0], inner[0], groups[1], inner[1], extent).transpose(3, 4)
        return of_bin.flatten(4, 5).flatten(1, 3)

    weights_y, weights_x = weights(vertical, height), weights(horizontal, width)
    # Where one axis has no sample, none is read: not those of a NaN position either.
    any_y, any_x = ((t != 0).any(-1, keepdim=True) for t in (weights_y, weights_x))
    weights_y, weights_x = torch.where(any_x, weights_y, 0), torch.where(any_y, weights_x, 0)
    image = torch.where((rois[:, 0] >= 0) & (rois[:, 0] < n), rois[:, 0], 0).long()
    (top, bottom), (left, right) = _window(weights_y), _window(weights_x)
    window = torch.stack((image, top, left, image + 1, bottom, right), 1)
    out = _sum_windows(maps, window, weights_y, weights_x)
    out = out.reshape(-1, classes, *groups, maps.shape[2], *inner).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.flatten(5, 6).flatten(3, 4)  # [R, classes, D / classes, P_h, P_w]
    if mask is not None:
        out = out * mask[:, :, None]
    return out.flatten(1, 2).to(input.dtype)


def _window(weights: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel with a weight, and the one after the last, for each region; one pixel where none has one."""
    used = (weights != 0).any(2).any(1)
    number = torch.arange(1, used.shape[1] + 1, device=used.device)
    last = torch.where(used, number, 1).amax(1)
    return torch.where(used, number - 1, last[:, None] - 1).amin(1), last


def _sum_windows(maps: Tensor, window: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    """Sum up each region, as a Scan whose memory is that of one; maps are read where they are, not passed along.

    `out[r,g,d,b] = sum_{i,j} weights_y[r,g,b,i] * weights_x[r,g,b,j] * maps[n_r,g,d,i,j]`

    Args:
        maps: `[N, G, D, H, W]`, groups of channels.
        window: `[R, 6]`, (image, top, left) and (image + 1, bottom, right): beyond it the weights are 0.
        weights_y: `[R, G, B, H]`, for each bin of a group.
        weights_x: `[R, G, B, W]`.
    """
    cut = torch.ops.onnx.Slice.opset13
    # Not torch.tensor, whose values torch.export would keep as a constant of a graph that is not the Scan's.
    number = torch.arange(3, device=maps.device)
    axes_of_maps, axis_of_weights = number + 2 * number.clamp(max=1), number[2:]  # as in `_axes_of_window`

    def of_region(
        state: Tensor, at: Tensor, along_y: Tensor, along_x: Tensor, maps: Tensor, axes: Tensor, axis: Tensor
    ) -> list[Tensor]:
        values = cut(maps, at[:3], at[3:], axes)[0]  # [G, D, h, w]
        along_y, along_x = (
            cut(weights, at[i : i + 1], at[i + 3 : i + 4], axis) for i, weights in ((1, along_y), (2, along_x))
        )
        for i, weights in enumerate((along_y, along_x)):
            torch._check(weights.shape[2] == values.shape[2 + i])
        weights = (along_y[..., None] * along_x[:, :, None]).flatten(2)
        return [state.clone(), values.flatten(2) @ weights.transpose(1, 2)]

    # torch wants a state that goes from region to region.
    scanned, whole = [window, weights_y, weights_x], (maps, axes_of_maps, axis_of_weights)
    return torch.ops.higher_order.scan(of_region, [maps.new_zeros(1)], scanned, whole)[1]


FORMS: dict[str, Callable[..., Tensor]] = {
    "deform_aggregate2d": _deform_aggregate2d,
    "deform_conv2d": _deform_conv2d,
    "ms_deform_attn": _ms_deform_attn,
    **{name: _roi_pooling(name) for name in POOLING},
}
"""By operator, from its arguments to what is written, as `ops._exporters` asks for."""
