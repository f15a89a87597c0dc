"""Deformable convolution layers with `nn.Conv2d`'s signature (Dai et al. 2017, Zhu et al. 2019).

Symbols: N batch, C input channels, O output channels, K = kh*kw taps, G offset groups, H' W' output size.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops import deform_conv2d
from ..ops._check import integer, integers, require_dense
from ..ops._transforms import unrecorded
from ._fold import take_norm_if_folding
from ._start import OffsetPredictor, OwnStart, warn_if_redrawn
from ._symbolic import recorded_call
from ._torchscript import NotScriptable
from .sampling import SamplingModule

logger = logging.getLogger("dcn_plugin")

Layer = TypeVar("Layer", bound="DeformConv2d")

MASK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "2*sigmoid": lambda raw: 2 * raw.sigmoid(),
    "sigmoid": torch.sigmoid,
}


# Symbolic tracing (timm's and torchvision's feature extractors) records these as calls: they look at shapes.
torch.fx.wrap("deform_conv2d")
torch.fx.wrap("_check_input")
torch.fx.wrap("_offset_channels")


def activation(value: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that `mask_activation` names."""
    if not isinstance(value, str) or value not in MASK_ACTIVATIONS:
        raise ValueError(f"mask_activation must be {' or '.join(map(repr, MASK_ACTIVATIONS))}, got {value!r}")
    return MASK_ACTIVATIONS[value]


