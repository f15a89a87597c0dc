"""torchvision's RoI heads, with losses that are numbers where a training batch leaves nothing to classify."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads


class BoxHeads(RoIHeads):
    """torchvision's `RoIHeads`; a training batch without boxes whose proposals all fell away has losses of 0.

    torchvision takes means over no samples there, which are NaN. The losses are sums over the (empty) outputs instead,
    so every parameter of the heads has a gradient of 0, as several processes need it to agree.
    """

    _samples = 0

    def select_training_samples(self, proposals: list[Tensor], targets: Any) -> tuple:
        """Return what torchvision's does, and note how much it is."""
        chosen = super().select_training_samples(proposals, targets)
        self._samples = sum(len(boxes) for boxes in chosen[0])
        return chosen

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Any = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and losses as torchvision's."""
        detections, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training and not self._samples:
            none = [boxes[:0] for boxes in proposals]
            scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, none, image_shapes)))
            losses |= dict(loss_classifier=scores.sum(), loss_box_reg=deltas.sum())
        return detections, losses


# torchvision's names of the arguments that follow the three modules, in order.
_ARGUMENTS = (
    "box_fg_iou_thresh", "box_bg_iou_thresh", "box_batch_size_per_image", "box_positive_fraction", "bbox_reg_weights",
    "box_score_thresh", "box_nms_thresh", "box_detections_per_img",
)  # fmt: skip


def box_heads(pool: nn.Module, head: nn.Module, predictor: nn.Module, options: Mapping[str, Any]) -> BoxHeads:
    """Return the RoI heads of a detector with these parts and torchvision's options."""
    return BoxHeads(pool, head, predictor, *(options[name] for name in _ARGUMENTS))
