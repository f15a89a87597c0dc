"""Deformable operators under the names and arguments of `mmcv._ext`.

As there, results are written into the tensors given, and gradients of the input and of weights are added to what these
hold. `columns`, `ones` and `im2col_step` are mmcv's scratch memory, not needed here;
kernels and groups must agree with the shapes.
What mmcv reads as contiguous memory may be channels_last or any view here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops._check import integer, shape, tensor
from ...ops._operator import wanted_bits
from ._wide import plain

_ALL = ("input", "offset", "weight", "mask")


def _backward(name: str, grad_output: Tensor, *arguments: Any, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Call the operator's backward for the gradients `wanted`; it returns a place for each that it knows.

    mmcv's gradient functions do not keep what a second call of the forward would; so not through autograd.
    """
    return getattr(torch.ops.dcn_plugin, f"{name}_backward")(grad_output, *arguments, wanted_bits(wanted))


def _agree(
    input: Tensor, weight: Tensor, offset: Tensor, kernel: tuple[int, int], group: int, deformable_group: int
) -> None:
    """Check what is told twice: the shapes of weight and offset say it, too, and our operators go by them."""
    tensor(input, "input", 4, "[N, C, H, W]")
    tensor(offset, "offset", 4, "[N, 2 * deformable_group * kH * kW, H, W]")
    group, deformable_group = integer("group", group, 1), integer("deformable_group", deformable_group, 1)
    shape(weight, "weight", (weight.shape[0], input.shape[1] // group, *kernel))
    shape(offset, "offset", (offset.shape[0], 2 * deformable_group * prod(kernel), *offset.shape[2:]))


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Write the deformable convolution of `input` to `output`."""
    _agree(input, weight, offset, (kH, kW), group, deformable_group)
    with plain(input.device):
        output.copy_(ops.deform_conv2d(input, offset, weight, None, (dH, dW), (padH, padW), (dilationH, dilationW)))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor, weight: Tensor,
    columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Add the gradient of the input to `gradInput`, and write that of the offsets to `gradOffset`."""
    _agree(input, weight, offset, (kH, kW), group, deformable_group)
    geometry = [dH, dW], [padH, padW, padH, padW], [dilationH, dilationW]
    found = _backward("deform_conv2d", gradOutput, input, offset, weight, None, *geometry, wanted=("input", "offset"))
    gradInput.add_(found[0])
    gradOffset.copy_(found[1])


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Add `scale` times the gradient of the weight to `gradWeight`."""
    _agree(input, gradWeight, offset, (kH, kW), group, deformable_group)
    geometry = [dH, dW], [padH, padW, padH, padW], [dilationH, dilationW]
    found = _backward("deform_conv2d", gradOutput, input, offset, gradWeight, None, *geometry, wanted=("weight",))
    gradWeight.add_(found[2], alpha=scale)


# mmcv's modulated kernels take the sizes of the output for those of offset and mask, without a check. So each image is
# read from its beginning with strides of the output, whatever its own size. DyHead's weights were trained on just that.


def _prefix(name: str, value: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the beginning of each image of `value`, as of shape `size`."""
    if tuple(value.shape) == size:
        return value
    images, length = size[0], prod(size[1:])
    flat = value.flatten(1)
    if flat.shape[0] < images or flat.shape[1] < length:
        raise ValueError(
            f"{name}: expected {images} images of at least {' x '.join(map(str, size[1:]))} numbers, the size of the "
            f"output, got shape {tuple(value.shape)}"
        )
    return flat[:images, :length].view(size)


def _write_prefix(target: Tensor, value: Tensor) -> None:
    """Write the gradient of what `_prefix` returned; the rest of `target` is zeros, as mmcv gives it."""
    if target.shape == value.shape:
        target.copy_(value)
        return
    flat = value.new_zeros(target.shape[0], prod(target.shape[1:]))
    flat[: value.shape[0], : prod(value.shape[1:])] = value.flatten(1)
    target.copy_(flat.view(target.shape))


def _positions(offset: Tensor, mask: Tensor, output: Tensor, deformable_group: int, taps: int) -> tuple[Tensor, Tensor]:
    images, _, *size = output.shape
    return (
        _prefix("offset", offset, (images, 2 * deformable_group * taps, *size)),
        _prefix("mask", mask, (images, deformable_group * taps, *size)),
    )


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor,
    columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Write the convolution whose samples `mask` multiplies, with `bias` if `with_bias`, to `output`."""
    _agree(input, weight, offset, (kernel_h, kernel_w), group, deformable_group)
    offset, mask = _positions(offset, mask, output, deformable_group, kernel_h * kernel_w)
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    with plain(input.device):
        output.copy_(ops.deform_conv2d(input, offset, weight, bias if with_bias else None, *geometry, mask))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor,
    grad_output: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Add the gradients of input, weight and bias, and write those of offsets and mask, to the tensors for them."""
    _agree(input, weight, offset, (kernel_h, kernel_w), group, deformable_group)
    offset, mask = _positions(offset, mask, grad_output, deformable_group, kernel_h * kernel_w)
    geometry = [stride_h, stride_w], [pad_h, pad_w, pad_h, pad_w], [dilation_h, dilation_w]
    found = _backward("deform_conv2d", grad_output, input, offset, weight, mask, *geometry, wanted=_ALL)
    grad_input.add_(found[0])
    _write_prefix(grad_offset, found[1])
    grad_weight.add_(found[2])
    _write_prefix(grad_mask, found[3])
    if with_bias:
        grad_bias.add_(grad_output.sum((0, 2, 3)))


def _yx(offset: Tensor) -> Tensor | None:
    """Offsets of regions in our order, (y, x), from mmcv's; mmcv has an empty tensor where there are none."""
    return offset.flip(1) if offset.numel() else None


def deform_roi_pool_forward(
    input: Tensor, rois: Tensor, offset: Tensor, output: Tensor, pooled_height: int, pooled_width: int,
    spatial_scale: float, sampling_ratio: int, gamma: float,
) -> None:  # fmt: skip
    """Write the means of the bins of `rois`, moved by `gamma` times `offset`, to `output`."""
    with plain(input.device):
        output.copy_(
            ops.deform_roi_pool(
                input, rois, _yx(offset), output_size=(pooled_height, pooled_width), spatial_scale=spatial_scale,
                sampling_ratio=sampling_ratio, gamma=gamma,
            )
        )  # fmt: skip


def deform_roi_pool_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor, grad_offset: Tensor,
    pooled_height: int, pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float,
) -> None:  # fmt: skip
    """Add the gradient of the input to `grad_input`, and write that of the offsets to `grad_offset`."""
    shifts = _yx(offset)
    options = [pooled_height, pooled_width], spatial_scale, max(sampling_ratio, 0), gamma, True
    wanted = ("input",) if shifts is None else ("input", "offset")
    found = _backward("deform_roi_pool", grad_output, input, rois, shifts, None, *options, wanted=wanted)
    grad_input.add_(found[0])
    if shifts is not None:
        grad_offset.copy_(found[1].flip(1))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        deform_roi_pool_forward,
        deform_roi_pool_backward,
    )
}