@unrecorded
def _check_input(x: Tensor, channels: int, parameter: Tensor | None = None) -> Tensor:
    """Return `x` if it is an image with so many channels, where `parameter` is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor [N, {channels}, H, W], got {type(x).__name__}")
    require_dense("input", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"input must be [N, {channels}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"input must be a real floating-point tensor, got {x.dtype}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"input must be on {parameter.device} like the layer's parameters, got {x.device}")
    return x


@unrecorded
def _offset_channels(raw: Tensor) -> int:
    """How many of the channels that `conv_offset` returned are offsets; as many as half of them are mask logits."""
    return raw.shape[1] // 3 * 2


def _dense(weight: Tensor) -> Tensor:
    """The values of a weight of a class that stores them in fewer bits, such as torchao's; any other one as it is."""
    stored = getattr(type(weight), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    return weight.dequantize() if stored else weight


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    first, second = integers(name, value, least)
    return first, second


def _floating(name: str, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be a real floating-point dtype, got {dtype}")


class DeformConv2d(NotScriptable, SamplingModule, OwnStart):
    """Deformable convolution whose offsets (and mask) are arguments of `forward`, as in torchvision's module.

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`

    The constructor is `nn.Conv2d`'s, in its order, followed by this package's options.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: taps, integer or (height, width).
        stride: pixels, integer or (y, x).
        padding: zeros around the input in pixels: integer, (y, x), (top, left, bottom, right), `'valid'` or
            `'same'` (stride 1 only; an even kernel gets its odd pixel below and to the right, as in `nn.Conv2d`).
        dilation: pixels between taps, integer or (y, x).
        groups: channel groups of the weight; divides C and O.
        bias: learn a bias.
        padding_mode: `'zeros'` only: samples are free to leave the padded image, so other modes have no meaning.
        device: where the parameters live.
        dtype: floating-point type of the parameters.
        offset_groups: G, channel groups with offsets of their own; divides C.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformConv2d
        >>> layer = DeformConv2d(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.rand(1, 4, 6, 6), offset=torch.zeros(1, 18, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    #: True where `forward(x)` alone suffices, so that the layer can stand in for a convolution.
    drop_in: ClassVar[bool] = False
    # Attributes of nn.Conv2d that others read (mmcv's ConvModule does).
    transposed: ClassVar[bool] = False
    output_padding: ClassVar[tuple[int, int]] = (0, 0)
    _version = 2

    weight: nn.Parameter
    bias: nn.Parameter | None

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
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = integer("groups", groups, 1)
        self.offset_groups = integer("offset_groups", offset_groups, 1)
        for name, channels, divisor_name, divisor in (
            ("in_channels", self.in_channels, "groups", self.groups),
            ("out_channels", self.out_channels, "groups", self.groups),
            ("in_channels", self.in_channels, "offset_groups", self.offset_groups),
        ):
            if channels % divisor:
                raise ValueError(f"{name} must be divisible by {divisor_name}, got {channels} and {divisor}")
        self.padding: str | tuple[int, ...]
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"padding='same' needs stride 1, got stride {self.stride}")
            self.padding = padding
        else:
            self.padding = integers("padding", padding, 0, lengths=(2, 4))
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros', got {padding_mode!r}: pad the input with torch.nn.functional.pad first"
            )
        self.padding_mode = padding_mode
        _floating("dtype", dtype)

        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size, **factory)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        DeformConv2d.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self._note_memory()

    def _start_again(self, before: dict[str, Tensor], changed: set[str]) -> None:
        # A model's initialiser that knows this class has drawn; others have left the memory as it was.
        untouched = self._open().keys() - changed
        if not (self._without_memory and untouched):
            return
        kept = {name: p.clone() for name, p in self.named_parameters(recurse=False) if name not in untouched}
        DeformConv2d.reset_parameters(self)
        for name, value in kept.items():
            self.get_parameter(name).copy_(value)

    @property
    def padding4(self) -> tuple[int, int, int, int]:
        """Padding in pixels as (top, left, bottom, right)."""
        if not isinstance(self.padding, str):
            top, left, bottom, right = self.padding if len(self.padding) == 4 else self.padding * 2
            return top, left, bottom, right
        if self.padding == "valid":
            return 0, 0, 0, 0
        total_y, total_x = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return total_y // 2, total_x // 2, total_y - total_y // 2, total_x - total_x // 2

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            input: `[N, C, H, W]`.
            offset: `[N, 2*G*K, H', W']` in pixels; per offset group, per tap in row-major order, (y, x).
            mask: `[N, G*K, H', W']` or None for all ones.

        Returns:
            `[N, O, H', W']`.
        """
        call = recorded_call(self, input, offset, mask)
        return self._convolve(input, offset, mask, self.weight, self.bias) if call is None else call

    def _convolve(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        weight = _dense(weight)
        output = deform_conv2d(input, offset, weight, bias, self.stride, self.padding4, self.dilation, mask)
        if self._sampling_hooks is not None:
            self._sampled(input, offset, mask)
        return output

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        take_norm_if_folding(self)
        return super().named_children()

    @classmethod
    def from_conv(cls: type[Layer], conv: nn.Conv2d, **options: Any) -> Layer:
        """Make this layer out of a convolution, sharing its weight and bias `Parameter` objects.

        dtype, device, memory format, `training` and `requires_grad` carry over; what the layer adds
        (`conv_offset`) starts at zero and is trainable.

        Args:
            conv: an `nn.Conv2d` that computes just what `nn.Conv2d` computes.
            options: this layer's arguments beyond `nn.Conv2d`'s, such as `offset_groups`.

        Raises:
            TypeError: `conv` is something else (a subclass with a `forward` of its own, a transposed or lazy
                convolution), has a parametrised weight (weight norm, pruning), or carries hooks, which would be lost.
            ValueError: `conv` pads with something other than zeros, or an option does not fit.

        Example:
            >>> from torch import nn
            >>> from dcn_plugin.layers import DCNv2
            >>> conv = nn.Conv2d(4, 8, 3, padding=1)
            >>> DCNv2.from_conv(conv, offset_groups=2).weight is conv.weight
            True
        """
        require_plain_conv(conv)
        unknown = sorted(set(options) - set(layer_options(cls)))
        if unknown:
            raise TypeError(f"{cls.__name__} has no option {unknown[0]!r}; it has {', '.join(layer_options(cls))}")
        # Built without storage: the random numbers a fresh weight would draw stay undrawn.
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            _pair("kernel_size", conv.kernel_size, 1),
            _pair("stride", conv.stride, 1),
            conv.padding,
            _pair("dilation", conv.dilation, 1),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
            dtype=conv.weight.dtype,
            **options,
        )
        layer._materialize_like(conv)
        layer.weight = conv.weight  # type: ignore[assignment]
        layer.bias = conv.bias  # type: ignore[assignment]
        layer._note_memory()
        return layer.train(conv.training)

    def _materialize_like(self, conv: nn.Conv2d) -> None:
        """Give storage to what the layer has beyond weight and bias."""

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding not in ((0, 0), (0, 0, 0, 0)):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.offset_groups != 1:
            parts.append(f"offset_groups={self.offset_groups}")
        return ", ".join(parts)


class OffsetConv(DeformConv2d):
    """What `DCNv1` and `DCNv2` share: a `conv_offset` that predicts what `forward` samples with.

    `conv_offset` is an `nn.Conv2d` from C channels to `outputs_per_tap * G * K`, with the layer's own kernel
    size, stride, padding and dilation, groups 1 and a bias, all zero at first. Where the padding differs between
    opposite sides, which `nn.Conv2d` does not know, the layer pads the input and `conv_offset` does not.
    """

    drop_in = True
    outputs_per_tap: ClassVar[int]

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
        offset_bound: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups,
        )  # fmt: skip
        if offset_bound is not None:
            if isinstance(offset_bound, bool) or not isinstance(offset_bound, (int, float)):
                raise TypeError(f"offset_bound must be a number of pixels or None, got {offset_bound!r}")
            if not (offset_bound > 0 and math.isfinite(offset_bound)):
                raise ValueError(f"offset_bound must be positive and finite (pixels), got {offset_bound}")
        self.offset_bound = offset_bound
        taps = self.kernel_size[0] * self.kernel_size[1]
        outputs = self.outputs_per_tap * self.offset_groups * taps
        self.conv_offset = OffsetPredictor(
            self.in_channels,
            outputs,
            self.kernel_size,
            self.stride,
            0 if self._uneven_padding else self.padding4[:2],
            self.dilation,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv2d` does, and `conv_offset` with zeros."""
        super().reset_parameters()
        self.conv_offset.reset_parameters()

    def _materialize_like(self, conv: nn.Conv2d) -> None:
        self.conv_offset.to_empty(device=conv.weight.device)
        if not conv.weight.is_contiguous() and conv.weight.is_contiguous(memory_format=torch.channels_last):
            self.conv_offset.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.conv_offset.reset_parameters()

    def _predict(self, x: Tensor) -> Tensor:
        # Not the weight that a parametrisation computes: it would do so twice a call.
        x = _check_input(x, self.in_channels, self._parameters.get("weight"))
        warn_if_redrawn(self)
        padding = self._uneven_padding
        return self.conv_offset(F.pad(x, padding) if padding else x)

    @property
    def _uneven_padding(self) -> tuple[int, ...]:
        """For `F.pad`, where opposite sides differ; else ().

        Outside of `conv_offset`, which so is an `nn.Conv2d` like any other: adapters repeat it by its attributes.
        """
        top, left, bottom, right = self.padding4
        return () if (top, left) == (bottom, right) else (left, right, top, bottom)

    def _bound(self, raw: Tensor) -> Tensor:
        return raw if self.offset_bound is None else self.offset_bound * torch.tanh(raw / self.offset_bound)

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `forward` samples with, after bound and activation.

        Args:
            x: `[N, C, H, W]`.

        Returns:
            Offset `[N, 2*G*K, H', W']` in pixels, (y, x) per tap, and mask `[N, G*K, H', W']` (None for v1).
        """
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the layer to `[N, C, H, W]`; returns `[N, O, H', W']`."""
        call = recorded_call(self, input)
        return self._conv_forward(input, self.weight, self.bias) if call is None else call

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with another weight and bias, as `nn.Conv2d._conv_forward` does.

        mmcv's `efficient_conv_bn_eval` scales the two by a norm that follows.
        """
        return self._convolve(input, *self.offsets(input), weight, bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        renamed = rename_offset_keys(self, state_dict, prefix)
        _log_renames(self, renamed)
        for old in renamed:
            # Loaders that hand the whole dictionary to every module have flagged a sibling key at its parent.
            if old in unexpected_keys:
                unexpected_keys.remove(old)
        given = state_dict.get(f"{prefix}conv_offset.weight")
        own = getattr(self.conv_offset, "weight", None)  # what wraps it need not have one
        if isinstance(given, Tensor) and isinstance(own, Tensor) and given.shape != own.shape:
            error_msgs.append(self.explain_mismatch(f"{prefix}conv_offset.weight", given.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def explain_mismatch(self, name: str, shape: torch.Size) -> str:
        """Say in words why a `conv_offset` weight of `shape` does not fit this layer."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        wants = f"{self.outputs_per_tap} x {self.offset_groups} offset groups x {taps} taps"
        text = (
            f"{name} has shape {list(shape)}, but {type(self).__name__} expects "
            f"{list(self.conv_offset.weight.shape)} ({wants})"
        )
        for cls in (DCNv1, DCNv2):
            groups, rest = divmod(shape[0] if len(shape) == 4 else 0, cls.outputs_per_tap * taps)
            if groups and not rest:
                text += f"; {shape[0]} outputs would fit {cls.__name__} with offset_groups={groups}"
        return text

    def extra_repr(self) -> str:
        bound = "" if self.offset_bound is None else f", offset_bound={self.offset_bound}"
        return super().extra_repr() + bound


class DCNv1(OffsetConv):
    """Deformable convolution (Dai et al. 2017): a convolution that predicts where each of its taps samples.

    `out(p0) = bias + sum_k weight_k * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`,
    `offset = conv_offset(x)`

    A fresh layer computes what `nn.Conv2d` with the same weight computes.

    Args:
        in_channels .. dtype: as in `DeformConv2d` (`nn.Conv2d`'s arguments in its order).
        offset_groups: G, channel groups with offsets of their own; divides C.
        offset_bound: keep offsets within this many pixels, `bound * tanh(raw / bound)`; None leaves them free.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv1
        >>> layer = DCNv1(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.rand(1, 4, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    outputs_per_tap = 2

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._bound(self._predict(x)), None

    offsets.__doc__ = OffsetConv.offsets.__doc__


class DCNv2(OffsetConv):
    """Modulated deformable convolution (Zhu et al. 2019): each tap also has a weight of its own at each position.

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`

    The first 2/3 of `conv_offset`'s outputs are offsets, the last 1/3 mask logits (mmcv's layout). A fresh layer
    computes what `nn.Conv2d` with the same weight computes, unless `mask_activation='sigmoid'`.

    Args:
        in_channels .. dtype: as in `DeformConv2d` (`nn.Conv2d`'s arguments in its order).
        offset_groups: G, channel groups with offsets and masks of their own; divides C.
        mask_activation: `'2*sigmoid'` (mask 1 at first) or `'sigmoid'` (mask 0.5 at first, halving the output:
            what weights trained with mmcv, detectron2 and other earlier implementations expect).
        offset_bound: keep offsets within this many pixels, `bound * tanh(raw / bound)`; None leaves them free.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv2
        >>> layer = DCNv2(4, 8, kernel_size=3, padding=1)
        >>> offset, mask = layer.offsets(torch.rand(1, 4, 6, 6))
        >>> offset.shape, mask.shape
        (torch.Size([1, 18, 6, 6]), torch.Size([1, 9, 6, 6]))
    """

    outputs_per_tap = 3

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
        mask_activation: str = "2*sigmoid",
        offset_bound: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups, offset_bound,
        )  # fmt: skip
        activation(mask_activation)
        self.mask_activation = mask_activation

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = self._predict(x)
        split = _offset_channels(raw)
        return self._bound(raw[:, :split]), activation(self.mask_activation)(raw[:, split:])

    offsets.__doc__ = OffsetConv.offsets.__doc__

    def extra_repr(self) -> str:
        return super().extra_repr() + f", mask_activation={self.mask_activation!r}"


def layer_options(layer: type[nn.Module]) -> list[str]:
    """Names of the constructor arguments a layer has beyond `nn.Conv2d`'s."""
    conv = inspect.signature(nn.Conv2d).parameters
    return [name for name in inspect.signature(layer).parameters if name not in conv]


def require_plain_conv(conv: nn.Module) -> None:
    """Raise unless `conv` computes what `nn.Conv2d` computes and nothing would be lost by replacing it."""
    name = type(conv).__name__
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be an nn.Conv2d, got {name}")
    if parametrize.is_parametrized(conv):
        tensors = ", ".join(key for key in ("weight", "bias") if parametrize.is_parametrized(conv, key))
        raise TypeError(
            f"{name} has parametrised {tensors}: "
            "remove it first with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"{name} is lazy: run the model once so that it gets its shape")
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise TypeError(f"{name} is an nn.Conv2d with a forward of its own, which a deformable layer would not repeat")
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        raise TypeError(f"this {name} has had its forward replaced, which a deformable layer would not repeat")
    parameters = {key for key, value in conv.named_parameters(recurse=False)}
    computed = [key for key in ("weight", "bias") if key not in parameters and getattr(conv, key) is not None]
    if computed:
        sources = ", ".join(sorted(parameters - {"weight", "bias"})) or "hooks"
        raise TypeError(
            f"{name} computes its {' and '.join(computed)} from {sources} (weight norm, spectral norm or pruning): "
            "make it permanent first, for example with torch.nn.utils.remove_weight_norm"
        )
    extra = sorted((set(conv.state_dict()) | set(conv._modules)) - {"weight", "bias"})
    if extra:
        raise TypeError(f"{name} holds more than weight and bias: {', '.join(extra)}")
    hooks = [
        getattr(hook, "__qualname__", type(hook).__name__)
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        for hook in getattr(conv, kind, {}).values()
    ]
    if hooks:
        raise TypeError(f"{name} carries hooks that would be lost ({', '.join(hooks)}): convert first, hook afterwards")
    if conv.padding_mode != "zeros":
        raise TypeError(f"{name} has padding_mode={conv.padding_mode!r}; a deformable layer pads with zeros only")


def rename_offset_keys(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Rename, in place, the keys that earlier implementations use for `conv_offset`.

    For a layer at `conv2`: `conv2_offset.*` (mmdetection before 2.0, detectron2) and `conv2.conv_offset_mask.*`
    (chengdazhi, CharlesShang) become `conv2.conv_offset.*`, unless that key is there already.

    Args:
        module: the model or layer the keys are for.
        state_dict: changed in place.
        prefix: of the module's keys in `state_dict`, ending in a dot.

    Returns:
        Old names to new names; empty where nothing was renamed.
    """
    renamed = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, OffsetConv):
            continue
        path = f"{prefix}{name}." if name else prefix
        for kind in ("weight", "bias"):
            new = f"{path}conv_offset.{kind}"
            for old in (f"{path}conv_offset_mask.{kind}", f"{path[:-1]}_offset.{kind}"):
                if old in state_dict and new not in state_dict and path:
                    state_dict[new] = state_dict.pop(old)
                    renamed[old] = new
    return renamed


def accept_sibling_offset_keys(module: nn.Module) -> None:
    """Let plain `module.load_state_dict` take `conv2_offset.*` for the layer at `conv2`, wherever it is inside.

    PyTorch shows a layer only the keys under its own name, so the keys beside it are renamed by a hook on `module`.
    `dcn_plugin.convert` installs it; a model that builds its layers itself calls this once.
    """
    module.register_load_state_dict_pre_hook(_rename_hook)


def _rename_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _log_renames(module, rename_offset_keys(module, state_dict, prefix))


def _log_renames(module: nn.Module, renamed: dict[str, str]) -> None:
    if not renamed:
        return
    pairs = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
    note = sigmoid_note(module)
    logger.warning("state dict keys of an earlier layout renamed: %s%s", pairs, note and f"; {note}")


def sigmoid_note(module: nn.Module) -> str:
    """A sentence of advice where `module` has masks that start at 1, which earlier implementations do not; or ''."""
    masked = (m for m in module.modules() if isinstance(m, DCNv2) or getattr(m, "modulated", False))
    if any(getattr(m, "mask_activation", "") == "2*sigmoid" for m in masked):
        return (
            "weights in this layout were trained with mask_activation='sigmoid', but this model has '2*sigmoid': "
            "build it with mask_activation='sigmoid' to get the outputs they were trained for"
        )
    return ""
