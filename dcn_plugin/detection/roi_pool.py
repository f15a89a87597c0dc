"""Deformable RoI pooling on a feature pyramid, in place of torchvision's `MultiScaleRoIAlign`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, box_area
from torchvision.ops.poolers import _setup_scales

from ..layers import Regions, Samples, ZeroLinear, regions_of
from ..layers.arguments import Size, activation, describe, factory_arguments, flag, pair
from ..layers.branch import Branched, branch, predict
from ..ops import _check, deform_roi_pool
from ..ops._layout import is_channels_last
from ..ops._transforms import is_tracing, unrecorded
from ..reference.roi_pool import Frame, roi_frame

# Symbolic tracing records these as calls: they look at shapes and values.
for _name in ("_scales_of", "_maps", "_assign", "_pool"):
    torch.fx.wrap(_name)

# Numbers that are settled at the first call, not part of a graph.
_scales_of = unrecorded(_setup_scales)


class MultiScaleDeformRoIPool(Branched, MultiScaleRoIAlign):
    """Deformable RoI pooling on a feature pyramid, for the `box_roi_pool` of torchvision's detectors.

    Each RoI is pooled from the level that its size belongs to (as in `MultiScaleRoIAlign`), twice: plainly, for the
    branch that predicts offsets, then with them:

    `out[r, c, p] = mask[r, p] * mean_s bilinear(x_l[n_r, c], corner_r + p * bin_r + s + gamma * size_r *`
    `offset[r, p])`

    with `offset = offset_fc(roi_align(x_l, r))` and, if `modulated`, `mask = 2 * sigmoid(mask_fc(h))` on the last
    hidden layer h of `offset_fc`. All levels share the branch. Its last layers are zero at first: a fresh layer
    computes what `MultiScaleRoIAlign` does.

    Args:
        featmap_names: names of the feature maps to pool from, finest first.
        output_size: bins, integer or (P_h, P_w).
        sampling_ratio: samples along each side of a bin; 0 or -1: as many as the bin has pixels, rounded up.
        in_channels: C of every feature map.
        canonical_scale: side in pixels of a RoI that belongs to level `canonical_level`.
        canonical_level: that level; level k is 2^k times smaller than the image.
        deform_fc_channels: width of the branch.
        gamma: what an offset of 1 is of the RoI's size.
        modulated: learn a weight for each bin, too.
        aligned: shift RoIs by half a pixel, as is right where pixel centres have whole numbers; `MultiScaleRoIAlign`
            does not.
        mask_activation: `'2*sigmoid'` (mask 1 at first) or `'sigmoid'` (0.5 at first).
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.detection import MultiScaleDeformRoIPool
        >>> pool = MultiScaleDeformRoIPool(["0", "1"], 7, 2, in_channels=8, deform_fc_channels=32)
        >>> maps = {"0": torch.rand(1, 8, 32, 32), "1": torch.rand(1, 8, 16, 16), "pool": torch.rand(1, 8, 8, 8)}
        >>> boxes = [torch.tensor([[4.0, 4.0, 40.0, 60.0], [0.0, 0.0, 128.0, 128.0]])]
        >>> pool(maps, boxes, [(128, 128)]).shape
        torch.Size([2, 8, 7, 7])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2; Zhu et al., Deformable ConvNets v2
    (2019), section 3.2; levels: Lin et al., Feature Pyramid Networks (2017), eq. 1.
    """

    # Of torchvision's class.
    featmap_names: list[str]
    output_size: tuple[int, int]
    sampling_ratio: int
    canonical_scale: int
    canonical_level: int
    scales: Any
    map_levels: Any

    __repr__ = nn.Module.__repr__  # torchvision's leaves out the branch

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: Size,
        sampling_ratio: int,
        *,
        in_channels: int,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        deform_fc_channels: int = 1024,
        gamma: float = 0.1,
        modulated: bool = False,
        aligned: bool = False,
        mask_activation: str = "2*sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        names = [] if isinstance(featmap_names, str) or not isinstance(featmap_names, Sequence) else list(featmap_names)
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"featmap_names: expected a sequence of names of feature maps, got {featmap_names!r}")
        bins = pair("output_size", output_size, 1)
        super().__init__(
            names,
            bins,
            _check.integer("sampling_ratio", sampling_ratio, -1),
            canonical_scale=_check.integer("canonical_scale", canonical_scale, 1),
            canonical_level=_check.integer("canonical_level", canonical_level, 0),
        )
        self.in_channels = _check.integer("in_channels", in_channels, 1)
        self.deform_fc_channels = _check.integer("deform_fc_channels", deform_fc_channels, 1)
        self.gamma = _check.number("gamma", gamma, positive=True)
        self.modulated = flag("modulated", modulated)
        self.aligned = flag("aligned", aligned)
        activation(mask_activation)
        self.mask_activation = mask_activation
        factory = factory_arguments(device, dtype)
        cells = bins[0] * bins[1]
        self.offset_fc = branch(cells * self.in_channels, self.deform_fc_channels, 2 * cells, factory)
        self.mask_fc = ZeroLinear(self.deform_fc_channels, cells, **factory) if self.modulated else None

    def offsets(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` pools with.

        Args:
            x, boxes, image_shapes: as in `forward`.

        Returns:
            Offset `[R, 2, P_h, P_w]` in (y, x), in units of gamma times the RoI's size, and mask `[R, 1, P_h, P_w]`
            (None unless `modulated`), in the order of the boxes.
        """
        return self._offsets(self._levels(x, boxes, image_shapes))

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool, as `MultiScaleRoIAlign` does.

        Args:
            x: feature maps by name, `[N, C, H_l, W_l]` each; others than `featmap_names` are left alone.
            boxes: `[L_n, 4]` (x1, y1, x2, y2) for each image, in pixels of the image; L_n may be 0. One that is
                inside out along one axis (x2 < x1) is pooled from the finest map.
            image_shapes: (height, width) of each image. The first call takes the scale of each level from them.

        Returns:
            `[sum of L_n, C, P_h, P_w]`, in the order of the boxes.
        """
        levels = self._levels(x, boxes, image_shapes)
        offset, mask = self._offsets(levels)
        output = self._pool(levels, offset, mask)
        self.tell_hooks(x, offset, mask, boxes, image_shapes)
        return output

    @property
    def displacement_scale(self) -> float:
        return self.gamma

    def regions(self, samples: Samples) -> Regions:
        """Return where the bins of one call lie; each region is pooled from the map of its level."""
        levels = self._levels(cast(Any, samples.input), samples.rois, samples.image_sizes)

        def frame(rois: Tensor) -> Frame:
            every = [roi_frame(rois, scale, self.aligned) for scale in levels.scales]
            found = every[0]
            for of_level, members in zip(every, levels.members, strict=False):
                found.start[members.cpu()] = of_level.start[members.cpu()]
                found.size[members.cpu()] = of_level.size[members.cpu()]
            return found

        return regions_of(samples, self.output_size, frame)

    def _levels(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> _Levels:
        maps = _maps(x, self.featmap_names, self.in_channels)
        scales, mapper = self.scales, self.map_levels
        tracing = isinstance(maps, torch.fx.Proxy)
        if scales is None or mapper is None or tracing:
            scales, mapper = _scales_of(maps, image_shapes, self.canonical_scale, self.canonical_level)
            if not tracing:  # what a graph computes is not for this module to keep
                self.scales, self.map_levels = scales, mapper
        return _assign(maps, boxes, scales, mapper)

    def _offsets(self, levels: _Levels) -> tuple[Tensor, Tensor | None]:
        offset, mask = predict(self, self._pool(levels))
        return offset.unflatten(1, (2, *self.output_size)), (
            None if mask is None else mask.unflatten(1, (1, *self.output_size))
        )

    def _pool(self, levels: _Levels, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return _pool(levels, offset, mask, self.output_size, self.sampling_ratio, self.gamma, self.aligned)

    def extra_repr(self) -> str:
        names = (
            "featmap_names", "output_size", "sampling_ratio", "in_channels", "canonical_scale", "canonical_level",
            "deform_fc_channels", "gamma", "modulated", "aligned",
        )  # fmt: skip
        mask = f", mask_activation={self.mask_activation!r}" if self.modulated else ""
        return describe(self, names) + mask


class _Levels(NamedTuple):
    """Feature maps and RoIs; where there are several maps, the numbers of the RoIs that belong to each."""

    maps: list[Tensor]
    scales: list[float]
    rois: Tensor
    members: list[Tensor]


@unrecorded
def _maps(x: dict[str, Tensor], names: list[str], channels: int) -> list[Tensor]:
    maps = [value for name, value in x.items() if name in names]
    if not maps:
        raise ValueError(f"x: expected feature maps named {names}, got {list(x)}")
    for name, value in x.items():
        if name not in names:
            continue
        _check.tensor(value, f"x[{name!r}]", 4, f"[N, {channels}, H, W]")
        if value.shape[1] != channels:
            raise ValueError(f"x: expected feature maps [N, {channels}, H, W], got {list(value.shape)}")
        _check.same_device(value, f"x[{name!r}]", maps[0])
    return maps


def _level_of(boxes: list[Tensor], mapper: Any) -> Tensor:
    """The number of the level of each box, by torchvision's rule."""
    if not is_tracing():
        return mapper(boxes)
    with warnings.catch_warnings():
        # torchvision's mapper makes a tensor of a constant, as which the trace keeps it.
        warnings.filterwarnings("ignore", "torch.tensor results are registered as constants")
        return mapper(boxes)


