"""Deformable convolution v1 and v2: the public function, and what torch needs to trace and differentiate it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import _check, _transforms
from ._operator import register


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve at learnt positions: deformable convolution v1, or v2 (modulated) when `mask` is given.

        out(p) = bias + sum over k of weight(k) * mask(k, p) * input(p * stride - padding + k * dilation + offset(k, p))

    for the taps k of output pixel p, with zeros outside the input and bilinear interpolation in between. Arguments come
    in torchvision's order; groups and offset groups follow from the shapes. K = kernel_h * kernel_w taps, row-major.

    Args:
        input: `[N, C, H, W]`; float64, float32, float16 or bfloat16; channels_last in, channels_last out.
        offset: `[N, 2 * offset_groups * K, H', W']` in pixels: per offset group, per tap, (y, x). May be float32
            beside a half-precision input.
        weight: `[O, C / groups, kernel_h, kernel_w]`.
        bias: `[O]` or None.
        stride, dilation: int or (y, x), at least 1.
        padding: int, (y, x) or (top, left, bottom, right), at least 0.
        mask: `[N, offset_groups * K, H', W']` or None (all ones). May be float32 beside a half-precision input.

    Returns:
        `[N, O, H', W']` with `H' = (H + top + bottom - dilation * (kernel_h - 1) - 1) // stride + 1`.
        A position with y <= -1 or y >= H (likewise x), or infinite, contributes 0; a NaN position gives NaN.

    Raises:
        ValueError: a shape, size or device does not fit. TypeError: a type does not fit. Both name the argument.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import deform_conv2d
        >>> input, weight = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)
        >>> offset = torch.zeros(1, 2 * 9, 8, 8)  # no displacement: a plain convolution
        >>> out = deform_conv2d(input, offset, weight, padding=1)
        >>> torch.allclose(out, torch.nn.functional.conv2d(input, weight, padding=1), atol=1e-5)
        True

    Source: Dai et al., Deformable Convolutional Networks (2017), eq. 2; Zhu et al., Deformable ConvNets v2 (2019),
    eq. 1.
    """
    stride = list(_check.integers("stride", stride, 1))
    padding = list(_check.integers("padding", padding, 0, (2, 4)))
    dilation = list(_check.integers("dilation", dilation, 1))
    if len(padding) == 2:
        padding = padding * 2
    _check_tensors(input, offset, weight, bias, mask, stride, padding, dilation)
    if _transforms.need_plain_torch():
        return reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    return _op(input, offset, weight, bias, mask, stride, padding, dilation)


def _out_size(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    spans = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    return [(input.shape[2 + i] + padding[i] + padding[2 + i] - spans[i]) // stride[i] + 1 for i in (0, 1)]


@_transforms.unrecorded
def _check_tensors(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    _check.tensor(input, "input", 4, "[N, C, H, W]")
    _check.tensor(offset, "offset", 4, "[N, 2 * offset_groups * K, H', W']")
    _check.tensor(weight, "weight", 4, "[O, C / groups, kernel_h, kernel_w]")
    n, channels = input.shape[:2]
    out_channels, group_channels, kh, kw = weight.shape
    if 0 in input.shape[1:]:
        raise ValueError(f"input: expected channels and pixels, got shape {tuple(input.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight: expected no empty dimension, got shape {tuple(weight.shape)}")
    if channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f"weight: expected [O, C / groups, kernel_h, kernel_w] with groups dividing C = {channels} and O, "
            f"got shape {tuple(weight.shape)}"
        )
    out_h, out_w = _out_size(input, weight, stride, padding, dilation)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"input: expected at least one output pixel, got output size {(out_h, out_w)} from input "
            f"{tuple(input.shape)}, kernel {(kh, kw)}, stride {stride}, padding {padding}, dilation {dilation}"
        )
    if offset.shape[1] == 0 or offset.shape[1] % (2 * kh * kw) or channels % (offset.shape[1] // (2 * kh * kw)):
        raise ValueError(
            f"offset: expected 2 * offset_groups * {kh * kw} channels with offset_groups dividing C = {channels}, "
            f"got shape {tuple(offset.shape)}"
        )
    offset_groups = offset.shape[1] // (2 * kh * kw)
    _check.shape(offset, "offset", (n, 2 * offset_groups * kh * kw, out_h, out_w))
    _check.same_dtype(offset, "offset", input, or_float32=True)
    _check.same_dtype(weight, "weight", input)
    _check.same_device(offset, "offset", input)
    _check.same_device(weight, "weight", input)
    if mask is not None:
        _check.tensor(mask, "mask", 4, "[N, offset_groups * K, H', W']")
        _check.shape(mask, "mask", (n, offset_groups * kh * kw, out_h, out_w))
        _check.same_dtype(mask, "mask", input, or_float32=True)
        _check.same_device(mask, "mask", input)
    if bias is not None:
        _check.tensor(bias, "bias", 1, "[O]")
        _check.shape(bias, "bias", (out_channels,))
        _check.same_dtype(bias, "bias", input)
        _check.same_device(bias, "bias", input)


def _out_shape(input, offset, weight, bias, mask, stride, padding, dilation):
    for name, value, length in (("stride", stride, 2), ("padding", padding, 4), ("dilation", dilation, 2)):
        _check.integers(name, value, int(name != "padding"), (length,))
    _check_tensors(input, offset, weight, bias, mask, stride, padding, dilation)
    return [input.shape[0], weight.shape[0], *_out_size(input, weight, stride, padding, dilation)]


def _fold(own: set[str]) -> dict[str, int]:
    """Samples are images beside each other; with weights of their own, groups of channels beside each other."""
    if own.isdisjoint(("weight", "bias")):
        return {"input": 0, "offset": 0, "mask": 0, "out": 0}
    return {"input": 1, "offset": 1, "weight": 0, "bias": 0, "mask": 1, "out": 1}


_op = register(
    "deform_conv2d",
    positions=("offset", "mask"),
    reference=reference.deform_conv2d,
    out_shape=_out_shape,
    fold=_fold,
    closed_form={"bias": lambda grad_output: grad_output.sum((0, 2, 3))},
)


@register_flop_formula(torch.ops.dcn_plugin.deform_conv2d)
def _(input_shape, offset_shape, weight_shape, *args, out_shape=None, **kwargs):
    """Count the products with the weights and the four products of each bilinear sample, two operations each."""
    n, _, out_h, out_w = out_shape
    out_channels, group_channels, kh, kw = weight_shape
    return 2 * n * out_h * out_w * kh * kw * (out_channels * group_channels + 4 * input_shape[1])


@register_flop_formula(torch.ops.dcn_plugin.deform_conv2d_backward)
def _(grad_shape, input_shape, offset_shape, weight_shape, *args, out_shape=None, **kwargs):
    """Twice the forward's products for the weights, and dots, scatter and columns again for each sample."""
    n, out_channels, out_h, out_w = grad_shape
    _, group_channels, kh, kw = weight_shape
    return 2 * n * out_h * out_w * kh * kw * (2 * out_channels * group_channels + 12 * input_shape[1])
