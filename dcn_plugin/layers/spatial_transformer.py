"""The spatial transformer: a map sampled where a predicted affine transformation takes the pixels of the result.

Symbols: N batch, C channels, H x W the map, H' x W' the result. Coordinates of a transformation run from -1 to 1 over
map and result, and are (x, y), as `torch.nn.functional.affine_grid` has them; offsets are (y, x) in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import deform_aggregate2d, deform_conv2d, ms_deform_attn
from ..ops._check import integer
from ..ops._layout import is_channels_last
from ..ops._transforms import held, plain_size, unrecorded
from ._start import OffsetPredictor, ZeroLinear, warn_if_redrawn
from .arguments import check_input, check_sides, describe, factory_arguments, flag, pair
from .samples import Samples, Window, recorded
from .sampling import SamplingModule

PADDING_MODES = ("zeros", "border", "reflection")
# What the localiser that a layer makes itself pools over.
_CELLS = 4


@unrecorded
def _identity() -> Tensor:
    return torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], device="cpu")


class AffineLinear(ZeroLinear):
    """The last layer of a localiser: six numbers of an affine transformation, at first those of the identity."""

    def __init__(
        self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, 6, device=device, dtype=dtype)

    def first_bias(self) -> Tensor:
        return _identity()


class AffineConv2d(OffsetPredictor):
    """The same for each pixel: a 3x3 convolution that keeps the size of its input."""

    def __init__(
        self, in_channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_channels, 6, 3, padding=1, device=device, dtype=dtype)

    def first_bias(self) -> Tensor:
        return _identity()


@unrecorded
def _check_theta(theta: Any, x: Tensor, output_size: tuple[int, int] | None, per_pixel: bool) -> Tensor:
    """Return what the localiser returned, if it has a transformation for each image, or each pixel of the result."""
    n, _, *size = x.shape
    shapes = [(n, 6, *(output_size or size))] if per_pixel else [(n, 6), (n, 2, 3)]
    if isinstance(theta, Tensor) and tuple(theta.shape) in shapes:
        return theta
    # Not before: torch.compile takes a size that has become part of a text for a constant.
    wanted = f"localiser: expected a module that returns {' or '.join(str(list(shape)) for shape in shapes)}"
    if not isinstance(theta, Tensor):
        raise TypeError(f"{wanted} for this input, got {type(theta).__name__} from it")
    raise ValueError(f"{wanted} for this input, got {list(theta.shape)} from it")


def _lattice(size: int, outputs: int, align_corners: bool) -> tuple[float, float]:
    """Return how far apart pixels of the result lie along an axis untransformed, and where the first; in pixels."""
    if not align_corners:
        return size / outputs, (size / outputs - 1) / 2
    return ((size - 1) / (outputs - 1), 0.0) if outputs > 1 else (1.0, (size - 1) / 2)


def _axis(size: int, outputs: int, align_corners: bool, like: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return where pixels of the result lie along an axis, from -1 to 1 and in pixels of the map, and half of the map.

    Sizes that are alike give whole pixels, without rounding.
    """
    i = torch.arange(outputs, device=like.device, dtype=like.dtype)
    step, first = _lattice(size, outputs, align_corners)
    if not align_corners:
        return (2 * i + 1) / outputs - 1, step * i + first, size / 2
    return 2 * i / (outputs - 1) - 1 if outputs > 1 else i, step * i + first, (size - 1) / 2