def _assign(maps: list[Tensor], boxes: list[Tensor], scales: list[float], mapper: Any) -> _Levels:
    _check.boxes(boxes, "boxes", maps[0])
    boxes = list(boxes) or [maps[0].new_empty(0, 4)]  # an empty batch
    image = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    rois = torch.cat([torch.cat(image), torch.cat(boxes)], 1)
    if len(maps) == 1:
        return _Levels(maps, scales, rois, [])
    # Inside out along one axis, a box has an area below 0, whose root is no number: it belongs where one without area
    # does. Boxes that are not finite have no level; left out here, they would shift the results of the others.
    sized = [torch.where(box_area(b)[:, None] < 0, 0, b) for b in boxes]
    number = _level_of(sized, mapper).clamp(0, len(maps) - 1)
    members = [torch.where(number == level)[0] for level in range(len(maps))]
    return _Levels(maps, scales, rois, members)


def _pool(
    levels: _Levels,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: tuple[int, int],
    sampling_ratio: int,
    gamma: float,
    aligned: bool,
) -> Tensor:
    """Pool every RoI from its map, in the order of the RoIs."""
    options: dict[str, Any] = dict(output_size=output_size, sampling_ratio=sampling_ratio, gamma=gamma, aligned=aligned)
    if not levels.members:
        return deform_roi_pool(levels.maps[0], levels.rois, offset, mask, spatial_scale=levels.scales[0], **options)
    parts = []
    for x, scale, own in zip(levels.maps, levels.scales, levels.members, strict=True):
        shift, factor = (None if t is None else t[own] for t in (offset, mask))
        parts.append(deform_roi_pool(x, levels.rois[own], shift, factor, spatial_scale=scale, **options))
    pooled = torch.cat(parts)
    layout = torch.channels_last if is_channels_last(levels.maps[0]) else torch.contiguous_format
    # A copy, because the gradient of an index would be summed up, in any order.
    return torch.empty_like(pooled, memory_format=layout).index_copy_(0, torch.cat(levels.members), pooled)
