"""Position-sensitive pooling of regions of interest, plain and deformable (Dai et al. 2016 and 2017, Zhu et al. 2019).

Symbols: N batch, D output channels, k x k groups of channels, R RoIs, P_h x P_w bins of a RoI. RoIs are `[R, 5]` (batch
index, x1, y1, x2, y2) or a list of `[L_n, 4]` boxes for each image, in pixels of the image. Offsets are (y, x) and have
no unit: a bin moves by `offset_scale * size of the RoI * offset`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, Literal

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import deform_ps_roi_pool, ps_roi_pool
from ..ops._check import integer, number
from ..reference.roi_pool import ps_roi_frame
from ._start import ZeroLinear
from ._torchscript import NotScriptable
from .arguments import Size, activation, describe, divisible, factory_arguments, flag, mask_note, pair
from .branch import Branched, RoIs, branch, predict, regions_of
from .samples import Regions, Samples
from .sampling import SamplingModule

# Symbolic tracing records these as calls: they look at shapes.
torch.fx.wrap("deform_ps_roi_pool")
torch.fx.wrap("ps_roi_pool")


class PSRoIPool(NotScriptable, nn.Module):
    """Position-sensitive RoI pooling of R-FCN: bin (i, j) averages the pixels it touches, in channels of its own.

    `out[r, d, p] = mean_{q in bin p of r} input[n_r, (d * k + g_y) * k + g_x, q]`, `k = group_size`

    Args:
        output_dim: D, channels of the output.
        group_size: k; the input has `D * k * k` channels.
        output_size: bins, integer or (P_h, P_w); k in the paper.
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import PSRoIPool
        >>> layer = PSRoIPool(output_dim=21, group_size=3, output_size=3, spatial_scale=1 / 16)
        >>> layer(torch.rand(1, 21 * 9, 14, 14), torch.tensor([[0, 16.0, 32.0, 150.0, 100.0]])).shape
        torch.Size([1, 21, 3, 3])

    Source: Dai et al., R-FCN (2016), eq. 1.
    """

    #: No stand-in for a convolution: its forward takes RoIs.
    drop_in: bool = False

    def __init__(self, output_dim: int, group_size: int, output_size: Size, spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.output_dim = integer("output_dim", output_dim, 1)
        self.group_size = integer("group_size", group_size, 1)
        self.output_size = pair("output_size", output_size, 1)
        self.spatial_scale = number("spatial_scale", spatial_scale, positive=True)

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:
        """Pool `[N, D * k * k, H, W]` to `[R, D, P_h, P_w]`."""
        return ps_roi_pool(
            input,
            rois,
            output_dim=self.output_dim,
            group_size=self.group_size,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
        )

    def extra_repr(self) -> str:
        return describe(self, ("output_dim", "group_size", "output_size", "spatial_scale"))


class DeformPSRoIPool(PSRoIPool, SamplingModule):
    """Deformable position-sensitive RoI pooling whose offsets (and mask) are arguments of `forward`.

    `out[r, d, p] = mask[r, e, p] * mean_s bilinear(input[n_r, (d * k + g_y) * k + g_x], start_r + p * bin_r + s +`
    `offset_scale * size_r * offset[r, e, p])` with the class `e = d // (D / classes)`, in the original's semantics:
    rounded RoIs, samples outside the map left out of the mean. With `group_size=1` it is plain deformable RoI pooling
    as the original has it.

    Args:
        output_dim: D, channels of the output.
        group_size: k; the input has `D * k * k` channels.
        output_size: bins, integer or (P_h, P_w).
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.
        part_size: cells that offsets and masks are given for, integer or (part_h, part_w); None: one for each bin.
        samples_per_part: samples along each side of a bin.
        offset_scale: what an offset of 1 is of the RoI's size.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformPSRoIPool
        >>> layer = DeformPSRoIPool(output_dim=4, group_size=3, output_size=3, spatial_scale=1 / 16)
        >>> scores, rois = torch.rand(1, 4 * 9, 14, 14), torch.tensor([[0, 16.0, 32.0, 150.0, 100.0]])
        >>> layer(scores, rois, offset=torch.zeros(1, 2, 3, 3)).shape  # one class: offsets for all 4 channels
        torch.Size([1, 4, 3, 3])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2.
    """

    offset_unit: ClassVar[Literal["pixels", "region"]] = "region"

    def __init__(
        self,
        output_dim: int,
        group_size: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        part_size: Size | None = None,
        samples_per_part: int = 4,
        offset_scale: float = 0.1,
    ) -> None:
        super().__init__(output_dim, group_size, output_size, spatial_scale)
        self.part_size = self.output_size if part_size is None else pair("part_size", part_size, 1)
        self.samples_per_part = integer("samples_per_part", samples_per_part, 1)
        self.offset_scale = number("offset_scale", offset_scale, positive=True)

    @property
    def displacement_scale(self) -> float:
        return self.offset_scale

    def regions(self, samples: Samples) -> Regions:
        scale = self.spatial_scale
        return regions_of(samples, self.output_size, lambda rois: ps_roi_frame(rois, scale))

    def forward(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            input: `[N, D * k * k, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.
            offset: `[R, 2 * classes, part_h, part_w]`, (y, x) for each class, or None.
            mask: `[R, classes, part_h, part_w]` or None.

        Returns:
            `[R, D, P_h, P_w]`.
        """
        output = self._pool(input, rois, offset, mask)
        if self._sampling_hooks is not None:
            self.tell_hooks(input, offset, mask, rois)
        return output

    def _pool(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return deform_ps_roi_pool(
            input,
            rois,
            offset,
            mask,
            output_dim=self.output_dim,
            group_size=self.group_size,
            output_size=self.output_size,
            part_size=self.part_size,
            samples_per_part=self.samples_per_part,
            spatial_scale=self.spatial_scale,
            offset_scale=self.offset_scale,
        )

    def extra_repr(self) -> str:
        more = describe(self, ("part_size", "samples_per_part", "offset_scale"))
        return f"{super().extra_repr()}, {more}"


class DeformPSRoIPoolPack(Branched, DeformPSRoIPool):
    """Deformable position-sensitive RoI pooling that predicts its offsets from what it pools without them.

    `offset = offset_fc(pool(input, rois))`; with `modulated`, `mask = 2 * sigmoid(mask_fc(h))` on the last hidden
    layer h of `offset_fc`. The last layers are zero at first: a fresh layer is `DeformPSRoIPool` without
    offsets. The rows of `offset_fc`'s last layer are, for each class, the y of all cells, then the x.

    Args:
        output_dim .. offset_scale: as in `DeformPSRoIPool`.
        deform_fc_channels: width of the branch.
        offset_classes: classes with offsets (and masks) of their own; divides `output_dim`.
        modulated: learn a weight for each cell, too.
        mask_activation: `'2*sigmoid'` (mask 1 at first) or `'sigmoid'` (0.5 at first: what weights trained with
            earlier implementations expect).
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    `offset_mask_fc.*` of CharlesShang's `DCNPooling` loads into a modulated layer with one class: its last layer is
    split, and its (x, y) turned to (y, x). Its masks are sigmoid. `offset_fc` of mmdetection 1.x'
    `DeformRoIPoolingPack` has this layer's names, but (x, y) in its last layer: turn them before loading.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformPSRoIPoolPack
        >>> layer = DeformPSRoIPoolPack(4, group_size=3, output_size=3, deform_fc_channels=16, modulated=True)
        >>> offset, mask = layer.offsets(torch.rand(1, 4 * 9, 14, 14), torch.tensor([[0, 1.0, 2.0, 12.0, 10.0]]))
        >>> offset.shape, mask.shape, bool((mask == 1).all())
        (torch.Size([1, 2, 3, 3]), torch.Size([1, 1, 3, 3]), True)

    Source: Dai et al. (2017), section 2.2; Zhu et al. (2019), section 3.2.
    """

    def __init__(
        self,
        output_dim: int,
        group_size: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        part_size: Size | None = None,
        samples_per_part: int = 4,
        offset_scale: float = 0.1,
        deform_fc_channels: int = 1024,
        offset_classes: int = 1,
        modulated: bool = False,
        mask_activation: str = "2*sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(output_dim, group_size, output_size, spatial_scale, part_size, samples_per_part, offset_scale)
        self.deform_fc_channels = integer("deform_fc_channels", deform_fc_channels, 1)
        self.offset_classes = integer("offset_classes", offset_classes, 1)
        divisible("output_dim", self.output_dim, "offset_classes", self.offset_classes)
        self.modulated = flag("modulated", modulated)
        activation(mask_activation)
        self.mask_activation = mask_activation
        factory = factory_arguments(device, dtype)
        inputs = self.output_dim * self.output_size[0] * self.output_size[1]
        cells = self.offset_classes * self.part_size[0] * self.part_size[1]
        self.offset_fc = branch(inputs, self.deform_fc_channels, 2 * cells, factory)
        self.mask_fc = ZeroLinear(self.deform_fc_channels, cells, **factory) if self.modulated else None

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        """What `forward` pools with.

        Args:
            input: `[N, D * k * k, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.

        Returns:
            Offset `[R, 2 * classes, part_h, part_w]`, (y, x) for each class, in units of
            offset_scale times the RoI's size, and mask `[R, classes, part_h, part_w]` (None unless `modulated`).
        """
        offset, mask = predict(self, self._pool(input, rois))
        offset = offset.unflatten(1, (2 * self.offset_classes, *self.part_size))
        return offset, None if mask is None else mask.unflatten(1, (self.offset_classes, *self.part_size))

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:  # type: ignore[override]
        """Pool `[N, D * k * k, H, W]` to `[R, D, P_h, P_w]`."""
        return super().forward(input, rois, *self.offsets(input, rois))

    def former_keys(self, state: MutableMapping[str, Any], prefix: str) -> dict[str, str]:
        """Rename and split CharlesShang's `offset_mask_fc`, where the layer is modulated and has one class.

        Its last layer has the x of all cells, the y, then the mask: here the y and x of `offset_fc`, and `mask_fc`.
        """
        renamed: dict[str, str] = {}
        if not self.modulated or self.offset_classes != 1:
            return renamed
        cells = self.part_size[0] * self.part_size[1]
        for kind in ("weight", "bias"):
            for index in (0, 2, 4):
                old, new = (f"{prefix}{fc}.{index}.{kind}" for fc in ("offset_mask_fc", "offset_fc"))
                if old not in state or new in state or (index == 4 and len(state[old]) != 3 * cells):
                    continue
                value = state.pop(old)
                renamed[old] = new
                if index == 4:
                    x, y, mask = value.split(cells)
                    value = torch.cat((y, x))
                    state[f"{prefix}mask_fc.{kind}"] = mask
                    renamed[old] += f" and {prefix}mask_fc.{kind}"
                state[new] = value
        return renamed

    def former_note(self, renamed: Mapping[str, str]) -> str:
        return mask_note("sigmoid", self.mask_activation)

    def extra_repr(self) -> str:
        more = describe(self, ("deform_fc_channels", "offset_classes", "modulated"))
        mask = f", mask_activation={self.mask_activation!r}" if self.modulated else ""
        return f"{super().extra_repr()}, {more}{mask}"