def _steps(size: tuple[int, int], output_size: tuple[int, int] | None) -> tuple[int, int]:
    """Return strides with which a kernel of 1x1 has at most as many positions as wanted, from the first pixel on.

    Zeros where an exporter has a symbol for a size, so that it cannot be seen how many there are.
    """
    if output_size is None:
        return 1, 1
    if not all(isinstance(side, int) for side in size):
        return 0, 0
    return -(-size[0] // output_size[0]), -(-size[1] // output_size[1])


def _clamped(position: Tensor, size: int) -> Tensor:
    """Move what lies beyond the centres of the outermost pixels onto them; there nothing depends on it."""
    free = (position > 0) & (position < size - 1)
    return torch.where(free, position, position.detach().clamp(0, size - 1))


def _reflected(position: Tensor, size: int, align_corners: bool) -> Tensor:
    """Reflect at the centres of the outermost pixels, or at their outer edges."""
    first, length = (0.0, size - 1) if align_corners else (-0.5, size)
    if length == 0:
        return position * 0
    # There and back again is twice the length.
    return length - ((position - first).abs().fmod(2 * length) - length).abs() + first


def _around(position: Tensor, size: int, align_corners: bool, padding_mode: str) -> Tensor:
    if padding_mode == "reflection":
        position = _reflected(position, size, align_corners)
    return _clamped(position, size)


def _offset(
    theta: Tensor, x: Tensor, output_size: tuple[int, int] | None, align_corners: bool, padding_mode: str
) -> tuple[Tensor, Tensor]:
    """Return how far samples lie from the positions of a 1x1 kernel, and how far these from the untransformed ones.

    In pixels, (y, x): `[N, 2, H', W']`, and `[2, H', W']`, zeros where the size stays. In float32 at least: in half
    precision positions of a map 256 pixels wide lie on every other pixel.
    """
    size = plain_size(x)
    outputs = output_size or size
    theta = theta.to(torch.promote_types(x.dtype, torch.float32))
    theta = theta if theta.dim() == 3 else theta.unflatten(1, (2, 3))
    by_x, by_y = (theta if theta.dim() == 5 else theta[..., None, None]).unbind(1)
    (at_y, rest_y, half_y), (at_x, rest_x, half_x) = (
        _axis(side, count, align_corners, theta) for side, count in zip(size, outputs, strict=True)
    )
    kernel_y, kernel_x = (
        step * torch.arange(count, device=theta.device, dtype=theta.dtype)
        for step, count in zip(_steps(size, output_size), outputs, strict=True)
    )
    from_y, from_x = (rest_y - kernel_y, rest_x - kernel_x) if padding_mode == "zeros" else (rest_y, rest_x)
    # What moves a pixel is added to where it lies untransformed, so that the identity moves nothing, to the last bit.
    # One number for each row and column until the last sum.
    y_across, x_across = half_y * by_y[:, 0] * at_x, half_x * (by_x[:, 0] - 1) * at_x + from_x
    y_down = half_y * ((by_y[:, 1] - 1) * at_y[:, None] + by_y[:, 2]) + from_y[:, None]
    x_down = half_x * (by_x[:, 1] * at_y[:, None] + by_x[:, 2])
    position = torch.stack((y_across, x_across), 1) + torch.stack((y_down, x_down), 1)
    kernel = torch.stack(torch.meshgrid(kernel_y, kernel_x, indexing="ij"))
    rest = torch.stack(torch.meshgrid(rest_y, rest_x, indexing="ij"))
    if padding_mode != "zeros":
        sides = zip(position.unbind(1), size, strict=True)
        position = torch.stack([_around(at, side, align_corners, padding_mode) for at, side in sides], 1) - kernel
    return position, kernel - rest


def _sample(x: Tensor, offset: Tensor, output_size: tuple[int, int] | None) -> Tensor:
    """Return `[N, C, H', W']`, all channels at the same positions, in the layout of `x`."""
    size, outputs = plain_size(x), plain_size(offset)
    stride = _steps(size, output_size)
    if stride == (0, 0):
        # From the upper left corner of the map, in its pixels: half of one before the centre of the first.
        value, way = x.flatten(2).transpose(1, 2)[:, :, None], (offset.flip(1) + 0.5).flatten(2).transpose(1, 2)
        sampled = ms_deform_attn(
            value, [size], way[:, :, None, None, None], reference_points=torch.zeros_like(way)[:, :, None]
        )
        return sampled.transpose(1, 2).unflatten(2, outputs).contiguous()
    # What is missing to the number of positions: beyond the map.
    below, right = (
        max(step * (count - 1) + 1 - side, 0) for step, count, side in zip(stride, outputs, size, strict=True)
    )
    padding = (0, 0, below, right)
    # Each in the layout that it reads as it is; the other would copy map and result.
    if is_channels_last(x):
        places = offset.permute(0, 2, 3, 1)[:, :, :, None, None]
        return deform_aggregate2d(x.permute(0, 2, 3, 1), places, None, 1, stride, padding).permute(0, 3, 1, 2)
    return deform_conv2d(x, offset, x.new_ones(x.shape[1], 1, 1, 1), None, stride, padding)


# Symbolic tracing records these as calls: they look at shapes.
for _name in ("check_input", "check_sides", "held", "_check_theta", "_offset", "_sample"):
    torch.fx.wrap(_name)


class SpatialTransformer(SamplingModule):
    """A map that is moved, turned, scaled and sheared as its content asks for (Jaderberg et al. 2015).

    `out(x, y) = input(theta * (x, y, 1))`, with `theta = localiser(input)`, six numbers for each image

    Coordinates run from -1 to 1 over map and result, and samples are bilinear: the numbers of torch's sampler on
    `affine_grid(theta, ...)`, where no position is NaN. A fresh layer gives back its input, to the last bit. Positions
    are computed in float32 at least, in half precision and under autocast too, where torch rounds them; what is rounded
    there is what the localiser returns.

    Args:
        channels: C.
        localiser: a module that makes `theta` of the input: `[N, 6]` or `[N, 2, 3]`, the row of x before that of y, as
            `affine_grid` takes it; with `per_pixel` `[N, 6, H', W']`. Where it ends in `AffineLinear` (`AffineConv2d`)
            the layer starts as the identity. None: convolutions of 7x7 and 5x5 with pooling, and two linear layers (two
            convolutions of 3x3 with `per_pixel`).
        output_size: (H', W'), or one number for both; None: the input's.
        align_corners: whether -1 and 1 are the centres of the outermost pixels, or their outer edges.
        padding_mode: what lies outside: "zeros", "border" (the nearest pixel), or "reflection".
        per_pixel: whether each pixel of the result has a transformation of its own.
        device: where the parameters of the localiser that the layer makes live.
        dtype: floating-point type of these parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Optimizers of this package train the localiser at 0.1 of the usual rate (published ones: from 1 to 0.0001).

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import SpatialTransformer
        >>> layer, x = SpatialTransformer(8), torch.rand(2, 8, 14, 16)
        >>> torch.equal(layer(x), x)
        True
        >>> SpatialTransformer(8, output_size=7, padding_mode="border")(x).shape
        torch.Size([2, 8, 7, 7])

    Source: Jaderberg et al., Spatial Transformer Networks (2015), eq. 1 and 5.
    """

    offset_branches: ClassVar[Mapping[str, float]] = {"localiser": 0.1}

    def __init__(
        self,
        channels: int,
        localiser: nn.Module | None = None,
        output_size: int | tuple[int, int] | None = None,
        align_corners: bool = False,
        padding_mode: str = "zeros",
        per_pixel: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        self.output_size = None if output_size is None else pair("output_size", output_size, 1)
        self.align_corners = flag("align_corners", align_corners)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode: expected one out of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        self.per_pixel = flag("per_pixel", per_pixel)
        factory = factory_arguments(device, dtype)
        self._least = 1 if localiser is not None or self.per_pixel else 4  # for two poolings
        if localiser is None and self.per_pixel:
            if self.output_size is not None:
                raise ValueError(
                    "output_size: expected None for the localiser that a layer with per_pixel makes, got "
                    f"{self.output_size}"
                )
            localiser = nn.Sequential(
                nn.Conv2d(self.channels, 16, 3, padding=1, **factory), nn.ReLU(), AffineConv2d(16, **factory)
            )
        elif localiser is None:
            localiser = nn.Sequential(
                nn.Conv2d(self.channels, 8, 7, padding=3, **factory), nn.MaxPool2d(2), nn.ReLU(),
                nn.Conv2d(8, 10, 5, padding=2, **factory), nn.MaxPool2d(2), nn.ReLU(),
                nn.AdaptiveAvgPool2d(_CELLS), nn.Flatten(),
                nn.Linear(10 * _CELLS**2, 32, **factory), nn.ReLU(), AffineLinear(32, **factory),
            )  # fmt: skip
        if not isinstance(localiser, nn.Module):
            raise TypeError(f"localiser: expected a module or None, got {localiser!r}")
        self.localiser = localiser

    def reset_parameters(self) -> None:
        """Initialise what the localiser consists of, each part as it does itself; its last layer to the identity."""
        for module in self.localiser.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    @property
    def window(self) -> Window | None:
        """That of a 1x1 kernel; where the result has a size of its own, it depends on the input: `window_in`."""
        return Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)) if self.output_size is None else None

    def window_in(self, samples: Samples) -> Window:
        """Return how the pixels of one call's result lie on its input untransformed, as a kernel of 1x1 would move."""
        assert isinstance(samples.input, Tensor)
        size = plain_size(samples.input)
        (step_y, y), (step_x, x) = (
            _lattice(side, outputs, self.align_corners)
            for side, outputs in zip(size, self.output_size or size, strict=True)
        )
        return Window((1, 1), (step_y, step_x), (-y, -x, -y, -x), (1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Transform `input`, `[N, C, H, W]`; returns `[N, C, H', W']`."""
        x = self._checked(input)
        offset, kernel = self._predict(x)
        output = _sample(x, offset, self.output_size)
        if self._sampling_hooks is not None and not recorded(x):
            self.tell_hooks(x, offset + kernel)
        return output

    def _checked(self, input: Tensor) -> Tensor:
        x = check_input(input, self.channels, next(self.localiser.parameters(), None))
        return held(check_sides(x, 2, self._least))

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        warn_if_redrawn(self)
        theta = _check_theta(self.localiser(x), x, self.output_size, self.per_pixel)
        return _offset(theta, x, self.output_size, self.align_corners, self.padding_mode)

    def offsets(self, input: Tensor) -> tuple[Tensor, None]:
        """What `forward` samples with, as hooks see it.

        Args:
            input: `[N, C, H, W]`.

        Returns:
            Offset `[N, 2, H', W']` in pixels, (y, x), from where each pixel of the result lies untransformed, after
            clamping or reflecting; and None.
        """
        offset, kernel = self._predict(self._checked(input))
        return offset + kernel, None

    def extra_repr(self) -> str:
        return describe(self, ("channels", "output_size", "align_corners", "padding_mode", "per_pixel"))
