"""What DCNv3 and DCNv4 share: how groups of channels are aggregated, what hooks are told, a convolution's place.

Symbols: N batch, H W and H' W' sizes of input and result, C channels, G groups, K taps of a kernel. Pixels have their
channels last. Tensors inside have the order of the official weights: pairs (x, y), taps column by column; `Samples`,
which hooks see, are (y, x) and row by row, like those of all layers.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import deform_aggregate2d
from ..ops._check import integer, number, tensor
from ..ops._transforms import unrecorded
from ._from_conv import require_plain_conv
from ._start import ZeroLinear
from .arguments import check_sides, describe, divisible, flag, pair
from .samples import Window, recorded
from .sampling import SamplingModule

Layer = TypeVar("Layer", bound="GroupAggregation")

# What a convolution that is replaced says itself.
_GEOMETRY = ("channels", "kernel_size", "stride", "pad", "dilation", "device", "dtype", "channels_first")


class GroupAggregation(SamplingModule):
    """What both layers share: their geometry, the gate of the centre, what hooks are told, a convolution's place."""

    drop_in = True
    _numbers: dict[str, int]  # what each linear branch predicts for a pixel
    center_feature_scale_proj_weight: nn.Parameter | None
    center_feature_scale_proj_bias: nn.Parameter | None

    def _set_geometry(
        self,
        channels: int,
        kernel_size: int,
        stride: int,
        pad: int,
        dilation: int,
        group: int,
        offset_scale: float,
        dw_kernel_size: int | None,
        center_feature_scale: bool,
        remove_center: bool,
        channels_first: bool,
    ) -> None:
        self.channels = integer("channels", channels, 1)
        self.kernel_size = integer("kernel_size", kernel_size, 1)
        self.stride = integer("stride", stride, 1)
        self.pad = integer("pad", pad, 0)
        self.dilation = integer("dilation", dilation, 1)
        self.group = integer("group", group, 1)
        divisible("channels", self.channels, "group", self.group)
        self.group_channels = self.channels // self.group
        self.offset_scale = number("offset_scale", offset_scale, positive=True)
        self.center_feature_scale = flag("center_feature_scale", center_feature_scale)
        # The official layers keep 0 or 1, and their configurations may have either.
        self.remove_center = flag("remove_center", bool(remove_center) if remove_center in (0, 1) else remove_center)
        if self.remove_center and (self.kernel_size % 2 == 0 or self.kernel_size == 1):
            raise ValueError(f"kernel_size: expected an odd one above 1 with remove_center, got {self.kernel_size}")
        self.dw_kernel_size = None if dw_kernel_size is None else integer("dw_kernel_size", dw_kernel_size, 1)
        if self.dw_kernel_size is not None and self.dw_kernel_size % 2 == 0:
            raise ValueError(f"dw_kernel_size: expected an odd number, got {self.dw_kernel_size}")
        if self.pad > self._centre:
            raise ValueError(
                f"pad: expected at most dilation * (kernel_size - 1) // 2 = {self._centre}, so that every kernel is "
                f"centred on a pixel that its offsets are predicted at, got {self.pad}"
            )
        self.channels_first = self.drop_in = flag("channels_first", channels_first)

    def _add_gate(self, factory: dict[str, Any]) -> None:
        for name, shape in (("weight", (self.group, self.channels)), ("bias", (self.group,))):
            gate = nn.Parameter(torch.zeros(shape, **factory)) if self.center_feature_scale else None
            self.register_parameter(f"center_feature_scale_proj_{name}", gate)

    def _reset_parameters(self) -> None:
        """Initialise again, by the name that the official models call."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: what is predicted 0, projections by Xavier's rule, gates half open."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, ZeroLinear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        for gate in (self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias):
            if gate is not None:
                nn.init.zeros_(gate)

    # -- geometry ------------------------------------------------------------------------------------------------------

    @property
    def _centre(self) -> int:
        return self.dilation * (self.kernel_size - 1) // 2

    @property
    def taps(self) -> int:
        """K, without the middle one where it is removed."""
        return self.kernel_size**2 - self.remove_center

    @property
    def displacement_scale(self) -> float:
        return self.offset_scale

    @property
    def window(self) -> Window:
        """How the undeformed grid lies, which `offset_scale` has stretched about the kernel's centre."""
        more = self.offset_scale - 1
        before = more * self._centre
        after = more * (self.dilation * (self.kernel_size - 1) - self._centre)
        sides = (self.pad + before,) * 2 + (self.pad + after,) * 2
        return Window((self.kernel_size,) * 2, (self.stride,) * 2, sides, (self.offset_scale * self.dilation,) * 2)

    def _aggregate(self, value: Tensor, offset: Tensor, weight: Tensor | None, softmax: bool) -> Tensor:
        return deform_aggregate2d(
            value, offset, weight, self.kernel_size, self.stride, self.pad, self.dilation,
            offset_scale=self.offset_scale, remove_center=self.remove_center, softmax=softmax, official_order=True,
        )  # fmt: skip

    def _large_enough(self, x: Tensor) -> Tensor:
        """Return `[N, H, W, C]` if the kernel fits on it."""
        return check_sides(x, 1, self.dilation * (self.kernel_size - 1) + 1 - 2 * self.pad)

    def _at_outputs(self, x: Tensor) -> Tensor:
        """Return the pixels of `x` that the kernels are centred on: of all of them, where the size stays."""
        if self.stride == 1 and 2 * self.pad == self.dilation * (self.kernel_size - 1):
            return x
        return _centres(x, self.kernel_size, self.stride, self.pad, self.dilation)

    def _gated(self, output: Tensor, value: Tensor, feature: Tensor) -> Tensor:
        """Mix the result with the pixel itself, by a share that `feature` says for each group."""
        if not self.center_feature_scale:
            return output
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        share = F.linear(feature, weight, bias).sigmoid()[..., None]  # type: ignore[arg-type]
        output, value = (t.unflatten(-1, (self.group, self.group_channels)) for t in (output, self._at_outputs(value)))
        return (output * (1 - share) + value * share).flatten(-2)

    # -- what it samples with ------------------------------------------------------------------------------------------

    def _samples(self, offset: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return offsets `[N, H', W', G, K, 2]` and weights `[N, H', W', G, K]` as `Samples` has them.

        A middle tap that is removed is there with offset 0 and weight 0, so that the taps are those of a kernel.
        """
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        weight = weight.to(offset.dtype)
        if self.remove_center:
            middle = self.taps // 2
            offset = torch.cat((offset[..., :middle, :], offset[..., :1, :] * 0, offset[..., middle:, :]), -2)
            weight = torch.cat((weight[..., :middle], weight[..., :1] * 0, weight[..., middle:]), -1)
        kernel = (self.kernel_size, self.kernel_size)
        offset = offset.unflatten(-2, kernel).transpose(-3, -2).flip(-1)
        weight = weight.unflatten(-1, kernel).transpose(-2, -1)
        return offset.permute(0, 3, 4, 5, 6, 1, 2).flatten(1, 4), weight.permute(0, 3, 4, 5, 1, 2).flatten(1, 3)

    def _told(self, x: Tensor) -> bool:
        return self._sampling_hooks is not None and not recorded(x)

    # -- in a convolution's place --------------------------------------------------------------------------------------

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the constructor's arguments that a convolution does not say; the layer has an attribute for each."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *_GEOMETRY)]

    @classmethod
    def from_conv(cls: type[Layer], conv: nn.Conv2d, **options: Any) -> Layer:
        """Make this layer for the place of a depthwise convolution; it does not compute what that computed.

        Channels, kernel, stride, padding, dilation, dtype, device and `training` carry over, and `channels_first` is
        set. Weight and bias do not: weights here belong to pixels and groups, not to channels, so all is drawn anew.
        At first a DCNv3 is the mean over the window between two linear layers, and a DCNv4 is its bias, 0.

        Args:
            conv: a depthwise `nn.Conv2d` with a square kernel that computes just what `nn.Conv2d` computes.
            options: this layer's arguments beyond the convolution's, such as `group`.

        Raises:
            TypeError: `conv` is something else, or an option is unknown.
            ValueError: `conv` is not depthwise, differs between y and x, pads with something other than zeros, or an
                option does not fit.

        Example:
            >>> import torch
            >>> from dcn_plugin.layers import DCNv3
            >>> layer = DCNv3.from_conv(torch.nn.Conv2d(32, 32, 7, padding=3, groups=32), group=2)
            >>> layer(torch.rand(1, 32, 14, 14)).shape
            torch.Size([1, 32, 14, 14])
        """
        require_plain_conv(conv)
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__}: expected options out of {', '.join(known)}, got {name!r}")
        if not conv.groups == conv.in_channels == conv.out_channels:
            raise ValueError(
                f"conv: expected a depthwise convolution, got one of {conv.in_channels} to {conv.out_channels} "
                f"channels in {conv.groups} groups"
            )
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        sides: tuple[float, ...] = ()
        if isinstance(conv.padding, str):
            sides = tuple(d * (k - 1) / 2 * (conv.padding == "same") for d, k in zip(dilation, kernel, strict=True))
        else:
            sides = conv.padding
        if any(len(set(given)) > 1 for given in (kernel, stride, dilation, sides)) or sides[0] != int(sides[0]):
            raise ValueError(f"conv: expected kernel, stride, padding and dilation alike on all sides, got {conv}")
        layer = cls(
            conv.in_channels, kernel_size=kernel[0], stride=stride[0], pad=int(sides[0]), dilation=dilation[0],
            channels_first=True, device=conv.weight.device, dtype=conv.weight.dtype, **options,
        )  # type: ignore[call-arg]  # fmt: skip
        return layer.train(conv.training)

    def predictor_multiply_adds(self, positions: int) -> int:
        """Return the multiply-adds of all linear and depthwise parts for so many positions of the result."""
        before = ("input_proj", "value_proj", "dw_conv", "offset_mask_dw")  # these run on the input's pixels
        return sum(
            parameter.numel() * positions * (self.stride**2 if name.startswith(before) else 1)
            for name, parameter in self.named_parameters()
            if name.endswith("weight") and parameter.dim() > 1
        )

    def explain_mismatch(self, name: str, shape: torch.Size) -> str:
        outputs, own = (int(shape[0]) if shape else 1), self._numbers.get(name.rpartition(".")[0].rpartition(".")[2])
        if own is None or outputs == own:
            return ""
        removed = ", the middle one removed," if self.remove_center else ""
        return (
            f"{name} of {list(shape)} predicts {outputs} numbers: this layer has {self.group} groups of {self.taps} "
            f"taps{removed} so {own}"
        )

    def extra_repr(self) -> str:
        return describe(self, ("channels", "kernel_size", "group", "offset_scale", "channels_first"))


@unrecorded
def check_pixels(x: Any, channels: int, parameter: Any, axes: str) -> Tensor:
    """Return `x` if it has these axes, one of which is as long as there are channels, and lies where the layer does."""
    names = axes.strip("[]").split(", ")
    tensor(x, "input", len(names), axes)
    if x.shape[names.index(str(channels))] != channels:
        raise ValueError(f"input: expected {axes}, got {list(x.shape)}")
    if isinstance(parameter, Tensor) and x.device != parameter.device:
        raise ValueError(f"input: expected to be on {parameter.device} like the layer's parameters, got {x.device}")
    return x


@unrecorded
def sides_of(x: Tensor, shape: Any) -> tuple[int, int]:
    """Return (H, W) of the L pixels of `x`: those given, or those of a square."""
    pixels = x.shape[1]
    if shape is None:
        side = math.isqrt(int(pixels))
        if side * side != pixels:
            raise ValueError(f"shape: expected (H, W), as the {pixels} pixels of input are no square, got None")
        return side, side
    height, width = pair("shape", shape, 0)
    if height * width != pixels:
        raise ValueError(f"shape: expected (H, W) of the {pixels} pixels of input, got {(height, width)}")
    return height, width


def _centres(x: Tensor, kernel: int, stride: int, pad: int, dilation: int) -> Tensor:
    first, reach = dilation * (kernel - 1) // 2 - pad, dilation * (kernel - 1) + 1
    height, width = ((side + 2 * pad - reach) // stride + 1 for side in x.shape[1:3])
    return x[:, first::stride, first::stride][:, :height, :width]


# Symbolic tracing records these as calls: they look at shapes.
for _name in ("check_pixels", "check_sides", "sides_of", "_centres", "deform_aggregate2d"):
    torch.fx.wrap(_name)
