"""What the writers of predictions share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter

__all__ = ["EpochWriter"]


class EpochWriter(BasePredictionWriter):
    """One file, `filename` in `directory`, after the last batch, or one per process if several.

    A subclass names the file and writes it in `write_on_epoch_end`, to `self._path(trainer)`.
    """

    filename: ClassVar[str]

    def __init__(self, directory: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.directory = Path(directory)

    def _path(self, trainer: pl.Trainer) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / self.filename
        return path.with_stem(f"{path.stem}_{trainer.global_rank}") if trainer.world_size > 1 else path
