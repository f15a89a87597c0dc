"""DCNv3 and DCNv4: groups of channels, each a weighted sum of a few samples around a pixel (Wang et al. 2023, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._aggregation import GroupAggregation, check_pixels, sides_of
from ._start import ZeroLinear, warn_if_redrawn
from .arguments import factory_arguments, flag
from .channels import named_activation, named_norm


class DCNv3(GroupAggregation):
    """Deformable convolution v3, with InternImage's arguments, names and initialisation; pixels have channels last.

    `out(p) = output_proj(sum_k m_k(p) * v(p + s * (tap_k + offset_k(p))))`, for each of G groups of channels, with
    `v = input_proj(x)`, taps from the kernel's centre, s = `offset_scale`, and `offset`, and `m`, which softmax makes
    sum to 1 over the taps, linear in `dw_conv(x)` (a depthwise convolution, a norm, an activation). A fresh layer is
    the mean over the window between two linear layers.

    Args:
        channels: C.
        kernel_size: taps along each side.
        dw_kernel_size: of `dw_conv`, odd; None: `kernel_size`.
        stride, dilation: of the kernel.
        pad: on each side, at most half of the kernel. The offsets of a result are predicted at the pixel that its
            kernel is centred on, so a stride needs no other weights.
        group: G; divides `channels`.
        offset_scale: s, which multiplies offsets and the grid of taps alike.
        act_layer: "GELU", "ReLU" or "SiLU".
        norm_layer: "LN" or "BN".
        center_feature_scale: whether each group is mixed with the pixel itself, by a share that is predicted too.
        remove_center: leaves out the middle tap; needs an odd kernel.
        channels_first: whether pixels come, and leave, as `[N, C, H, W]`, in a convolution's place.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Weights of InternImage fit key for key. Optimizers of this package train `offset` at 0.1 of the usual rate.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv3
        >>> DCNv3(64, group=4)(torch.rand(2, 14, 14, 64)).shape
        torch.Size([2, 14, 14, 64])

    Source: Wang et al., InternImage (2023), eq. 2.
    """

    # The official trainers' rates: of all whose names hold "offset" or "center_feature_scale_proj".
    offset_branches: ClassVar[Mapping[str, float]] = {
        "offset": 0.1, "center_feature_scale_proj_weight": 0.1, "center_feature_scale_proj_bias": 0.1,
    }  # fmt: skip

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(
            channels, kernel_size, stride, pad, dilation, group, offset_scale,
            kernel_size if dw_kernel_size is None else dw_kernel_size, center_feature_scale, remove_center,
            channels_first,
        )  # fmt: skip
        factory = factory_arguments(device, dtype)
        self.act_layer, self.norm_layer = act_layer, norm_layer
        inner = self.dw_kernel_size or 1
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                self.channels, self.channels, inner, padding=(inner - 1) // 2, groups=self.channels, **factory
            ),
            named_norm(norm_layer, self.channels, factory, (True, False)),
            named_activation(act_layer),
        )  # fmt: skip
        self._numbers = {"offset": 2 * self.group * self.taps}
        self.offset = ZeroLinear(self.channels, self._numbers["offset"], **factory)
        self.mask = ZeroLinear(self.channels, self.group * self.taps, **factory)
        self.input_proj = nn.Linear(self.channels, self.channels, **factory)
        self.output_proj = nn.Linear(self.channels, self.channels, **factory)
        self._add_gate(factory)
        GroupAggregation.reset_parameters(self)

    def forward(self, input: Tensor) -> Tensor:
        """Aggregate.

        Args:
            input: `[N, H, W, C]`, or `[N, C, H, W]` with `channels_first`.

        Returns:
            `[N, H', W', C]`, H' = (H + 2 * pad - dilation * (kernel_size - 1) - 1) div stride + 1; or `[N, C, H', W']`.
        """
        x = self._pixels(input)
        value = self.input_proj(x)
        feature, offset, logits = self._predict(x)
        output = self._gated(self._aggregate(value, offset, logits, True), value, feature)
        output = self.output_proj(output)
        if self._told(x):
            self.tell_hooks(x.permute(0, 3, 1, 2), *self._samples(offset, logits.softmax(-1)))
        return output.permute(0, 3, 1, 2) if self.channels_first else output

    def offsets(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` samples with, as hooks see it.

        Args:
            input: as in `forward`.

        Returns:
            Offsets `[N, 2*G*K, H', W']`, (y, x), in `offset_scale` pixels, and weights `[N, G*K, H', W']`; with
            `remove_center` the middle tap is there, with weight 0.
        """
        _, offset, logits = self._predict(self._pixels(input))
        return self._samples(offset, logits.softmax(-1))

    def _pixels(self, input: Tensor) -> Tensor:
        """Return the input with channels last."""
        if self.channels_first:
            x = check_pixels(input, self.channels, self.offset.weight, f"[N, {self.channels}, H, W]")
            return self._large_enough(x.permute(0, 2, 3, 1))
        return self._large_enough(check_pixels(input, self.channels, self.offset.weight, f"[N, H, W, {self.channels}]"))

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is predicted from, raw offsets `[N, H', W', G, K, 2]` and logits `[N, H', W', G, K]`."""
        warn_if_redrawn(self)
        feature = self._at_outputs(self.dw_conv(x.permute(0, 3, 1, 2)))
        offset = self.offset(feature).unflatten(-1, (self.group, self.taps, 2))
        return feature, offset, self.mask(feature).unflatten(-1, (self.group, self.taps))


class DCNv4(GroupAggregation):
    """Deformable convolution v4, with DCNv4's arguments, names and initialisation, on rows of pixels `[N, L, C]`.

    `out(p) = output_proj(sum_k w_k(p) * v(p + s * (tap_k + offset_k(p))))`, for each of G groups of channels, with
    `v = value_proj(x)`, taps from the kernel's centre, s = `offset_scale`, and `offset` and `w`, which nothing
    normalises, from one linear `offset_mask`. A fresh layer gives its bias, as all weights are 0.

    Args:
        channels .. offset_scale: as in `DCNv3`.
        dw_kernel_size: of `offset_mask_dw`, a depthwise convolution before `offset_mask`, odd; None: there is none.
        center_feature_scale, remove_center: as in `DCNv3`.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: leaves out `value_proj` and `output_proj`.
        channels_first: whether pixels come, and leave, as `[N, C, H, W]`, in a convolution's place.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Weights of DCNv4 and FlashInternImage fit key for key; groups need not be multiples of 16 channels here, nor taps 8
    or 9. Optimizers of this package train `offset_mask` and `offset_mask_dw` at 0.1 of the usual rate.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv4
        >>> DCNv4(64, group=4)(torch.rand(2, 14 * 16, 64), shape=(14, 16)).shape
        torch.Size([2, 224, 64])

    Source: Xiong et al., Efficient Deformable ConvNets (2024), eq. 1.
    """

    offset_branches: ClassVar[Mapping[str, float]] = {
        "offset_mask_dw": 0.1, "offset_mask": 0.1, "center_feature_scale_proj_weight": 0.1,
        "center_feature_scale_proj_bias": 0.1,
    }  # fmt: skip

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(
            channels, kernel_size, stride, pad, dilation, group, offset_scale, dw_kernel_size, center_feature_scale,
            remove_center, channels_first,
        )  # fmt: skip
        self.output_bias = flag("output_bias", output_bias)
        self.without_pointwise = flag("without_pointwise", without_pointwise)
        factory, inner = factory_arguments(device, dtype), self.dw_kernel_size
        self.offset_mask_dw = (
            None
            if inner is None
            else nn.Conv2d(
                self.channels, self.channels, inner, padding=(inner - 1) // 2, groups=self.channels, **factory
            )
        )
        # Up to a multiple of 8; what is too much is never read.
        self._numbers = {"offset_mask": -(-3 * self.group * self.taps // 8) * 8}
        self.offset_mask = ZeroLinear(self.channels, self._numbers["offset_mask"], **factory)
        self.value_proj = None if without_pointwise else nn.Linear(self.channels, self.channels, **factory)
        self.output_proj = (
            None if without_pointwise else nn.Linear(self.channels, self.channels, bias=output_bias, **factory)
        )
        self._add_gate(factory)
        GroupAggregation.reset_parameters(self)

    def forward(self, input: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Aggregate.

        Args:
            input: `[N, L, C]`, the L = H * W pixels row by row; `[N, C, H, W]` with `channels_first`.
            shape: (H, W); None: the pixels are a square.

        Returns:
            `[N, H' * W', C]`, with H' as in `DCNv3`; or `[N, C, H', W']`.
        """
        x = self._pixels(input, shape)
        value = x if self.value_proj is None else self.value_proj(x)
        packed = self._predict(x)
        output = self._aggregate(value, packed, None, False)
        output = self._gated(output, value, output)
        if self.output_proj is not None:
            output = self.output_proj(output)
        if self._told(x):
            self.tell_hooks(x.permute(0, 3, 1, 2), *self._samples(*self._parts(packed)))
        return output.permute(0, 3, 1, 2) if self.channels_first else output.flatten(1, 2)

    def offsets(self, input: Tensor, shape: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` samples with, as hooks see it.

        Args:
            input, shape: as in `forward`.

        Returns:
            As `DCNv3.offsets`; the weights are raw.
        """
        return self._samples(*self._parts(self._predict(self._pixels(input, shape))))

    def _pixels(self, input: Tensor, shape: Any) -> Tensor:
        """Return the input as `[N, H, W, C]`."""
        if self.channels_first:
            x = check_pixels(input, self.channels, self.offset_mask.weight, f"[N, {self.channels}, H, W]")
            return self._large_enough(x.permute(0, 2, 3, 1))
        x = check_pixels(input, self.channels, self.offset_mask.weight, f"[N, L, {self.channels}]")
        return self._large_enough(x.unflatten(1, sides_of(x, shape)))

    def _predict(self, x: Tensor) -> Tensor:
        """Return `[N, H', W', G, 3K]`: in each group offsets, then weights."""
        warn_if_redrawn(self)
        if self.offset_mask_dw is not None:
            x = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        packed = self.offset_mask(self._at_outputs(x))
        return packed[..., : 3 * self.group * self.taps].unflatten(-1, (self.group, 3 * self.taps))

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        return packed[..., : 2 * self.taps].unflatten(-1, (self.taps, 2)), packed[..., 2 * self.taps :]
