"""Detection data in COCO's format, as a Lightning data module."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

from ..._config import build_object, check_keys, plain, unknown
from ..classes import Id, first_difference
from ..data import TunedData, check_choices, check_counts
from ..images import BAD_IMAGES
from .datasets import CocoImages, FolderImages, Seeded, SeededSampler, collate
from .scenes import scene_stamp, write_scenes

SPLITS = ("train", "val", "test")
TRANSFORMS = {
    name: value for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)
}


class CocoDataModule(TunedData):
    """Serve detection data in COCO's format: images as a list of tensors, targets as a list of dicts (`CocoImages`).

    Args:
        name: 'coco', or 'digit_scenes' for the embedded set, which is written in COCO's format below `root` and read
            back like any other (see `write_scenes`).
        root: folder that the paths below start from. For 'digit_scenes' where the set is written; None means a folder
            of the user's cache.
        train: `dict(images=<folder>, annotations=<JSON file>)` to train on; None cannot train.
        val: the same for validation; None trains without.
        test: the same for tests; None means `val`.
        predict: a folder of images; None predicts for the images of the test split.
        scenes: arguments of `write_scenes`, for 'digit_scenes'.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch elsewhere; None means `batch_size`.
        num_workers: loader processes per process; 0 loads in the training process.
        num_classes: number of categories, if they are to be checked before any file is read; None takes the data's.
        in_chans: 3 for RGB images, 1 for gray ones; other images are converted.
        augment: transforms of `torchvision.transforms.v2` for training, each `dict(type=<class name>, ...)`, as
            `[dict(type='RandomHorizontalFlip', p=0.5)]`. Boxes follow; one that leaves the image is left out.
        empty_images: 'keep' trains on images without boxes too, 'drop' does not.
        bad_boxes: 'skip' warns of boxes less than a pixel wide or high inside their image and trains without them,
            'raise' stops at them. Evaluation takes every box as the file has it.
        bad_images: 'raise' stops at an image that cannot be read. 'skip' warns; training takes the next one instead,
            and elsewhere it is left out.
        limit: at most so many images of each split.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `CocoImages`; an unknown name, key or transform; splits whose
            categories differ in id or name. Before training, the splits for validation and test are checked as well.

    Order and augmentation of the training images depend on the seed (`seed_everything`) and the epoch alone, so that a
    resumed run sees what it would have seen.

    Example:
        >>> import tempfile
        >>> data = CocoDataModule('digit_scenes', tempfile.mkdtemp(), scenes=dict(train=4, val=1, test=1), in_chans=1)
        >>> data.setup('fit')
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> len(images), images[0].shape, data.num_classes, targets[0]['boxes'].shape[1]
        (2, torch.Size([1, 128, 128]), 10, 4)
    """

    def __init__(
        self,
        name: str = "coco",
        root: str | None = None,
        *,
        train: Mapping[str, str] | None = None,
        val: Mapping[str, str] | None = None,
        test: Mapping[str, str] | None = None,
        predict: str | None = None,
        scenes: Mapping[str, Any] | None = None,
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_classes: int | None = None,
        in_chans: int = 3,
        augment: Sequence[Mapping[str, Any]] = (),
        empty_images: str = "keep",
        bad_boxes: str = "skip",
        bad_images: str = "raise",
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        if name not in ("coco", "digit_scenes"):
            raise ValueError(unknown("data set name", name, ("coco", "digit_scenes"), "name"))
        check_counts(limit=limit)
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans: expected 1 or 3, got {in_chans}")
        check_choices(
            empty_images=(empty_images, ("keep", "drop")),
            bad_boxes=(bad_boxes, ("skip", "raise")),
            bad_images=(bad_images, BAD_IMAGES),
        )
        given = dict(train=train, val=val, test=test)
        self._scenes: dict[str, Any] = plain(scenes or {})
        if name == "digit_scenes":
            for key, split in given.items():
                if split is not None:
                    raise ValueError(f"{key}: expected None, as 'digit_scenes' has splits of its own, got {split!r}")
            stamp = scene_stamp(**{key: value for key, value in self._scenes.items() if key != "limit"})
            self.root = Path(root) if root is not None else _cache(stamp | dict(limit=self._scenes.get("limit")))
            given = {
                split: dict(images=f"images/{split}", annotations=f"annotations/instances_{split}.json")
                for split in SPLITS
            }
        else:
            if scenes is not None:
                raise ValueError(f"scenes: expected None for {name!r} (only 'digit_scenes' takes them), got {scenes!r}")
            self.root = Path(root or "")
            for key, split in given.items():
                if split is not None:
                    check_keys(key, split, ("images", "annotations"))
                    for part in ("images", "annotations"):
                        if part not in split:
                            raise ValueError(f"{key}.{part}: expected a path, got none")
        self.name, self.in_chans, self.predict_folder = name, in_chans, predict
        self.splits: dict[str, Any] = dict(given)
        self.splits["test"] = self.splits["test"] or self.splits["val"]
        self.splits["predict"] = self.splits["test"] if predict is None else predict
        self.empty_images, self.bad_boxes, self.bad_images, self.limit = empty_images, bad_boxes, bad_images, limit
        self.augment = build_transforms("augment", augment)
        self._num_classes = num_classes
        self.data_config = dict(in_chans=in_chans)
        self.keep_arguments(locals())

    # -- classes ------------------------------------------------------------------------------------------------------

    @property
    def category_ids(self) -> list[Id]:
        """The categories' ids in the annotation files; label l of the model is `category_ids[l - 1]`."""
        return self._any().category_ids

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order of their labels."""
        return self._any().class_names

    @property
    def num_classes(self) -> int:
        """Number of categories, without the background."""
        return self._num_classes if self._num_classes is not None else len(self.category_ids)

    def _any(self) -> CocoImages:
        for stage in SPLITS:
            if stage in self._datasets:
                return self._datasets[stage]
        for stage in ("val", "test", "train"):  # from small to large
            if self.splits[stage] is not None:
                return self._dataset(stage)
        raise ValueError(
            "num_classes: expected a number, as without train, val and test nothing names the categories, got None"
        )

    # -- data sets ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if self.name == "digit_scenes":
            write_scenes(self.root, **self._scenes)

    def _create(self, stage: str) -> Any:
        if stage == "predict":
            if self.predict_folder is None:
                return self._dataset("test")
            folder = self.root / self.predict_folder
            return FolderImages(folder, self.in_chans, v2.Compose(_LAST), self.limit, self.bad_images)
        split = self.splits[stage]
        if stage == "test" and split is not None and split == self.splits["val"]:
            return self._dataset("val")
        if split is None:
            raise ValueError(f"{stage}: expected dict(images=..., annotations=...), got None")
        self.prepare_data()
        training = stage == "train"
        dataset = CocoImages(
            self.root / split["images"],
            self.root / split["annotations"],
            name=stage,
            training=training,
            in_chans=self.in_chans,
            transforms=v2.Compose([*self.augment, *_CLEAN, *_LAST] if training else _LAST),
            empty_images=self.empty_images,
            bad_boxes=self.bad_boxes,
            bad_images=self.bad_images,
            limit=self.limit,
        )
        if self._num_classes is not None and len(dataset.category_ids) != self._num_classes:
            raise ValueError(
                f"num_classes: expected {self._num_classes} categories, {stage}.annotations "
                f"{self.root / split['annotations']} has {len(dataset.category_ids)}"
            )
        # Labels must mean the same in every split.
        for other in SPLITS:
            known = self._datasets.get(other)
            if known is not None:
                said = first_difference(dataset.categories, f"in {stage}", known.categories, f"in {other}")
                if said is not None:
                    raise ValueError(f"{stage}.annotations: {self.root / split['annotations']}: {said}")
        return dataset

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # What comes after training is checked before it, not hours later.
        stages = dict(fit=("train", "val", "test"), validate=("val",), test=("test",), predict=("predict",))[stage]
        for name in stages:
            if stage == "fit" and name != "train" and self.splits[name] is None:
                continue
            self._check_share(name, len(self._dataset(name)))

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return dict(num_replicas=1, rank=0) if trainer is None else _place_of(trainer)

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

    def filenames(self, stage: str = "predict") -> dict[Id, str]:
        """Return the file name of every image of a split, by image id."""
        dataset = self._dataset(stage)
        return {key: dataset.filename(index) for index, key in enumerate(dataset.ids)}


def build_transforms(where: str, specs: Sequence[Mapping[str, Any]]) -> list[v2.Transform]:
    """Build transforms of `torchvision.transforms.v2` from `dict(type=..., ...)`, also those in `transforms=[...]`."""
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
        raise TypeError(f"{where}: expected a list of dict(type=..., ...), got {specs!r}")
    built = []
    for i, spec in enumerate(specs):
        if isinstance(spec, Mapping) and isinstance(spec.get("transforms"), (list, tuple)):
            inner = build_transforms(f"{where}[{i}].transforms", spec["transforms"])
            spec = {**spec, "transforms": inner}
        built.append(build_object(f"{where}[{i}]", spec, TRANSFORMS))
    return built


# torchvision's detectors refuse a box without area; what Sanitize takes away is less than a pixel wide or high.
_CLEAN = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
_LAST = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def _cache(stamp: Mapping[str, Any]) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
    return Path(base, "dcn_plugin", f"digit_scenes-{digest}")


def _place_of(trainer: pl.Trainer) -> dict[str, int]:
    return dict(num_replicas=trainer.world_size, rank=trainer.global_rank)
