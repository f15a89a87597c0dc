"""Detections in COCO's results format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl

from ..writer import EpochWriter


class DetectionWriter(EpochWriter):
    """Write `detections.json` after prediction: COCO's results format, one file per process if several.

    A list of `dict(image_id, category_id, bbox=[x, y, width, height], score, file_name)`, which
    `pycocotools.coco.COCO.loadRes` reads. `category_id` is that of the training data.
    """

    filename = "detections.json"

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Sequence
    ) -> None:
        names = trainer.datamodule.filenames("predict") if hasattr(trainer.datamodule, "filenames") else {}
        ids = getattr(pl_module, "category_ids", None)
        results = []
        for image in (image for batch in predictions for image in batch):
            boxes = image["boxes"].float().cpu()
            boxes[:, 2:] -= boxes[:, :2]
            labels, scores = image["labels"].tolist(), image["scores"].tolist()
            for label, box, score in zip(labels, boxes.tolist(), scores, strict=True):
                result = dict(image_id=image["image_id"], category_id=ids[label - 1] if ids else label, bbox=box)
                results.append(result | dict(score=score, file_name=names.get(image["image_id"])))
        self._path(trainer).write_text(json.dumps(results))
