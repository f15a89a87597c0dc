"""Images and targets in an order, and with augmentation, that follow from seed and epoch alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from .._config import check_keys, plain
from .classes import Id
from .data import TunedData
from .photos import FolderImages, Sample, Target
from .scenes import folder_of_scenes, write_scenes
from .transforms import LAST

__all__ = ["SeededData"]

SPLITS = ("train", "val", "test")


def mixed_seed(*numbers: int) -> int:
    """Return one seed that depends on all of the numbers and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class SeededSampler(DistributedSampler):
    """Yield index and seed of each training image; both depend on the sampler's seed and the epoch alone.

    Lightning tells the epoch to a `DistributedSampler` of one process too. So neither order nor augmentation hangs on
    what random numbers were drawn for before, in which process, and how far ahead batches were fetched.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        for index in super().__iter__():
            yield index, mixed_seed(self.seed, self.epoch, index)


class Seeded(Dataset):
    """A data set whose random transforms draw from the seed that a `SeededSampler` gives.

    Lightning puts a plain sampler in its place for `overfit_batches`; then they draw from the process's own generator.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | None:
        if not isinstance(key, tuple):
            return self.dataset[key]
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]


def collate(samples: Sequence[Sample | None]) -> tuple[list[Tensor], list[Target]]:
    """Return images and targets of a batch as two lists, as images of several sizes need it.

    What could not be read (None) is left out; of nothing, both lists are empty.
    """
    read = [sample for sample in samples if sample is not None]
    return [image for image, _ in read], [target for _, target in read]


def check_channels(in_chans: int) -> int:
    """Return the number of an image's channels if images are read so: 1 for gray ones, 3 for RGB."""
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans: expected 1 or 3, got {in_chans}")
    return in_chans


def seed_step(module: pl.LightningModule, batch_idx: int) -> None:
    """Let the random numbers of a training step follow from the seed (`seed_everything`), its epoch and its number."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        torch.manual_seed(mixed_seed(int(seed), module.current_epoch, batch_idx, module.global_rank))


class SeededData(TunedData):
    """Splits of images and targets that are shared out to processes, each image of an evaluated split to one of them.

    They are folders and files below `root`, or the embedded scenes (`write_scenes`), which are written when they are
    asked for. A subclass calls `_find_splits`, sets the attributes below, and makes in `_read(stage, split)` data sets
    that have `ids` and `filename(index)` beside samples (image, target); a sample that is None is left out.

    Raises:
        ValueError: fewer images than processes, or than a training batch of each has.
    """

    in_chans: int
    bad_images: str
    limit: int | None

    def _find_splits(
        self,
        name: str,
        root: str | None,
        given: Mapping[str, Mapping[str, str] | None],
        predict: str | None,
        scenes: Mapping[str, Any] | None,
        parts: Mapping[str, str],
        optional: Sequence[str] = (),
    ) -> None:
        """Set `root` and `splits`, as the arguments of these names say.

        Args:
            parts: what a split has to have -> where that is in the embedded scenes, with {} for the split's name.
            optional: what it may have beside.
        """
        self.name, self.predict_folder, self._parts = name, predict, tuple(parts)
        self._scenes: dict[str, Any] | None = plain(scenes or {}) if name == "digit_scenes" else None
        if self._scenes is not None:
            for key, split in given.items():
                if split is not None:
                    raise ValueError(f"{key}: expected None, as 'digit_scenes' has splits of its own, got {split!r}")
            self.root = folder_of_scenes(root, self._scenes)
            given = {key: {part: place.format(key) for part, place in parts.items()} for key in SPLITS}
        else:
            if scenes is not None:
                raise ValueError(f"scenes: expected None for {name!r} (only 'digit_scenes' takes them), got {scenes!r}")
            self.root = Path(root or "")
            for key, split in given.items():
                if split is None:
                    continue
                check_keys(key, split, (*parts, *optional))
                for part in (*parts, *(one for one in optional if split.get(one) is not None)):
                    if not isinstance(split.get(part), (str, os.PathLike)):
                        got = repr(split[part]) if part in split else "none"
                        raise ValueError(f"{key}.{part}: expected a path, got {got}")
        self.splits = dict(given)
        self.splits["test"] = self.splits["test"] or self.splits["val"]
        self.splits["predict"] = self.splits["test"] if predict is None else predict

    def prepare_data(self) -> None:
        if self._scenes is not None:
            write_scenes(self.root, **self._scenes)

    def _create(self, stage: str) -> Any:
        if stage == "predict":
            if self.predict_folder is None:
                return self._dataset("test")
            folder = self.root / self.predict_folder
            return FolderImages(folder, self.in_chans, v2.Compose(LAST), self.limit, self.bad_images)
        split = self.splits[stage]
        if stage == "test" and split is not None and split == self.splits["val"]:
            return self._dataset("val")
        if split is None:
            raise ValueError(f"{stage}: expected dict({', '.join(f'{part}=...' for part in self._parts)}), got None")
        self.prepare_data()
        return self._read(stage, split)

    def _read(self, stage: str, split: Mapping[str, str]) -> Any:
        """Return the data set of a split for training, validation or test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        # What comes after training is checked before it, not hours later.
        stages = dict(fit=("train", "val", "test"), validate=("val",), test=("test",), predict=("predict",))[stage]
        for name in stages:
            if stage == "fit" and name != "train" and self.splits[name] is None:
                continue
            self._check_share(name, len(self._dataset(name)))

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return (
            dict(num_replicas=1, rank=0)
            if trainer is None
            else dict(num_replicas=trainer.world_size, rank=trainer.global_rank)
        )

    def _check_share(self, stage: str, images: int) -> None:
        """Raise where there is not enough for every process."""
        processes = self._place()["num_replicas"]
        if stage == "train" and images // processes < self.batch_size:
            share = images // processes
            raise ValueError(f"batch_size: expected at most the {share} images to train on, got {self.batch_size}")
        if images < processes:
            raise ValueError(f"{stage}: expected an image for each of {processes} processes, got {images}")

    def _loader(self, stage: str) -> DataLoader:
        dataset, training = self._dataset(stage), stage == "train"
        place = self._place()
        if training:
            self.limit_batch_size(len(dataset) // place["num_replicas"])
        self._check_share(stage, len(dataset))
        sampler: DistributedSampler
        if training:
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            dataset = Seeded(dataset)
            sampler = SeededSampler(dataset, **place, shuffle=True, seed=seed, drop_last=True)
        else:
            # An image that is seen twice, as a DistributedSampler pads, would change the metric.
            sampler = UnrepeatedDistributedSampler(dataset, **place, shuffle=False)
        return DataLoader(
            dataset,
            batch_size=self.batch_size if training else self.eval_batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def folders(self) -> dict[str, Path]:
        """Return the places that the splits are read from, by the names of the arguments that say them."""
        given = {f"{key}.{part}": self.splits[key][part] for key in SPLITS if self.splits[key] for part in self._parts}
        given |= {} if self.predict_folder is None else {"predict": self.predict_folder}
        return {name: self.root / place for name, place in given.items()}

    def filenames(self, stage: str = "predict") -> dict[Id, str]:
        """Return the file name of every image of a split, by image id."""
        dataset = self._dataset(stage)
        return {key: dataset.filename(index) for index, key in enumerate(dataset.ids)}
