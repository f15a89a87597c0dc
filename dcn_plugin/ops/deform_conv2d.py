"""Deformable convolution v1 and v2: the public function, and what torch needs to trace and differentiate it."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import _check, _transforms
from ._layout import new_image

_op = torch.ops.dcn_plugin.deform_conv2d
_backward_op = torch.ops.dcn_plugin.deform_conv2d_backward
_lib = torch.library.Library("dcn_plugin", "IMPL")


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
    r"""Convolve at learnt positions: deformable convolution v1, or v2 (modulated) when ``mask`` is given.

    .. math:: out(p_0) = b + \sum_k w_k \cdot m_k(p_0) \cdot input(p_0 s + p_k d - pad + \Delta p_k(p_0))

    with zeros outside the input and bilinear interpolation in between. Arguments come in torchvision's order; groups
    and offset groups follow from the shapes. K = kernel_h * kernel_w taps, row-major.

    Args:
        input: ``[N, C, H, W]``; float64, float32, float16 or bfloat16; channels_last in, channels_last out.
        offset: ``[N, 2 * offset_groups * K, H', W']`` in pixels: per offset group, per tap, (y, x). May be float32
            beside a half-precision input.
        weight: ``[O, C / groups, kernel_h, kernel_w]``.
        bias: ``[O]`` or None.
        stride, dilation: int or (y, x), at least 1.
        padding: int, (y, x) or (top, left, bottom, right), at least 0.
        mask: ``[N, offset_groups * K, H', W']`` or None (all ones). May be float32 beside a half-precision input.

    Returns:
        ``[N, O, H', W']`` with ``H' = (H + top + bottom - dilation * (kernel_h - 1) - 1) // stride + 1``.
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
    _expect(offset, "offset", (n, 2 * offset_groups * kh * kw, out_h, out_w))
    _check.same_dtype(offset, "offset", input, or_float32=True)
    _check.same_dtype(weight, "weight", input)
    _check.same_device(offset, "offset", input)
    _check.same_device(weight, "weight", input)
    if mask is not None:
        _check.tensor(mask, "mask", 4, "[N, offset_groups * K, H', W']")
        _expect(mask, "mask", (n, offset_groups * kh * kw, out_h, out_w))
        _check.same_dtype(mask, "mask", input, or_float32=True)
        _check.same_device(mask, "mask", input)
    if bias is not None:
        _check.tensor(bias, "bias", 1, "[O]")
        _expect(bias, "bias", (out_channels,))
        _check.same_dtype(bias, "bias", input)
        _check.same_device(bias, "bias", input)


def _expect(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


@torch.library.register_fake("dcn_plugin::deform_conv2d")
def _(input, offset, weight, bias, mask, stride, padding, dilation):
    _check_tensors(input, offset, weight, bias, mask, stride, padding, dilation)
    return new_image(input, [input.shape[0], weight.shape[0], *_out_size(input, weight, stride, padding, dilation)])


# Bits of `needs`, as in csrc/ops/deform_conv2d.h; in the order in which the backward returns its gradients.
_NEEDS = {"input": 1, "offset": 2, "weight": 4, "mask": 8}


@torch.library.register_fake("dcn_plugin::deform_conv2d_backward")
def _(grad_output, input, offset, weight, mask, stride, padding, dilation, needs):
    _check_tensors(input, offset, weight, None, mask, stride, padding, dilation)

    def gradient(of: Tensor | None, bit: int) -> Tensor:
        if of is None:
            return input.new_empty(0)
        return new_image(of, of.shape) if needs & bit else of.new_empty(0)

    return tuple(gradient(of, bit) for of, bit in zip((input, offset, weight, mask), _NEEDS.values(), strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset, weight, _bias, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wants = dict(zip(("input", "offset", "weight", "bias", "mask"), ctx.needs_input_grad, strict=False))
    needs = sum(bit for name, bit in _NEEDS.items() if wants[name])
    grads: dict[str, Tensor] = {}
    if needs:
        if input.is_cuda and wants["input"]:
            _alert_not_deterministic()
        grads = dict(
            zip(_NEEDS, _backward_op(grad_output, input, offset, weight, mask, *ctx.geometry, needs), strict=True)
        )
    if wants["bias"]:
        grads["bias"] = grad_output.sum((0, 2, 3))
    return *(grads[name] if wants[name] else None for name in wants), None, None, None


def _alert_not_deterministic() -> None:
    """Say what torch's own operators say when they add atomically (``torch.use_deterministic_algorithms``)."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "deform_conv2d's gradient by its input has no deterministic implementation on CUDA; it has one on the CPU, and "
        "torch.use_deterministic_algorithms(True, warn_only=True) lets it pass"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


torch.library.register_autograd("dcn_plugin::deform_conv2d", _backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_output, input, offset, weight, mask, *ctx.geometry, ctx.needs = inputs
    ctx.save_for_backward(grad_output, input, offset, weight, mask)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients through the reference: right for every argument, at the reference's speed."""
    with torch.enable_grad():
        saved: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        grad_output, input, offset, weight, mask = saved
        stride, padding, dilation = ctx.geometry
        out = reference.deform_conv2d(input, offset, weight, None, stride, padding, dilation, mask)
        first = [t for t, bit in zip((input, offset, weight, mask), _NEEDS.values(), strict=True) if ctx.needs & bit]
        wanted = [g for g, bit in zip(grads, _NEEDS.values(), strict=True) if ctx.needs & bit]
        gradients = torch.autograd.grad(out, first, grad_output, create_graph=True)
        pairs = [(g, w) for g, w in zip(gradients, wanted, strict=True) if w is not None]
        targets = [t for t, needed in zip(saved, ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad([g for g, _ in pairs], targets, [w for _, w in pairs], allow_unused=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None, None, None


torch.library.register_autograd(
    "dcn_plugin::deform_conv2d_backward", _double_backward, setup_context=_setup_context_of_backward
)


def _autocast(device: str) -> Any:
    def kernel(input, offset, weight, bias, mask, stride, padding, dilation):
        # Positions keep float32: half precision would round them to whole pixels on large maps.
        half = torch.get_autocast_dtype(device)

        def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return t if t is None or t.dtype == torch.float64 else t.to(dtype)

        with torch.amp.autocast(device, enabled=False):
            return _op(
                cast(input, half), cast(offset, torch.float32), cast(weight, half), cast(bias, half),
                cast(mask, torch.float32), stride, padding, dilation,
            )  # fmt: skip

    return kernel


_lib.impl("deform_conv2d", _autocast("cuda"), "AutocastCUDA")
_lib.impl("deform_conv2d", _autocast("cpu"), "AutocastCPU")


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
