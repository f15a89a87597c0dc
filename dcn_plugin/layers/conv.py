"""Deformable convolution layers with `nn.Conv2d`'s signature (Dai et al. 2017, Zhu et al. 2019).

Symbols: N batch, C input channels, O output channels, K = kh*kw taps, G offset groups, H' W' output size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import deform_conv2d
from ..ops._check import integer
from . import _former
from ._affine import NUMBERS, offsets_of_taps
from ._affine import offset_form as checked_form
from ._start import OffsetPredictor, warn_if_redrawn
from ._symbolic import recorded_call
from .arguments import activation, check_feature, check_input, check_predicted, mask_note
from .sampling import log_former_keys, rename_former_keys
from .sampling_conv import SamplingConv

# Symbolic tracing (timm's and torchvision's feature extractors) records these as calls: they look at shapes.
torch.fx.wrap("deform_conv2d")
torch.fx.wrap("check_input")
torch.fx.wrap("check_feature")
torch.fx.wrap("check_predicted")


def _dense(weight: Tensor) -> Tensor:
    """The values of a weight of a class that stores them in fewer bits, such as torchao's; any other one as it is."""
    stored = getattr(type(weight), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    return weight.dequantize() if stored else weight


class DeformConv2d(SamplingConv):
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
            self.tell_hooks(input, offset, mask)
        return output


class OffsetConv(DeformConv2d):
    """What `DCNv1` and `DCNv2` share: a `conv_offset` that predicts what `forward` samples with.

    `conv_offset` is an `nn.Conv2d` to `outputs_per_tap * G * K` channels (fewer with `offset_form`), with the layer's
    own kernel size, stride, padding and dilation, groups 1 and a bias, all zero at first. It reads the input, or
    another map that a call gives as `feature`. Where the padding differs between opposite sides, which `nn.Conv2d` does
    not know, the layer pads what it reads and `conv_offset` does not.

    Any module of that result may take its place: `layer.conv_offset = nn.Sequential(...)`. One that ends in an
    `OffsetPredictor` starts undeformed.

    A subclass that makes offsets of more than one map, as of optical flow, overrides `offsets`: `forward` hands on to
    it whatever it is given beside the input.
    """

    drop_in = True
    offset_branches: ClassVar[Mapping[str, float]] = {"conv_offset": 1.0}
    outputs_per_tap: ClassVar[int]
    feature_name: ClassVar[str] = "feature"  # of the other map, in errors
    conv_offset: Any
    offset_form: str | None = None  # of layers that were pickled before there was one

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
        offset_channels: int | None = None,
        offset_form: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups,
        )  # fmt: skip
        self.offset_form = checked_form(offset_form)
        if offset_bound is not None:
            if isinstance(offset_bound, bool) or not isinstance(offset_bound, (int, float)):
                raise TypeError(f"offset_bound: expected a number of pixels or None, got {offset_bound!r}")
            if not (offset_bound > 0 and math.isfinite(offset_bound)):
                raise ValueError(f"offset_bound: expected a positive and finite number of pixels, got {offset_bound}")
        self.offset_bound = offset_bound
        self.offset_channels = None if offset_channels is None else integer("offset_channels", offset_channels, 1)
        self.drop_in = self.offset_channels is None
        self.conv_offset = OffsetPredictor(
            self.in_channels if self.offset_channels is None else self.offset_channels,
            self._outputs,
            self.kernel_size,
            self.stride,
            0 if self._uneven_padding else self.padding4[:2],
            self.dilation,
            device=device,
            dtype=dtype,
        )

    @property
    def _taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def offset_outputs(self) -> int:
        """How many of `conv_offset`'s outputs are offsets; masks follow them."""
        return self.offset_groups * (2 * self._taps if self.offset_form is None else NUMBERS[self.offset_form])

    @property
    def _outputs(self) -> int:
        return self.offset_outputs + (self.outputs_per_tap - 2) * self.offset_groups * self._taps

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv2d` does, and what predicts offsets (`conv_offset`) with zeros."""
        super().reset_parameters()
        self.reset_offsets()

    def _predict(self, x: Tensor, feature: Tensor | None) -> Tensor:
        # Not the weight that a parametrisation computes: it would do so twice a call.
        weight = self._parameters.get("weight")
        x = check_input(x, self.in_channels, weight)
        source = x
        if feature is not None or self.offset_channels is not None:
            channels = self.offset_channels or self.in_channels
            source = check_feature(feature, channels, weight, x, self.feature_name)
        warn_if_redrawn(self)
        padding = self._uneven_padding
        raw = self.conv_offset(F.pad(source, padding) if padding else source)
        return check_predicted(raw, self._outputs, x, self.window, feature, self.feature_name)

    @property
    def _uneven_padding(self) -> tuple[int, ...]:
        """For `F.pad`, where opposite sides differ; else ().

        Outside of `conv_offset`, which so is an `nn.Conv2d` like any other: adapters repeat it by its attributes.
        """
        top, left, bottom, right = self.padding4
        return () if (top, left) == (bottom, right) else (left, right, top, bottom)

    def _offset(self, raw: Tensor) -> Tensor:
        raw = raw[:, : self.offset_outputs]
        raw = raw if self.offset_form is None else offsets_of_taps(raw, self.offset_form, self.window)
        return raw if self.offset_bound is None else self.offset_bound * torch.tanh(raw / self.offset_bound)

    def offsets(self, x: Tensor, feature: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `forward` samples with, after bound and activation.

        Args:
            x: `[N, C, H, W]`.
            feature: as in `forward`.

        Returns:
            Offset `[N, 2*G*K, H', W']` in pixels, (y, x) per tap, and mask `[N, G*K, H', W']` (None for v1).
        """
        raise NotImplementedError

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Tensor:  # type: ignore[override]
        """Apply the layer.

        Args:
            input: `[N, C, H, W]`.
            more, named: what `offsets` takes beside the input. Of `DCNv1` and `DCNv2` that is `feature`,
                `[N, offset_channels, H, W]`: the map that `conv_offset` reads in place of the input. A layer with
                `offset_channels` needs one in each call; another may be given one, with C channels.

        Returns:
            `[N, O, H', W']`.
        """
        call = recorded_call(self, input, *more, **named)
        return self._conv_forward(input, self.weight, self.bias, *more, **named) if call is None else call

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *more: Any, **named: Any) -> Tensor:
        """Apply the layer with another weight and bias, as `nn.Conv2d._conv_forward` does.

        mmcv's `efficient_conv_bn_eval` scales the two by a norm that follows.
        """
        return self._convolve(input, *self.offsets(input, *more, **named), weight, bias)

    def multiply_adds(self, output: Tensor) -> int | None:  # type: ignore[override]
        # A branch of another kind may work at other sizes than the output's.
        known = getattr(self.conv_offset, "stride", None) == self.stride
        return super().multiply_adds(output) if known else None

    def former_keys(self, state: MutableMapping[str, Any], prefix: str) -> dict[str, str]:
        """Rename what other implementations call the layer's tensors, unless the new key is there already.

        For a layer at `conv2`: `conv2_offset.*` (mmdetection before 2.0, detectron2) and `conv2.conv_offset_mask.*`
        (chengdazhi, CharlesShang, CenterNet) become `conv2.conv_offset.*`; `conv2.offset_conv.*` and
        `conv2.modulator_conv.*` (BiRefNet) do so together, and `conv2.regular_conv.*` becomes `conv2.*`.
        """
        if "conv_offset" not in self._modules:  # a subclass predicts with something else
            return {}
        return _former.rename(state, prefix, self.outputs_per_tap == 3)

    def explain_mismatch(self, name: str, shape: torch.Size) -> str:
        if not name.endswith("conv_offset.weight"):
            return ""
        taps = self._taps
        wants = f"{self.outputs_per_tap} x {self.offset_groups} offset groups x {taps} taps"
        if self.offset_form is not None:
            masks = f" and masks of {taps} taps" if self.outputs_per_tap == 3 else ""
            wants = (
                f"{NUMBERS[self.offset_form]} numbers for {self.offset_form!r}{masks}, x {self.offset_groups} groups"
            )
        text = (
            f"{name} has shape {list(shape)}, but {type(self).__name__} expects "
            f"{list(self.conv_offset.weight.shape)} ({wants})"
        )
        for cls in (DCNv1, DCNv2):
            groups, rest = divmod(shape[0] if len(shape) == 4 else 0, cls.outputs_per_tap * taps)
            if groups and not rest:
                text += f"; {shape[0]} outputs would fit {cls.__name__} with offset_groups={groups}"
        if len(shape) == 4 and shape[1] != self.conv_offset.weight.shape[1]:
            text += f"; it reads maps of {shape[1]} channels, as with offset_channels={shape[1]}"
        return text

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("offset_bound", "offset_channels", "offset_form")}
        more = [f", {name}={value!r}" for name, value in options.items() if value is not None]
        return super().extra_repr() + "".join(more)


class DCNv1(OffsetConv):
    """Deformable convolution (Dai et al. 2017): a convolution that predicts where each of its taps samples.

    `out(p0) = bias + sum_k weight_k * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`,
    `offset = conv_offset(x)`, or `conv_offset(feature)` where `layer(x, feature)` gives another map

    A fresh layer computes what `nn.Conv2d` with the same weight computes.

    Args:
        in_channels .. dtype: as in `DeformConv2d` (`nn.Conv2d`'s arguments in its order).
        offset_groups: G, channel groups with offsets of their own; divides C.
        offset_bound: keep offsets within this many pixels, `bound * tanh(raw / bound)`; None leaves them free.
        offset_channels: channels of another map, the `feature` of each call, that offsets are predicted from; None:
            they are predicted from the input, unless a call gives such a map of C channels.
        offset_form: None: each tap has its own offset. `'affine'`: six numbers for each position and offset group are a
            matrix and a shift, `offset_k = B * tap_k + t`, that move the kernel as a whole; `'similarity'`: four are a
            scale, a rotation and a shift.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv1
        >>> layer = DCNv1(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.rand(1, 4, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
        >>> DCNv1(4, 8, kernel_size=3, padding=1, offset_form="affine").conv_offset.out_channels  # not 2 * 9
        6
    """

    outputs_per_tap = 2

    def offsets(self, x: Tensor, feature: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self._offset(self._predict(x, feature)), None

    offsets.__doc__ = OffsetConv.offsets.__doc__


class DCNv2(OffsetConv):
    """Modulated deformable convolution (Zhu et al. 2019): each tap also has a weight of its own at each position.

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`

    The first 2/3 of `conv_offset`'s outputs are offsets, the last G*K mask logits (mmcv's layout). It reads x, or
    another map in `layer(x, feature)`. A fresh layer computes what `nn.Conv2d` with the same weight computes, unless
    `mask_activation='sigmoid'`.

    Args:
        in_channels .. dtype: as in `DeformConv2d` (`nn.Conv2d`'s arguments in its order).
        offset_groups: G, channel groups with offsets and masks of their own; divides C.
        mask_activation: `'2*sigmoid'` (mask 1 at first) or `'sigmoid'` (mask 0.5 at first, halving the output:
            what weights trained with mmcv, detectron2 and other earlier implementations expect).
        offset_bound: keep offsets within this many pixels, `bound * tanh(raw / bound)`; None leaves them free.
        offset_channels: channels of another map, the `feature` of each call, that offsets are predicted from; None:
            they are predicted from the input, unless a call gives such a map of C channels.
        offset_form: as in `DCNv1`; each tap still has its mask.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv2
        >>> layer = DCNv2(4, 8, kernel_size=3, padding=1)
        >>> offset, mask = layer.offsets(torch.rand(1, 4, 6, 6))
        >>> offset.shape, mask.shape
        (torch.Size([1, 18, 6, 6]), torch.Size([1, 9, 6, 6]))
        >>> aligned = DCNv2(4, 8, kernel_size=3, padding=1, offset_channels=10)  # offsets out of another map
        >>> aligned(torch.rand(1, 4, 6, 6), torch.rand(1, 10, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
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
        offset_channels: int | None = None,
        offset_form: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups, offset_bound, offset_channels, offset_form,
        )  # fmt: skip
        activation(mask_activation)
        self.mask_activation = mask_activation

    def offsets(self, x: Tensor, feature: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raw = self._predict(x, feature)
        return self._offset(raw), activation(self.mask_activation)(raw[:, self.offset_outputs :])

    offsets.__doc__ = OffsetConv.offsets.__doc__

    def former_note(self, renamed: Mapping[str, str]) -> str:
        return mask_note(_former.masks_of(renamed), self.mask_activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", mask_activation={self.mask_activation!r}"


def accept_sibling_offset_keys(module: nn.Module) -> None:
    """Let plain `module.load_state_dict` take `conv2_offset.*` for the layer at `conv2`, wherever it is inside.

    PyTorch shows a layer only the keys under its own name, so the keys beside it are renamed by a hook on `module`.
    `dcn_plugin.convert` installs it; a model that builds its layers itself calls this once.
    """
    module.register_load_state_dict_pre_hook(_rename_hook)


def _rename_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    log_former_keys(rename_former_keys(module, state_dict, prefix))
