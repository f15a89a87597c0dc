"""Lightning callbacks that know deformable layers, and a writer of predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from dcn_plugin.layers import OffsetConv
from dcn_plugin.visualize import effective_dilation


class OffsetMonitor(pl.Callback):
    """Log what the offsets of every deformable layer do, and warn when they run away.

    Every `every_n_steps` training steps, per layer: `offset/<layer>/mean` and `/max` (length |offset|), and for masks
    `/mask_mean` and `/mask_std`. A convolution's lengths are in pixels of its input, and it has a `/dilation` too
    (effective dilation in pixels). Those of RoI pooling are shifts of the bins, in sizes of their RoI. Between samples
    it costs nothing; a sample costs one more pass through what predicts the offsets.

    Args:
        every_n_steps: steps between two samples.
        limit: offset length that counts as running away. For a convolution as a multiple of the longer side of its
            input: beyond 1 a point lies outside the image from wherever it starts. For RoI pooling in sizes of the RoI.
        max_pixels: the same for convolutions in pixels, whatever the size; None sets no such limit.

    Each layer warns once per cause: beyond the limit, or not finite. A model without deformable layers logs nothing.
    """

    def __init__(self, every_n_steps: int = 50, limit: float = 1.0, max_pixels: float | None = None) -> None:
        for name, value in dict(every_n_steps=every_n_steps, limit=limit, max_pixels=max_pixels).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.every_n_steps, self.limit, self.max_pixels = every_n_steps, limit, max_pixels
        self._handles: list[Any] = []
        self._sampling = False
        self._values: dict[str, Tensor] = {}
        self._limits: dict[str, tuple[float, str]] = {}
        self._warned: set[tuple[str, str]] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, layer in pl_module.named_modules():
            name = name.removeprefix("model.")
            if isinstance(layer, OffsetConv):
                self._handles.append(layer.register_forward_hook(self._look_at_conv(name)))
            elif (scale := roi_offset_scale(layer)) is not None:
                look = self._look_at_roi_pool(name, scale)
                self._handles.append(layer.register_forward_hook(look, with_kwargs=True))

    def _note(self, name: str, length: Tensor, mask: Tensor | None, limit: float, said: str) -> None:
        self._values |= {f"offset/{name}/mean": length.mean(), f"offset/{name}/max": length.max()}
        if mask is not None:
            self._values[f"offset/{name}/mask_mean"] = mask.float().mean()
            self._values[f"offset/{name}/mask_std"] = mask.float().std(correction=0)
        self._limits[name] = (limit, said)

    def _look_at_conv(self, name: str) -> Any:
        def look(layer: OffsetConv, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._sampling:
                return
            limit = self.limit * max(args[0].shape[-2:])
            limit = limit if self.max_pixels is None else min(limit, self.max_pixels)
            with torch.no_grad():
                offset, mask = layer.offsets(args[0])
                n, _, h, w = offset.shape
                length = offset.float().reshape(n, -1, 2, h, w).norm(dim=2)
                dilation = effective_dilation(offset, layer.kernel_size, layer.dilation).mean()
                self._note(name, length, mask, limit, "samples up to {:.1f} pixels away (limit {:.1f})")
            self._values[f"offset/{name}/dilation"] = dilation

        return look

    def _look_at_roi_pool(self, name: str, scale: float) -> Any:
        def look(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
            if not self._sampling:
                return
            with torch.no_grad():
                offset, mask = layer.offsets(*args, **kwargs)
                if len(offset):
                    length = scale * offset.float().unflatten(1, (-1, 2)).norm(dim=2)
                    self._note(name, length, mask, self.limit, "shifts bins by up to {:.1f} RoI sizes (limit {:.1f})")

        return look

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._sampling = bool(self._handles) and index % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not self._sampling:
            return
        self._sampling = False
        pl_module.log_dict(self._values, batch_size=1)
        for name, (limit, words) in self._limits.items():
            largest = float(self._values[f"offset/{name}/max"])
            cause = "not finite" if not largest < float("inf") else "too far" if largest > limit else None
            if cause is None or (name, cause) in self._warned:
                continue
            self._warned.add((name, cause))
            said = (
                f"has offsets that are not finite (largest: {largest})"
                if cause == "not finite"
                else words.format(largest, limit)
            )
            rank_zero_warn(
                f"OffsetMonitor: {name} {said} at step {trainer.global_step}: the offsets run away. Lower "
                "optimizer.offset_lr_mult (roi_offset_lr_mult for RoI pooling) or the learning rate, clip gradients, "
                "or bound them with offset_bound"
            )
        self._values, self._limits = {}, {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._sampling = [], False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def roi_offset_scale(layer: torch.nn.Module) -> float | None:
    """Return how many RoI sizes an offset of 1 is in a layer that predicts offsets for RoIs, None for other layers."""
    # R-FCN's maps exist without offsets too, and then have no branch for them.
    if not callable(getattr(layer, "offsets", None)) or getattr(layer, "score_offsets", layer) is None:
        return None
    return getattr(layer, "gamma", getattr(layer, "offset_scale", None))


class _EpochWriter(BasePredictionWriter):
    """What the writers share: one file in `directory` after the last batch, or one per process if several."""

    filename: ClassVar[str]

    def __init__(self, directory: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.directory = Path(directory)

    def _path(self, trainer: pl.Trainer) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / self.filename
        return path.with_stem(f"{path.stem}_{trainer.global_rank}") if trainer.world_size > 1 else path


class PredictionWriter(_EpochWriter):
    """Write `predictions.csv` (file, label, class name, score) after prediction, one file per process if several.

    What could not be read (`bad_images='skip'`) has no row.
    """

    filename = "predictions.csv"

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Sequence
    ) -> None:
        names = trainer.datamodule.filenames("predict") if trainer.datamodule is not None else None
        unreadable = getattr(trainer.datamodule, "unreadable", None)
        bad = set() if unreadable is None else set(unreadable("predict"))
        indices = [i for batch in batch_indices[0] for i in batch] if batch_indices else []
        labels = torch.cat([batch["label"] for batch in predictions]).tolist()
        scores = torch.cat([batch["score"] for batch in predictions]).tolist()
        classes = getattr(pl_module, "class_names", None)
        with open(self._path(trainer), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "label", "class", "score"])
            for row, (label, score) in enumerate(zip(labels, scores, strict=True)):
                index = indices[row] if indices else row
                if index in bad:  # what was predicted is the image that was taken in its place
                    continue
                name = names[index] if names is not None else index
                writer.writerow([name, label, classes[label] if classes else label, f"{score:.6f}"])


class DetectionWriter(_EpochWriter):
    """Write `detections.json` after prediction: COCO's results format, one file per process if several.

    A list of `dict(image_id, category_id, bbox=[x, y, width, height], score, file_name)`, which
    `pycocotools.coco.COCO.loadRes` reads. `category_id` is that of the training data.
    """

    filename = "detections.json"

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Sequence
    ) -> None:
        names = trainer.datamodule.filenames("predict") if trainer.datamodule is not None else {}
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
