"""Deformable convolution of sequences: the operator for images, on maps that are one pixel high.

Symbols: N batch, C channels, O outputs, L and L' lengths of input and result, K taps, G offset groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import deform_conv2d
from ..ops._check import integer, same_device, same_dtype, shape
from ..ops._check import tensor as check_tensor
from ..ops._transforms import unrecorded
from .arguments import divisible, factory_arguments, flag
from .samples import Window
from .sampling import SamplingModule


@unrecorded
def _checked(input: Any, channels: int, offset: Any, mask: Any, samples: int, window: Window) -> Tensor:
    """Return the input, if all is what the operator would refuse in its own words, which are those of images."""
    axes = f"[N, {channels}, L]"
    check_tensor(input, "input", 3, axes)
    if input.shape[1] != channels:
        raise ValueError(f"input: expected {axes}, got {list(input.shape)}")
    _, length = window.output_size(1, input.shape[2])
    if length < 1 or input.shape[2] < 1:
        raise ValueError(f"input: expected a sequence that the kernel fits on, got length {input.shape[2]}")
    for name, value in (("offset", offset), ("mask", mask)):
        if name == "mask" and value is None:
            continue
        check_tensor(value, name, 3, "[N, G * K, L']")
        shape(value, name, (input.shape[0], samples, length))
        same_dtype(value, name, input, or_float32=True)
        same_device(value, name, input)
    return input


def _in_the_plane(offset: Tensor) -> Tensor:
    """Return offsets along x as those of a map one pixel high, `[N, 2*G*K, 1, L']`."""
    return torch.stack((torch.zeros_like(offset), offset), 2).flatten(1, 2)[:, :, None]


# Symbolic tracing records these as calls: they look at shapes.
for _name in ("_checked", "_in_the_plane", "deform_conv2d"):
    torch.fx.wrap(_name)


class DeformConv1d(SamplingModule):
    """Deformable convolution of a sequence, with offsets (and a mask) that `forward` is given.

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * linear(x, p0 * stride - padding + k * dilation + offset_k(p0))`

    Samples between two values are linear, and outside of the sequence lie zeros. It is `deform_conv2d` on a map one
    pixel high, with everything that has.

    Args:
        in_channels .. bias: as in `nn.Conv1d`; `padding` an integer.
        device: where the parameters live.
        dtype: floating-point type of the parameters.
        offset_groups: G, channel groups with offsets of their own; divides C.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    tvdcn's `DeformConv1d` has the same arguments and the same offsets `[N, G * K, L']`. dc1d's have the order
    `[N, G, L', K]`, keep each sample within its kernel unless `unconstrained`, and pad by reflection: permute and
    clamp them, and pad the input, before the call.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformConv1d
        >>> layer, x = DeformConv1d(4, 8, 3, padding=1), torch.rand(2, 4, 20)
        >>> layer(x, offset=torch.zeros(2, 3, 20)).shape
        torch.Size([2, 8, 20])

    Source: Dai et al., Deformable Convolutional Networks (2017), eq. 2, along one axis.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset_groups: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.kernel_size = integer("kernel_size", kernel_size, 1)
        self.stride, self.padding = integer("stride", stride, 1), integer("padding", padding, 0)
        self.dilation, self.groups = integer("dilation", dilation, 1), integer("groups", groups, 1)
        self.offset_groups = integer("offset_groups", offset_groups, 1)
        divisible("in_channels", self.in_channels, "groups", self.groups)
        divisible("out_channels", self.out_channels, "groups", self.groups)
        divisible("in_channels", self.in_channels, "offset_groups", self.offset_groups)
        factory = factory_arguments(device, dtype)
        width = self.in_channels // self.groups
        self.weight = nn.Parameter(torch.empty(self.out_channels, width, self.kernel_size, **factory))
        biases = nn.Parameter(torch.empty(self.out_channels, **factory)) if flag("bias", bias) else None
        self.register_parameter("bias", biases)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def window(self) -> Window:
        """On the map one pixel high."""
        side = self.padding
        return Window((1, self.kernel_size), (1, self.stride), (0, side, 0, side), (1, self.dilation))

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            input: `[N, C, L]`.
            offset: `[N, G*K, L']`, by how many places of the sequence each tap moves to the right.
            mask: `[N, G*K, L']` or None for all ones.

        Returns:
            `[N, O, L']`, `L' = (L + 2 * padding - dilation * (K - 1) - 1) // stride + 1`.
        """
        taps = self.offset_groups * self.kernel_size
        x = _checked(input, self.in_channels, offset, mask, taps, self.window)[:, :, None]
        plane = _in_the_plane(offset)
        factors = None if mask is None else mask[:, :, None]
        output = deform_conv2d(
            x, plane, self.weight[:, :, None], self.bias, (1, self.stride), (0, self.padding), (1, self.dilation),
            factors,
        )  # fmt: skip
        self.tell_hooks(x, plane, factors)
        return output[:, :, 0]

    def multiply_adds(self, output: Tensor) -> int:
        return output.shape[0] * output.shape[2] * (self.weight.numel() + 4 * self.kernel_size * self.in_channels)

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "offset_groups")
        return f"{self.in_channels}, {self.out_channels}, " + ", ".join(f"{n}={getattr(self, n)}" for n in names)
