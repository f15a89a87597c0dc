"""A convolution with a larger dilation: the control for what deformation adds, where a deformable layer would be."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from ._symbolic import recorded_call
from .arguments import check_input, pair
from .samples import Window
from .sampling_conv import SamplingConv

# Symbolic tracing records this as a call: it looks at shapes.
torch.fx.wrap("check_input")


class Dilated(SamplingConv):
    """A convolution whose taps lie `factor` times as far apart, with a plain one's weights and the size of its result.

    `out(p0) = bias + sum_k weight_k * x(p0 * stride - padding + c + factor * (k * dilation - c))`, c the middle

    What a deformable layer is to be compared with: it reads as far as offsets would, from places that nobody learnt.
    As a rule of `convert`: `dict(match="layer4.*.conv2", layer=dict(type="Dilated", factor=2))`. A factor of 1 is the
    convolution.

    Args:
        in_channels .. offset_groups: as in `DeformConv2d`; the last changes nothing.
        factor: how much farther apart, integer or (y, x). Padding grows along, an odd pixel below and to the right.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import Dilated
        >>> conv = torch.nn.Conv2d(4, 8, 3, padding=1)
        >>> layer, x = Dilated.from_conv(conv, factor=2), torch.rand(1, 4, 6, 6)
        >>> torch.equal(layer(x), torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2))
        True

    Source: Dai et al., Deformable Convolutional Networks (2017), section 4.2, which compares with dilated convolutions.
    """

    drop_in = True
    deformable = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset_groups: int = 1,
        factor: int | tuple[int, int] = 2,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups,
        )  # fmt: skip
        self.factor = pair("factor", factor, 1)

    @property
    def window(self) -> Window:
        """With the larger dilation, and the padding that keeps the size of the result."""
        padding, dilation = self._spread()
        return Window(self.kernel_size, self.stride, padding, dilation)

    def _spread(self) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        more_y, more_x = (
            step * (size - 1) * (factor - 1)
            for step, size, factor in zip(self.dilation, self.kernel_size, self.factor, strict=True)
        )
        top, left, bottom, right = self.padding4
        padding = top + more_y // 2, left + more_x // 2, bottom + more_y - more_y // 2, right + more_x - more_x // 2
        return padding, (self.dilation[0] * self.factor[0], self.dilation[1] * self.factor[1])

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input`, `[N, C, H, W]`; returns `[N, O, H', W']`."""
        call = recorded_call(self, input)
        if call is not None:
            return call
        x = check_input(input, self.in_channels, self._parameters.get("weight"))
        (top, left, bottom, right), dilation = self._spread()
        padding = top, left
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        output = F.conv2d(x, self.weight, self.bias, self.stride, padding, dilation, self.groups)
        self.tell_hooks(input, None)
        return output

    def multiply_adds(self, output: Tensor) -> int:
        return output.shape[0] * output.shape[2] * output.shape[3] * self.weight.numel()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor}"
