"""Deformable max pooling: the largest of samples that lie where offsets move a pooling window's taps.

Symbols: N batch, C channels, K = kh*kw taps, G offset groups, H' W' output size.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from ..ops import ms_deform_attn
from ..ops._check import integer, same_device, same_dtype, shape
from ..ops._check import tensor as check_tensor
from ..ops._layout import is_channels_last
from ..ops._transforms import held, plain_size, unrecorded
from ._start import OffsetPredictor, warn_if_redrawn
from .arguments import check_input, check_predicted, describe, divisible, factory_arguments, pair
from .samples import Window
from .sampling import SamplingModule


@unrecorded
def _checked(input: Any, channels: int, window: Window, parameter: Tensor | None = None) -> Tensor:
    x = check_input(input, channels, parameter)
    height, width = window.output_size(x.shape[2], x.shape[3])
    if 0 in x.shape[2:] or height < 1 or width < 1:
        raise ValueError(f"input: expected a map that the kernel fits on, got {x.shape[2]} x {x.shape[3]} pixels")
    return x


@unrecorded
def _check_offset(offset: Any, x: Tensor, outputs: int, window: Window) -> None:
    check_tensor(offset, "offset", 4, "[N, 2 * G * K, H', W']")
    shape(offset, "offset", (x.shape[0], outputs, *window.output_size(x.shape[2], x.shape[3])))
    same_dtype(offset, "offset", x, or_float32=True)
    same_device(offset, "offset", x)


def _sampled(x: Tensor, at: Tensor) -> Tensor:
    """Return `[N, H' * W', G, C / G]`, samples at the pixels `[N, G, 2, H', W']`, (y, x)."""
    groups = at.shape[1]
    # Attention's positions are (x, y), from the outer edge of the first pixel.
    way = (at.flip(2) + 0.5).flatten(3).permute(0, 3, 1, 2)[:, :, :, None, None]
    value = x.flatten(2).transpose(1, 2).unflatten(2, (groups, x.shape[1] // groups))
    corner = at.new_zeros(1, 1, 1, 2).expand(x.shape[0], way.shape[1], 1, 2)
    sample = ms_deform_attn(value, [(x.shape[2], x.shape[3])], way, reference_points=corner)
    return sample.unflatten(2, (groups, x.shape[1] // groups))


def _largest(x: Tensor, offset: Tensor, window: Window, groups: int) -> Tensor:
    """Return the largest sample of each window, `[N, C, H', W']`; 0 where all lie off the map."""
    x = held(x)
    size = plain_size(x)
    outputs = offset.shape[2:]
    taps = [
        (y * window.dilation[0] - window.padding[0], x_ * window.dilation[1] - window.padding[1])
        for y, x_ in product(*map(range, window.kernel_size))
    ]
    rows, columns = (
        step * torch.arange(count, device=x.device) for step, count in zip(window.stride, outputs, strict=True)
    )
    # Positions of a wide map are no half precision numbers.
    moves = offset.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, len(taps), 2))
    largest, nowhere = None, None
    # A tap at a time: memory for one of them, and a gradient that goes to the largest alone.
    for tap, (y, x_) in enumerate(taps):
        start = torch.stack(torch.meshgrid(rows + y, columns + x_, indexing="ij"))
        at = moves[:, :, tap] + start
        # NaN is neither off the map nor on it, and its sample is NaN.
        off = (at <= -1).any(2) | (at[:, :, 0] >= size[0]) | (at[:, :, 1] >= size[1])
        off = off.flatten(2).transpose(1, 2)[..., None]
        sample = _sampled(x, at).masked_fill(off, -torch.inf)
        if largest is None:
            largest, nowhere = sample, off
        else:
            # The first of equals stays, and so does the first NaN.
            larger = (sample > largest) | (sample.isnan() & ~largest.isnan())
            largest, nowhere = torch.where(larger, sample, largest), nowhere & off
    assert largest is not None and nowhere is not None
    pooled = largest.masked_fill(nowhere, 0).flatten(2).transpose(1, 2).unflatten(2, tuple(outputs))
    if is_channels_last(x):
        return pooled.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return pooled.contiguous()


# Symbolic tracing records these as calls: they look at shapes.
for _name in ("_checked", "_check_offset", "_largest", "check_predicted"):
    torch.fx.wrap(_name)


class DeformMaxPool2d(SamplingModule):
    """Max pooling over samples that an offset moves, given to `forward` for each tap and position.

    `out(p0) = max over k of bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`

    The gradient goes to the pixels and the offset of the largest sample; the first of equals counts, and NaN is larger
    than all. A sample a pixel or more off the map takes no part, as the padding of `nn.MaxPool2d` takes none: with
    offsets of zero that is the result. Closer to the border samples lie between a pixel and zero. Where no sample of a
    window takes part the result is 0.

    Args:
        channels: C.
        kernel_size: taps, integer or (height, width).
        stride: pixels, integer or (y, x); None: the kernel's size.
        padding: pixels around the map, integer or (y, x), at most half of what the kernel spans.
        dilation: pixels between taps, integer or (y, x).
        offset_groups: G, channel groups with offsets of their own; divides C.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformMaxPool2d
        >>> layer, x = DeformMaxPool2d(4, kernel_size=3, stride=2, padding=1), torch.randn(1, 4, 9, 9)
        >>> torch.equal(layer(x, torch.zeros(1, 18, 5, 5)), torch.nn.functional.max_pool2d(x, 3, 2, 1))
        True

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2, whose sampling this applies to max pooling.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        offset_groups: int = 1,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else pair("stride", stride, 1)
        self.padding, self.dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
        self.offset_groups = integer("offset_groups", offset_groups, 1)
        divisible("channels", self.channels, "offset_groups", self.offset_groups)
        spans = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        if any(2 * side > span for side, span in zip(self.padding, spans, strict=True)):
            raise ValueError(f"padding: expected at most half of the kernel's span {spans}, got {self.padding}")

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.padding * 2, self.dilation)

    @property
    def _outputs(self) -> int:
        return 2 * self.offset_groups * self.kernel_size[0] * self.kernel_size[1]

    def forward(self, input: Tensor, offset: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: `[N, C, H, W]`.
            offset: `[N, 2*G*K, H', W']` in pixels; per offset group, per tap in row-major order, (y, x).

        Returns:
            `[N, C, H', W']`, H' and W' as for `nn.MaxPool2d`.
        """
        x = _checked(input, self.channels, self.window)
        _check_offset(offset, x, self._outputs, self.window)
        return self._pool(x, offset)

    def _pool(self, x: Tensor, offset: Tensor) -> Tensor:
        output = _largest(x, offset, self.window, self.offset_groups)
        if self._sampling_hooks is not None:
            self.tell_hooks(x, offset)
        return output

    def multiply_adds(self, output: Tensor) -> int | None:
        return self._samples(output)

    def _samples(self, output: Tensor) -> int:
        return 4 * self.kernel_size[0] * self.kernel_size[1] * output.numel()

    def extra_repr(self) -> str:
        return describe(self, ("channels", "kernel_size", "stride", "padding", "dilation", "offset_groups"))


class DeformMaxPool2dPack(DeformMaxPool2d):
    """`DeformMaxPool2d` with the convolution that predicts its offsets; a fresh one is `nn.MaxPool2d`.

    Args:
        channels .. offset_groups: as in `DeformMaxPool2d`.
        device: where the parameters of `conv_offset` live.
        dtype: floating-point type of these parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformMaxPool2dPack
        >>> layer, x = DeformMaxPool2dPack(4, kernel_size=2), torch.randn(1, 4, 8, 8)
        >>> torch.equal(layer(x), torch.nn.functional.max_pool2d(x, 2))
        True

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.
    """

    offset_branches: ClassVar[Mapping[str, float]] = {"conv_offset": 1.0}
    conv_offset: Any

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        offset_groups: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, kernel_size, stride, padding, dilation, offset_groups)
        self.conv_offset = OffsetPredictor(
            self.channels, self._outputs, self.kernel_size, self.stride, self.padding, self.dilation,
            **factory_arguments(device, dtype),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Let the layer be `nn.MaxPool2d` again."""
        self.reset_offsets()

    def offsets(self, x: Tensor) -> tuple[Tensor, None]:
        """What `forward` samples with, as hooks see it.

        Args:
            x: `[N, C, H, W]`.

        Returns:
            Offset `[N, 2*G*K, H', W']` in pixels, (y, x) per tap; and None.
        """
        x = _checked(x, self.channels, self.window, next(self.conv_offset.parameters(), None))
        warn_if_redrawn(self)
        return check_predicted(self.conv_offset(x), self._outputs, x, self.window, None), None

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the layer to `input`, `[N, C, H, W]`; returns `[N, C, H', W']`."""
        offset, _ = self.offsets(input)
        return self._pool(input, offset)

    def multiply_adds(self, output: Tensor) -> int | None:
        positions = output.numel() // self.channels
        if type(self.conv_offset) is not OffsetPredictor:  # another branch may work at other sizes
            return None
        return self._samples(output) + positions * self.conv_offset.weight.numel()
