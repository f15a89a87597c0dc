"""What the data modules share: splits that are made once, sizes of batches, the loaders that Lightning asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from .._config import arguments, check_kinds, plain

__all__ = ["TunedData"]


class TunedData(pl.LightningDataModule):
    """The splits `train`, `val`, `test` and `predict` of a data set, by name in `splits`; None is one that is missing.

    A subclass makes a split's data set in `_create(stage)` and its loader in `_loader(stage)`, sets `splits`, and may
    say what it knows of the data in `num_classes`, `class_names`, `data_config` and `filenames(stage)`.

    Args:
        batch_size: samples per training batch and process.
        eval_batch_size: samples per batch elsewhere; None means `batch_size`.
        num_workers: loader processes per process; 0 loads in the training process.

    Raises:
        ValueError: a size below 1, workers below 0.
    """

    splits: dict[str, Any]

    def __init__(self, batch_size: int, eval_batch_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        check_counts(batch_size=batch_size, eval_batch_size=eval_batch_size)
        if num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
        self.batch_size, self._eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self._datasets: dict[str, Any] = {}

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> None:
        """Raise TypeError for an argument of a wrong kind in a config's section `data`."""
        check_kinds("data.", values, cls)

    def keep_arguments(self, values: Mapping[str, Any]) -> None:
        """Store those of `values` that are arguments of the class, for checkpoints, as plain types."""
        # Hyperparameters of module and data module may share names, which Lightning's loggers refuse to merge.
        kept = {key: plain(value) for key, value in values.items() if key in arguments(type(self))}
        self.save_hyperparameters(kept, logger=False)

    @property
    def eval_batch_size(self) -> int:
        """Samples per batch outside training: as given, else `batch_size`, also where that is changed later."""
        return self._eval_batch_size or self.batch_size

    @eval_batch_size.setter
    def eval_batch_size(self, value: int) -> None:
        self._eval_batch_size = value

    def limit_batch_size(self, samples: int) -> None:
        """Bring `batch_size` down to the samples there are, where somebody has changed it."""
        # Lightning's search for a batch size doubles it until memory or samples run out, and may go too far.
        if self.batch_size != self.hparams_initial["batch_size"]:
            self.batch_size = min(self.batch_size, max(1, samples))

    def _dataset(self, stage: str) -> Any:
        if stage not in self._datasets:
            self._datasets[stage] = self._create(stage)
        return self._datasets[stage]

    def _create(self, stage: str) -> Any:
        raise NotImplementedError

    def _loader(self, stage: str) -> DataLoader:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.splits["val"] is None else self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict")


def check_counts(**counts: int | None) -> None:
    """Raise ValueError naming the first count that is neither None nor at least 1."""
    for key, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}: expected at least 1, got {value}")


def check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise ValueError naming the first argument, given as (value, known values), whose value is not a known one."""
    for key, (chosen, known) in choices.items():
        if chosen not in known:
            raise ValueError(f"{key}: expected {' or '.join(map(repr, known))}, got {chosen!r}")
