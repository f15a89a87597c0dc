"""Alignment of video frames: convolutions that sample one frame where another one, or optical flow, says.

Names, arguments and state dicts are those of BasicSR's EDVR and BasicVSR++, so that their code and weights come over.
Symbols: N batch, C channels, O outputs, K = kh*kw taps, G offset groups, H x W the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..ops._check import integer, number, same_dtype
from ..ops._transforms import unrecorded
from ._start import OffsetPredictor
from .arguments import check_feature, check_input, describe, divisible, factory_arguments, one_name
from .conv import DCNv2
from .sampling_conv import SamplingConv

SLOPE = 0.1  # of every leaky ReLU in EDVR and BasicVSR++


@unrecorded
def _check_beside(given: Any, name: str, channels: int, x: Tensor, or_float32: bool = False) -> Tensor:
    """Return `given` if it is a map of so many channels with the images, the size and the type of the input."""
    check_input(given, channels, x, name)
    wanted = [x.shape[0], channels, *x.shape[2:]]
    if list(given.shape) != wanted:
        raise ValueError(f"{name}: expected {wanted} beside an input of {list(x.shape)}, got {list(given.shape)}")
    same_dtype(given, name, x, or_float32)
    return given


def _along_flows(raw: Tensor, flow_1: Tensor, flow_2: Tensor, reach: float) -> Tensor:
    """Return offsets `[N, 2*G*K, H, W]`, (y, x): bounded ones around a flow, (x, y), for each half of the groups."""
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))  # half precision would round flows to fractions of it
    flows = torch.stack((flow_1.flip(1).to(raw.dtype), flow_2.flip(1).to(raw.dtype)), 1)
    halves = (reach * torch.tanh(raw)).unflatten(1, (2, -1, 2))
    return (halves + flows[:, :, None]).flatten(1, 3)


# Symbolic tracing records these as calls: they look at shapes and types.
for _name in ("check_input", "_check_beside", "_along_flows"):
    torch.fx.wrap(_name)


class DCNv2Pack(DCNv2):
    """Modulated deformable convolution of a frame whose offsets and masks another map predicts (EDVR).

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * bilinear(x, p0 * stride - padding + k * dilation + offset_k(p0))`,
    `offset, mask = conv_offset(feat)`, masks sigmoid, as in BasicSR's `DCNv2Pack` and mmagic's `ModulatedDCNPack`

    It is `DCNv2` with their masks, arguments and call. A fresh layer is half a convolution, as all masks are 0.5.

    Args:
        in_channels .. dtype: as in `DeformConv2d` (`nn.Conv2d`'s arguments in its order); `feat` has as many channels.
        offset_groups: G, channel groups with offsets and masks of their own; divides C.
        deformable_groups, deform_groups: the same, as BasicSR and mmagic call it.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv2Pack
        >>> layer = DCNv2Pack(16, 16, 3, padding=1, deformable_groups=8)
        >>> layer(torch.rand(1, 16, 6, 6), torch.rand(1, 16, 6, 6)).shape
        torch.Size([1, 16, 6, 6])

    Source: Wang et al., EDVR: Video Restoration with Enhanced Deformable Convolutional Networks (2019), section 3.2.
    """

    drop_in = False  # a model that calls a convolution has no second map for it
    feature_name = "feat"

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
        deformable_groups: int | None = None,
        deform_groups: int | None = None,
    ) -> None:
        offset_groups = one_name(
            "offset_groups", offset_groups, 1, deformable_groups=deformable_groups, deform_groups=deform_groups
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups, mask_activation="sigmoid", offset_channels=in_channels,
        )  # fmt: skip

    def offsets(self, x: Tensor, feat: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """What `forward` samples with.

        Args:
            x: `[N, C, H, W]`, what is sampled.
            feat: `[N, C, H, W]`, what offsets and masks are predicted from.

        Returns:
            Offset `[N, 2*G*K, H', W']` in pixels, (y, x) per tap, and mask `[N, G*K, H', W']`.
        """
        return super().offsets(x, feat)


class SecondOrderDeformableAlignment(DCNv2):
    """Modulated deformable convolution of two earlier frames along optical flow (BasicVSR++).

    `out(p0) = bias + sum_k weight_k * mask_k(p0) * bilinear(x, p0 - padding + k * dilation + offset_k(p0))`,
    `offset = max_residue_magnitude * tanh(raw) + flow`, `raw, mask = conv_offset(cat(extra_feat, flow_1, flow_2))`

    `x` is both frames along the channels, the one before first; `flow_1` moves the first half of the offset groups and
    `flow_2` the other one. **Flows are (x, y)**, in pixels, from each pixel of the frame in hand to where it was, as in
    the official code and its weights; offsets are (y, x), like all of this package. `conv_offset` is four 3x3
    convolutions with leaky ReLUs between them, the last zero at first: a fresh layer samples along the flows, with all
    masks 0.5.

    Args:
        in_channels: C, of both frames together.
        out_channels: O, also of each of the three maps in `extra_feat`.
        kernel_size: taps, integer or (height, width).
        stride: 1, as there is a flow for each pixel.
        padding: what keeps the size of the map; `'same'` does.
        dilation .. dtype: as in `DeformConv2d`.
        offset_groups: G, channel groups with offsets and masks of their own; even, divides C.
        max_residue_magnitude: how far from the flow a tap may sample, in pixels.
        deformable_groups, deform_groups: G, as BasicSR and mmagic call it.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import SecondOrderDeformableAlignment
        >>> layer = SecondOrderDeformableAlignment(16, 8, 3, padding=1, deformable_groups=4)
        >>> frames, around, flow = torch.rand(1, 16, 6, 6), torch.rand(1, 24, 6, 6), torch.zeros(1, 2, 6, 6)
        >>> layer(frames, around, flow, flow).shape
        torch.Size([1, 8, 6, 6])

    Source: Chan et al., BasicVSR++: Improving Video Super-Resolution with Enhanced Propagation and Alignment (2022),
    section 3.2.
    """

    drop_in = False  # as there
    feature_name = "extra_feat"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset_groups: int = 16,
        max_residue_magnitude: float = 10,
        deformable_groups: int | None = None,
        deform_groups: int | None = None,
    ) -> None:
        offset_groups = one_name(
            "offset_groups", offset_groups, 16, deformable_groups=deformable_groups, deform_groups=deform_groups
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups, mask_activation="sigmoid",
            offset_channels=3 * integer("out_channels", out_channels, 1) + 4,
        )  # fmt: skip
        if self.stride != (1, 1):
            raise ValueError(f"stride: expected 1, as there is a flow for each pixel, got {self.stride}")
        if self.window.output_size(64, 64) != (64, 64):
            raise ValueError(f"padding: expected what keeps the size of the map, as 'same' does, got {padding!r}")
        divisible("offset_groups", self.offset_groups, "the number of flows", 2)
        self.max_residue_magnitude = number("max_residue_magnitude", max_residue_magnitude, positive=True)
        factory, steps, reads = factory_arguments(device, dtype), [], self.conv_offset.in_channels
        for _ in range(3):
            steps += [nn.Conv2d(reads, self.out_channels, 3, padding=1, **factory), nn.LeakyReLU(SLOPE, inplace=True)]
            reads = self.out_channels
        self.conv_offset = nn.Sequential(*steps, OffsetPredictor(reads, self._outputs, 3, padding=1, **factory))

    @property
    def _uneven_padding(self) -> tuple[int, ...]:
        return ()  # its branch keeps the size of what it reads, whatever the kernel's

    def offsets(  # type: ignore[override]
        self, x: Tensor, extra_feat: Tensor, flow_1: Tensor, flow_2: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` samples with.

        Args:
            x: `[N, C, H, W]`, the two frames that are sampled.
            extra_feat: `[N, 3*O, H, W]`: the frame before along `flow_1`, the frame in hand, the other along `flow_2`.
            flow_1, flow_2: `[N, 2, H, W]`, **(x, y)** in pixels, of x's type or float32.

        Returns:
            Offset `[N, 2*G*K, H, W]` in pixels, (y, x) per tap, flows included, in float32 at least; and mask
            `[N, G*K, H, W]`.
        """
        x = check_input(x, self.in_channels, self._parameters.get("weight"))
        extra_feat = _check_beside(extra_feat, "extra_feat", 3 * self.out_channels, x)
        flow_1, flow_2 = _check_beside(flow_1, "flow_1", 2, x, True), _check_beside(flow_2, "flow_2", 2, x, True)
        maps = torch.cat([extra_feat, flow_1.to(extra_feat.dtype), flow_2.to(extra_feat.dtype)], dim=1)
        raw, mask = super().offsets(x, maps)
        return _along_flows(raw, flow_1, flow_2, self.max_residue_magnitude), mask

    def multiply_adds(self, output: Tensor) -> int:
        return SamplingConv.multiply_adds(self, output)  # all of its branch works at the size of the result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_residue_magnitude={self.max_residue_magnitude}"


@unrecorded
def _check_pyramid(given: Any, name: str, channels: int, like: Sequence[Tensor], parameter: Tensor) -> list[Tensor]:
    """Return three maps, each half as large as the one before, if `given` is that, each like those of `like`."""
    if isinstance(given, Tensor) or not isinstance(given, Sequence) or len(given) != 3:
        got = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise ValueError(f"{name}: expected a list of three maps, the largest first, got {got}")
    for level, each in enumerate(given):
        place = f"{name}[{level}]"
        if like:
            _check_beside(each, place, channels, like[level])
            continue
        check_feature(each, channels, parameter, given[0] if level else each, place)
        n, _, height, width = given[0].shape
        if height % 4 or width % 4:
            raise ValueError(f"{name}[0]: expected sides that are multiples of 4, got {height} x {width}")
        wanted = [n, channels, height >> level, width >> level]
        if list(each.shape) != wanted:
            raise ValueError(f"{place}: expected {wanted}, half as large as the level before, got {list(each.shape)}")
    return list(given)


torch.fx.wrap("_check_pyramid")


class PCDAlignment(nn.Module):
    """Alignment of a frame to another one, level by level of a pyramid, and once more at the end (EDVR's PCD).

    At each level, from the smallest map on, `conv(cat(neighbour, reference))` and the offsets' features of the level
    below, twice as large and doubled, tell a `DCNv2Pack` where to sample the neighbour; a fourth aligns the result.
    Names and state dict are those of BasicSR's module: `offset_conv1.l1`, `dcn_pack.l1`, `feat_conv.l1`, `cas_dcnpack`.
    Its four `DCNv2Pack`s are what hooks, pictures and learning rates see.

    Args:
        num_feat: C, channels of every map.
        deformable_groups: G, of every `DCNv2Pack`; divides C.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import PCDAlignment
        >>> align = PCDAlignment(16, deformable_groups=4)
        >>> neighbour, reference = ([torch.rand(1, 16, side, side) for side in (16, 8, 4)] for _ in range(2))
        >>> align(neighbour, reference).shape
        torch.Size([1, 16, 16, 16])

    Source: Wang et al., EDVR: Video Restoration with Enhanced Deformable Convolutional Networks (2019), section 3.2.
    """

    def __init__(
        self,
        num_feat: int = 64,
        deformable_groups: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_feat = integer("num_feat", num_feat, 1)
        self.deformable_groups = integer("deformable_groups", deformable_groups, 1)
        divisible("num_feat", self.num_feat, "deformable_groups", self.deformable_groups)
        factory = factory_arguments(device, dtype)

        def conv(maps: int) -> nn.Conv2d:
            return nn.Conv2d(maps * self.num_feat, self.num_feat, 3, padding=1, **factory)

        def pack() -> DCNv2Pack:
            return DCNv2Pack(
                self.num_feat, self.num_feat, 3, padding=1, offset_groups=self.deformable_groups, **factory
            )

        levels = ("l3", "l2", "l1")
        self.offset_conv1 = nn.ModuleDict({level: conv(2) for level in levels})
        self.offset_conv2 = nn.ModuleDict({level: conv(1 if level == "l3" else 2) for level in levels})
        self.offset_conv3 = nn.ModuleDict({level: conv(1) for level in levels[1:]})
        self.dcn_pack = nn.ModuleDict({level: pack() for level in levels})
        self.feat_conv = nn.ModuleDict({level: conv(2) for level in levels[1:]})
        self.cas_offset_conv1, self.cas_offset_conv2 = conv(2), conv(1)
        self.cas_dcnpack = pack()
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.lrelu = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, nbr_feat_l: Sequence[Tensor], ref_feat_l: Sequence[Tensor]) -> Tensor:
        """Align a neighbouring frame to the reference.

        Args:
            nbr_feat_l: three maps of the neighbour, `[N, C, H, W]`, `[N, C, H/2, W/2]` and `[N, C, H/4, W/4]`.
            ref_feat_l: those of the reference.

        Returns:
            `[N, C, H, W]`, the neighbour where the reference is.
        """
        first = self.cas_offset_conv1.weight
        neighbours = _check_pyramid(nbr_feat_l, "nbr_feat_l", self.num_feat, (), first)
        references = _check_pyramid(ref_feat_l, "ref_feat_l", self.num_feat, neighbours, first)
        feat, offset = self._level("l3", neighbours[2], references[2])
        feat, offset = self._level("l2", neighbours[1], references[1], self.lrelu(feat), offset)
        feat, _ = self._level("l1", neighbours[0], references[0], self.lrelu(feat), offset)
        offset = self.lrelu(self.cas_offset_conv1(torch.cat([feat, references[0]], dim=1)))
        return self.lrelu(self.cas_dcnpack(feat, self.lrelu(self.cas_offset_conv2(offset))))

    def _level(
        self, level: str, neighbour: Tensor, reference: Tensor, below: Tensor | None = None, moves: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the aligned map of one level and the features of its offsets, from those of the level below."""
        offset = self.lrelu(self.offset_conv1[level](torch.cat([neighbour, reference], dim=1)))
        if below is None or moves is None:
            offset = self.lrelu(self.offset_conv2[level](offset))
            return self.dcn_pack[level](neighbour, offset), offset
        # A pixel of the level below is two of this one, and so is each move.
        offset = self.lrelu(self.offset_conv2[level](torch.cat([offset, 2 * self.upsample(moves)], dim=1)))
        offset = self.lrelu(self.offset_conv3[level](offset))
        feat = self.dcn_pack[level](neighbour, offset)
        return self.feat_conv[level](torch.cat([feat, self.upsample(below)], dim=1)), offset

    def extra_repr(self) -> str:
        return describe(self, ("num_feat", "deformable_groups"))
