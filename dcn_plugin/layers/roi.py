"""Layers that pool regions of interest (RoIs) as mmcv's do (Dai et al. 2017, Zhu et al. 2019).

Symbols: N batch, C channels, R RoIs, P_h x P_w bins of a RoI. RoIs are `[R, 5]` (batch index, x1, y1, x2, y2) or a
list of `[L_n, 4]` boxes for each image, in pixels of the image. Offsets have no unit: a bin moves by
`gamma * size of the RoI * offset`.

The classes have mmcv's names, arguments, state dict, **(x, y)** order of offset channels and sigmoid masks, so that its
checkpoints mean the same here. All others of the package have (y, x).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import deform_roi_pool
from ..ops._check import integer, number, require_dense
from ..ops._transforms import unrecorded
from ..reference.roi_pool import roi_frame
from ._start import warn_if_redrawn
from .arguments import Size, check_input, describe, factory_arguments, pair
from .branch import Branched, RoIs, branch, regions_of
from .samples import Regions, Samples
from .sampling import SamplingModule

# Symbolic tracing records these as calls: they look at shapes.
torch.fx.wrap("deform_roi_pool")
torch.fx.wrap("check_input")
torch.fx.wrap("_swap")


def _swap(offset: Tensor | None) -> Tensor | None:
    """Turn (x, y) into (y, x)."""
    return None if offset is None else _check_pairs(offset).flip(1)


@unrecorded
def _check_pairs(offset: Tensor) -> Tensor:
    require_dense("offset", offset)
    if not isinstance(offset, Tensor) or offset.dim() != 4 or offset.shape[1] != 2:
        got = list(offset.shape) if isinstance(offset, Tensor) else type(offset).__name__
        raise ValueError(f"offset: expected [R, 2, P_h, P_w], got {got}")
    return offset


class DeformRoIPool(SamplingModule):
    """Deformable RoI pooling whose offsets are an argument, with mmcv's name, arguments and **(x, y)** offsets.

    `out[r, c, p] = mean_s bilinear(input[n_r, c], corner_r + p * bin_r + s + gamma * size_r * offset[r, p])`

    over the samples s of a bin, without rounding. Without offsets it is torchvision's `roi_align(aligned=True)`.

    Args:
        output_size: bins, integer or (P_h, P_w).
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.
        sampling_ratio: samples along each side of a bin; 0 or -1: as many as the bin has pixels, rounded up.
        gamma: what an offset of 1 is of the RoI's size.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformRoIPool
        >>> layer = DeformRoIPool(output_size=2, sampling_ratio=1)
        >>> image = torch.arange(36.0).reshape(1, 1, 6, 6)  # grows by 1 to the right, by 6 downwards
        >>> rois = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]])
        >>> offset = torch.zeros(1, 2, 2, 2)
        >>> offset[:, 0] = 1.0  # channel 0 is x: all bins move by 0.1 * 4 pixels to the right
        >>> (layer(image, rois, offset) - layer(image, rois)).flatten()
        tensor([0.4000, 0.4000, 0.4000, 0.4000])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2, eq. 6.
    """

    offset_unit: ClassVar[Literal["pixels", "region"]] = "region"

    def __init__(
        self, output_size: Size, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size, 1)
        self.spatial_scale = number("spatial_scale", spatial_scale, positive=True)
        self.sampling_ratio = integer("sampling_ratio", sampling_ratio, -1)
        self.gamma = number("gamma", gamma, positive=True)

    @property
    def displacement_scale(self) -> float:
        return self.gamma

    def regions(self, samples: Samples) -> Regions:
        scale = self.spatial_scale
        return regions_of(samples, self.output_size, lambda rois: roi_frame(rois, scale, aligned=True))

    def _deform(self, input: Tensor, rois: RoIs, offset: Tensor | None, mask: Tensor | None = None) -> Tensor:
        output = self._pool(input, rois, offset, mask)
        if self._sampling_hooks is not None:
            self.tell_hooks(input, offset, mask, rois)
        return output

    def _pool(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pool with offsets in (y, x)."""
        return deform_roi_pool(
            input,
            rois,
            offset,
            mask,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
        )

    def forward(self, input: Tensor, rois: RoIs, offset: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            input: `[N, C, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.
            offset: `[R, 2, P_h, P_w]`, **(x, y)** as in mmcv, or None.

        Returns:
            `[R, C, P_h, P_w]`.
        """
        return self._deform(input, rois, _swap(offset))

    def extra_repr(self) -> str:
        return describe(self, ("output_size", "spatial_scale", "sampling_ratio", "gamma"))


class DeformRoIPoolPack(Branched, DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets, with mmcv's name, arguments and state dict.

    `offset = offset_fc(roi_align(input, rois))`, then `DeformRoIPool`. The branch has three fully connected
    layers, the last one zero at first: a fresh layer is RoIAlign. As in mmcv, the rows of the last one are the x of all
    bins, then the y; `offsets` returns (y, x).

    Args:
        output_size: bins, integer or (P_h, P_w).
        output_channels: C of the input.
        deform_fc_channels: width of the branch.
        spatial_scale, sampling_ratio, gamma: as in `DeformRoIPool`.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformRoIPoolPack
        >>> layer = DeformRoIPoolPack(output_size=7, output_channels=16, deform_fc_channels=32, spatial_scale=1 / 8)
        >>> rois = torch.tensor([[0, 8.0, 8.0, 40.0, 60.0], [1, 0.0, 0.0, 64.0, 64.0]])
        >>> layer(torch.rand(2, 16, 8, 8), rois).shape
        torch.Size([2, 16, 7, 7])

    Source: Dai et al. (2017), section 2.2, figure 3.
    """

    def __init__(
        self,
        output_size: Size,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = integer("output_channels", output_channels, 1)
        self.deform_fc_channels = integer("deform_fc_channels", deform_fc_channels, 1)
        factory = factory_arguments(device, dtype)
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = branch(bins * self.output_channels, self.deform_fc_channels, 2 * bins, factory)
        self.mask_fc: Any = None

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        """What `forward` pools with.

        Args:
            input: `[N, C, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.

        Returns:
            Offset `[R, 2, P_h, P_w]` in (y, x), in units of gamma times the RoI's size, and mask `[R, 1, P_h, P_w]`
            (None where the layer has none).
        """
        return self._offset(self._pooled(input, rois)), None

    def _pooled(self, input: Tensor, rois: RoIs) -> Tensor:
        check_input(input, self.output_channels, next(self.parameters()))
        warn_if_redrawn(self)
        return self._pool(input, rois).flatten(1)

    def _offset(self, pooled: Tensor) -> Tensor:
        return self.offset_fc(pooled).unflatten(1, (2, *self.output_size)).flip(1)

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:  # type: ignore[override]
        """Pool `[N, C, H, W]` to `[R, C, P_h, P_w]`."""
        return self._deform(input, rois, *self.offsets(input, rois))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self, ('output_channels', 'deform_fc_channels'))}"


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """`DeformRoIPoolPack` with a learnt weight for each bin, with mmcv's name, arguments and state dict.

    `out[r, c, p] = mask[r, p] * (what DeformRoIPoolPack gives)`, `mask = sigmoid(mask_fc(roi_align(input, rois)))`

    **The mask of a fresh layer is 0.5, as in mmcv, and halves the output**: mmcv's checkpoints were trained so. Put in
    RoIAlign's place in a trained model, it changes what the model computes; `MultiScaleDeformRoIPool` and
    `DeformPSRoIPoolPack` start at 1.

    Args:
        output_size .. dtype: as in `DeformRoIPoolPack`.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import ModulatedDeformRoIPoolPack
        >>> layer = ModulatedDeformRoIPoolPack(output_size=2, output_channels=4, deform_fc_channels=8)
        >>> offset, mask = layer.offsets(torch.rand(1, 4, 8, 8), [torch.tensor([[1.0, 1.0, 6.0, 6.0]])])
        >>> offset.shape, mask.flatten().tolist()
        (torch.Size([1, 2, 2, 2]), [0.5, 0.5, 0.5, 0.5])

    Source: Zhu et al., Deformable ConvNets v2 (2019), section 3.2, eq. 2.
    """

    def __init__(
        self,
        output_size: Size,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma,
            device=device, dtype=dtype,
        )  # fmt: skip
        bins = self.output_size[0] * self.output_size[1]
        factory = factory_arguments(device, dtype)
        self.mask_fc = branch(bins * self.output_channels, self.deform_fc_channels, bins, factory, layers=2)
        self.mask_fc.append(nn.Sigmoid())

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        pooled = self._pooled(input, rois)
        return self._offset(pooled), self.mask_fc(pooled).unflatten(1, (1, *self.output_size))

    offsets.__doc__ = DeformRoIPoolPack.offsets.__doc__
