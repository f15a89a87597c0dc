"""The parts of R-FCN between torchvision's proposal network and its RoI heads: position-sensitive maps and votes."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork

from ..layers import (
    DeformPSRoIPool,
    OffsetPredictor,
    PSRoIPool,
    Regions,
    Samples,
    SamplingModule,
    warn_if_redrawn,
)
from ..ops._transforms import unrecorded


class FirstMapRPN(RegionProposalNetwork):
    """torchvision's proposal network on the first of the maps only; the RoI heads read the last."""

    def forward(self, images: Any, features: dict[str, Tensor], targets: Any = None) -> Any:
        """Return proposals and losses as torchvision's."""
        return super().forward(images, OrderedDict(list(features.items())[:1]), targets)


class PSRoIMaps(SamplingModule):
    """Position-sensitive score and box maps of the last feature map, pooled per RoI (`box_roi_pool` of R-FCN).

    1x1 convolutions of `x = relu(conv(map))` give k*k*C score maps and k*k*4B box maps, where C counts the background
    and B is 1 (class-agnostic) or C. Bin (i, j) of the k x k bins of a RoI reads channels (d * k + i) * k + j.

    Deformable (Dai et al. 2017, figure 4): two more 1x1 convolutions, zero at first, give 2*k*k*C offset fields for the
    scores (2*k*k with `class_aware_offsets=False`) and 2*k*k for the boxes. Pooled position-sensitively, they are the
    normalised offsets: a bin moves by `offset_scale * offset * size of the RoI`.

    Input: maps by name, boxes [L_n, 4] in image pixels for each image, image sizes (unused, for torchvision's heads).
    Output: scores [R, C, k, k] and box deltas [R, 4B, k, k]; the votes of the bins, not yet averaged.
    A sampling hook sees the offsets of the scores, then, in a call of its own, those of the boxes.

    Sources: https://arxiv.org/abs/1605.06409 (R-FCN), https://arxiv.org/abs/1703.06211 (its deformable form).
    """

    speaks_for_inner = True
    offset_unit: ClassVar[Literal["pixels", "region"]] = "region"
    # The original trains them at the rate of the other layers.
    offset_branches: ClassVar[Mapping[str, float]] = {"score_offsets": 1.0, "box_offsets": 1.0}

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stride: int,
        group_size: int = 7,
        conv_channels: int = 1024,
        box_classes: int = 1,
        deformable: bool = False,
        class_aware_offsets: bool = True,
        samples_per_part: int = 4,
        offset_scale: float = 0.1,
    ) -> None:
        super().__init__()
        bins = group_size**2
        self.output_size = (group_size, group_size)
        self.offset_scale = offset_scale
        self.deformable = deformable
        self.conv = nn.Conv2d(in_channels, conv_channels, 1)
        self.scores = nn.Conv2d(conv_channels, bins * num_classes, 1)
        self.boxes = nn.Conv2d(conv_channels, bins * 4 * box_classes, 1)
        # The original starts all three at 0.01 and trains the first at three times the rate; this serves any width.
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        for conv in (self.scores, self.boxes):
            nn.init.normal_(conv.weight, std=0.01)
        for conv in (self.conv, self.scores, self.boxes):
            nn.init.constant_(conv.get_parameter("bias"), 0)
        self.score_offsets = self.box_offsets = None

        def pool(channels: int) -> nn.Module:
            geometry: dict[str, Any] = dict(output_dim=channels, group_size=group_size, output_size=group_size)
            geometry["spatial_scale"] = 1 / stride
            if not deformable:
                return PSRoIPool(**geometry)
            return DeformPSRoIPool(**geometry, samples_per_part=samples_per_part, offset_scale=offset_scale)

        self.score_pool, self.box_pool = pool(num_classes), pool(4 * box_classes)
        if deformable:
            classes = num_classes if class_aware_offsets else 1
            self.score_offsets = OffsetField(conv_channels, 2 * classes * bins, pool(2 * classes))
            self.box_offsets = OffsetField(conv_channels, 2 * bins, pool(2))

    def _features(self, features: dict[str, Tensor]) -> Tensor:
        return torch.relu(self.conv(list(features.values())[-1]))

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return the pooled votes for classes and boxes."""
        x = self._features(features)
        scores, deltas = self.scores(x), self.boxes(x)
        if self.score_offsets is None or self.box_offsets is None:
            return self.score_pool(scores, boxes), self.box_pool(deltas, boxes)
        of_scores, of_boxes = self.score_offsets(x, boxes), self.box_offsets(x, boxes)
        votes = self.score_pool(scores, boxes, of_scores), self.box_pool(deltas, boxes, of_boxes)
        for maps, offset, part in ((scores, of_scores, "scores"), (deltas, of_boxes, "boxes")):
            self.tell_hooks(maps, offset, None, boxes, image_shapes, part)
        return votes

    @property
    def displacement_scale(self) -> float:
        return self.offset_scale

    def regions(self, samples: Samples) -> Regions:
        """Return where the bins of one pooling lie."""
        pool: Any = self.score_pool if samples.part == "scores" else self.box_pool
        return pool.regions(samples)

    def offsets(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, None]:
        """Return what shifts the bins of the scores, [R, 2 * classes, k, k], (y, x) for each class, and no mask."""
        if self.score_offsets is None:
            raise ValueError("offsets: expected an R-FCN that was built with deformable=True, got a plain one")
        return self.score_offsets(self._features(features), boxes), None


class OffsetField(nn.Module):
    """A 1x1 convolution, zero at first, whose output is pooled into offsets [R, 2 * classes, k, k]."""

    def __init__(self, in_channels: int, out_channels: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = OffsetPredictor(in_channels, out_channels, 1)
        self.pool = pool

    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        """Return the offsets of every RoI."""
        warn_if_redrawn(self)
        return self.pool(self.conv(x), boxes)


class Vote(nn.Module):
    """Average over the bins: scores [R, C, k, k] to [R, C] and deltas [R, 4B, k, k] to [R, 4B] (`box_head`)."""

    def forward(self, pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits and box deltas."""
        return pooled[0].mean((2, 3)), pooled[1].mean((2, 3))


class ForEachClass(nn.Module):
    """Give every class the one set of deltas that class-agnostic boxes have (`box_predictor`)."""

    def forward(self, votes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [R, C] and deltas [R, 4C], as torchvision's RoI heads expect them."""
        logits, deltas = votes
        copies = _copies(logits, deltas)
        return logits, deltas if copies == 1 else deltas.repeat(1, copies)


@unrecorded
def _copies(logits: Tensor, deltas: Tensor) -> int:
    return 1 if deltas.shape[1] == 4 * logits.shape[1] else logits.shape[1]
