"""Deformable aggregation, the core of DCNv3 and DCNv4: the public function, and what torch needs to trace it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import _check, _transforms
from ._operator import WANTED, register

_OFFSET = "[N, H', W', G, K, 2], or [N, H', W', G, 3K] without weight"
_WEIGHT = "[N, H', W', G, K]"


def deform_aggregate2d(
    value: Tensor,
    offset: Tensor,
    weight: Tensor | None = None,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    official_order: bool = False,
) -> Tensor:
    """Sum weighted samples around each pixel, whose places and weights are learnt: the core of DCNv3 and DCNv4.

        out(p, g) = sum over k of weight(p, g, k) * value(g, p0 + offset_scale * (k * dilation - c + offset(p, g, k)))

    for output pixel p, group g of channels and tap k, with `c = dilation * (kernel_size - 1) // 2` the kernel's centre
    and `p0 = p * stride - padding + c` where it lies on the map; zeros outside, bilinear interpolation in between. The
    channels of a group share places and weights, and no channels are mixed: where weights do not come from the input
    this is a depthwise convolution. Everything is **channels-last**. K = kernel_h * kernel_w taps, row-major.

    Args:
        value: `[N, H, W, C]`, in G groups of C / G channels; float64, float32, float16 or bfloat16; any strides.
        offset: `[N, H', W', G, K, 2]`, (y, x) in pixels before `offset_scale`; or, without `weight`,
            `[N, H', W', G, 3K]`: per group the K pairs, then K weights, as DCNv4 packs them. Any strides, so that a
            slice of a wider tensor is not copied. May be float32 beside half values, and had better be: positions are
            computed in float32 at least, but what comes in half is rounded already.
        weight: `[N, H', W', G, K]`; None: those behind the offsets, or all ones. May be float32 beside half values.
        kernel_size, stride, dilation: int or (y, x), at least 1.
        padding: int, (y, x) or (top, left, bottom, right), at least 0.
        offset_scale: what the kernel, offsets included, is stretched by about its centre.
        remove_center: leave the middle tap out, K = kernel_h * kernel_w - 1; for odd square kernels.
        softmax: take weights as logits of a softmax over the K taps of a group (DCNv3).
        official_order: pairs are (x, y), and taps go column by column, as in the official checkpoints.

    Returns:
        `[N, H', W', C]`, contiguous, of the values' type; H' and W' as for a convolution. A position with y <= -1 or
        y >= H (likewise x), or infinite, contributes 0; a NaN position gives NaN.

    Raises:
        ValueError: a shape, size or device does not fit. TypeError: a type does not fit. Both name the argument.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import deform_aggregate2d
        >>> value = torch.randn(2, 7, 9, 32)
        >>> offset, logits = torch.zeros(2, 7, 9, 4, 9, 2), torch.zeros(2, 7, 9, 4, 9)  # 4 groups
        >>> out = deform_aggregate2d(value, offset, logits, softmax=True)  # undeformed, equal weights: a mean
        >>> mean = torch.nn.functional.avg_pool2d(value.permute(0, 3, 1, 2), 3, 1, padding=1).permute(0, 2, 3, 1)
        >>> torch.allclose(out, mean, atol=1e-6)
        True

    Source: Wang et al., InternImage (2023), eq. 2; Xiong et al., Efficient Deformable ConvNets, DCNv4 (2024), eq. 2.
    """
    kernel = list(_check.integers("kernel_size", kernel_size, 1))
    strides = list(_check.integers("stride", stride, 1))
    pads = list(_check.integers("padding", padding, 0, (2, 4)))
    dilations = list(_check.integers("dilation", dilation, 1))
    if len(pads) == 2:
        pads = pads * 2
    scale = _check.number("offset_scale", offset_scale)
    for name, flag in (("remove_center", remove_center), ("softmax", softmax), ("official_order", official_order)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    _check_tensors(value, offset, weight, kernel, strides, pads, dilations, remove_center, softmax)
    if _transforms.need_plain_torch():
        return reference.deform_aggregate2d(
            value, offset, weight, kernel, strides, pads, dilations,
            offset_scale=scale, remove_center=remove_center, softmax=softmax, official_order=official_order,
        )  # fmt: skip
    return _op(value, offset, weight, kernel, strides, pads, dilations, scale, remove_center, softmax, official_order)


def _out_size(
    value: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    return [(value.shape[1 + i] + padding[i] + padding[2 + i] - spans[i]) // stride[i] + 1 for i in (0, 1)]


def _taps(kernel: Sequence[int], remove_center: bool) -> int:
    return kernel[0] * kernel[1] - int(remove_center)


@_transforms.unrecorded
def _check_tensors(
    value: Tensor,
    offset: Tensor,
    weight: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    remove_center: bool,
    softmax: bool,
) -> None:
    _check.tensor(value, "value", 4, "[N, H, W, C]")
    _check.tensor(offset, "offset", (6, 5) if weight is None else 6, _OFFSET)
    if 0 in value.shape[1:]:
        raise ValueError(f"value: expected pixels and channels, got shape {tuple(value.shape)}")
    if remove_center and (kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] == 1):
        raise ValueError(f"remove_center: expected an odd square kernel above 1, got kernel_size {tuple(kernel)}")
    out_h, out_w = _out_size(value, kernel, stride, padding, dilation)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"value: expected at least one output pixel, got output size {(out_h, out_w)} from value "
            f"{tuple(value.shape)}, kernel {tuple(kernel)}, stride {list(stride)}, padding {list(padding)}, "
            f"dilation {list(dilation)}"
        )
    groups, taps, channels = offset.shape[3], _taps(kernel, remove_center), value.shape[3]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"offset: expected {_OFFSET} with G groups dividing C = {channels}, got shape {tuple(offset.shape)}"
        )
    of_pixels = (value.shape[0], out_h, out_w, groups)
    _check.shape(offset, "offset", (*of_pixels, taps, 2) if offset.dim() == 6 else (*of_pixels, 3 * taps))
    _check.same_dtype(offset, "offset", value, or_float32=True, input_name="value")
    _check.same_device(offset, "offset", value, input_name="value")
    if weight is not None:
        _check.tensor(weight, "weight", 5, _WEIGHT)
        _check.shape(weight, "weight", (*of_pixels, taps))
        _check.same_dtype(weight, "weight", value, or_float32=True, input_name="value")
        _check.same_device(weight, "weight", value, input_name="value")
    elif softmax and offset.dim() == 6:
        raise ValueError("weight: expected logits for softmax=True, got None")


def _out_shape(
    value: Tensor,
    offset: Tensor,
    weight: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    official_order: bool,
) -> list[Any]:
    _check.integers("kernel_size", kernel_size, 1, (2,))
    _check.integers("stride", stride, 1, (2,))
    _check.integers("padding", padding, 0, (4,))
    _check.integers("dilation", dilation, 1, (2,))
    _check_tensors(value, offset, weight, kernel_size, stride, padding, dilation, remove_center, softmax)
    return [value.shape[0], *_out_size(value, kernel_size, stride, padding, dilation), value.shape[3]]


_op = register(
    "deform_aggregate2d",
    positions=("offset", "weight"),
    reference=reference.deform_aggregate2d,
    out_shape=_out_shape,
    fold=lambda own: {"value": 0, "offset": 0, "weight": 0, "out": 0},  # samples are images beside each other
    images=False,
)


def _multiply_adds(out_shape: Sequence[int], kernel: Sequence[int], remove_center: bool) -> int:
    """Four products of each bilinear sample."""
    n, out_h, out_w, channels = out_shape
    return 4 * n * out_h * out_w * _taps(kernel, remove_center) * channels


@register_flop_formula(torch.ops.dcn_plugin.deform_aggregate2d)
def _(
    value_shape, offset_shape, weight_shape, kernel, stride, padding, dilation, scale, remove_center, *args,
    out_shape=None, **kwargs,
):  # fmt: skip
    """Count a product and a sum as two."""
    return 2 * _multiply_adds(out_shape, kernel, remove_center)


@register_flop_formula(torch.ops.dcn_plugin.deform_aggregate2d_backward)
def _(
    grad_shape, value_shape, offset_shape, weight_shape, kernel, stride, padding, dilation, scale, remove_center,
    *args, out_shape=None, **kwargs,
):  # fmt: skip
    """As many for the gradient of the value, and for those of offset and weight together."""
    wanted = args[-1]
    others = WANTED["offset"] | WANTED["weight"]
    passes = bool(wanted & WANTED["value"]) + bool(wanted & others)
    return 2 * _multiply_adds(grad_shape, kernel, remove_center) * passes
