"""Predictions of a classifier as a table: one line an image, or one a label."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ..writer import EpochWriter


class PredictionWriter(EpochWriter):
    """Write `predictions.csv` (file, label, class name, score) after prediction, one file per process if several.

    An image has one line, that of its best class. Where it may have several labels it has a line for each whose score
    is at least `threshold`, the best first; if there is none, one without label and class, with the highest score. What
    could not be read (`bad_images='skip'`) has no line.

    Args:
        directory: folder to write to; made if missing.
        threshold: smallest score, in 0..1, of a label among several.
    """

    filename = "predictions.csv"

    def __init__(self, directory: str | Path, threshold: float = 0.5) -> None:
        super().__init__(directory)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a score in 0..1, got {threshold}")
        self.threshold = threshold

    def _rows(self, batch: Any) -> Iterator[list[tuple[int | None, float]]]:
        """Give the labels of each image of a batch and their scores."""
        if "label" in batch:
            for label, score in zip(batch["label"].tolist(), batch["score"].tolist(), strict=True):
                yield [(label, score)]
            return
        for scores in batch["scores"].tolist():
            found = [(label, score) for label, score in enumerate(scores) if score >= self.threshold]
            yield sorted(found, key=lambda pair: -pair[1]) or [(None, max(scores))]

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Sequence
    ) -> None:
        names = trainer.datamodule.filenames("predict") if hasattr(trainer.datamodule, "filenames") else None
        unreadable = getattr(trainer.datamodule, "unreadable", None)
        bad = set() if unreadable is None else set(unreadable("predict"))
        indices = [i for batch in batch_indices[0] for i in batch] if batch_indices else []
        classes = getattr(pl_module, "class_names", None)
        images = itertools.chain.from_iterable(map(self._rows, predictions))
        with open(self._path(trainer), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "label", "class", "score"])
            for row, found in enumerate(images):
                index = indices[row] if indices else row
                if index in bad:  # what was predicted is the image that was taken in its place
                    continue
                name = names[index] if names is not None else index
                for label, score in found:
                    said = classes[label] if classes and label is not None else label
                    writer.writerow([name, label, said, f"{score:.6f}"])
