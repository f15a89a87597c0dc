"""Detection data in COCO's format, as a Lightning data module."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from ..config import arguments, build_object, check_keys, plain, unknown
from .scenes import scene_stamp, write_scenes

SPLITS = ("train", "val", "test")
TRANSFORMS = {
    name: value for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)
}
Target = dict[str, Any]


class CocoImages(CocoDetection):
    """torchvision's `CocoDetection` with checked files, and samples as torchvision's detectors and transforms take.

    Sample i is the image with the i-th id: an image float32 [in_chans, H, W] in 0..1, and `image_id`, `boxes` float32
    [L, 4] (x1, y1, x2, y2), `labels` int64 [L] in 1..K (the category ids in ascending order), `iscrowd` and `area` [L].
    A training sample has no crowd boxes, its boxes are clipped to the image, and those less than a pixel wide or high
    are left out. An evaluation sample has every box as it stands in the file, so that the metric is COCO's own.

    Args:
        images: folder of the images.
        annotations: JSON file in COCO's format.
        name: what error messages call the split.
        training: as above.
        in_chans: 1 (gray) or 3 (RGB).
        transforms: called with image (uint8) and target.
        empty_images: 'keep', or 'drop' what is without a box to train on.
        bad_boxes: 'skip' warns of boxes less than a pixel wide or high inside the image, 'raise' stops at them.
        limit: keep only the first so many images.

    Raises:
        FileNotFoundError: folder, annotation file or an image is missing.
        ValueError: annotations that are no JSON, not COCO's format, or do not fit together.
    """

    ids: list[int]

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        name: str = "train",
        training: bool = False,
        in_chans: int = 3,
        transforms: Callable | None = None,
        empty_images: str = "keep",
        bad_boxes: str = "skip",
        limit: int | None = None,
    ) -> None:
        _require(f"{name}.images", images, "folder", Path.is_dir)
        _require(f"{name}.annotations", annotations, "file", Path.is_file)
        where = f"{name}.annotations: {annotations}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its progress
                super().__init__(images, str(annotations), transforms=transforms)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"COCO data needs {error.name}, which is not installed: pip install 'dcn_plugin[detection]'",
                name=error.name,
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not in COCO's format ({type(error).__name__}: {error})") from error
        self.training, self.in_chans = training, in_chans
        self._check(where, name)
        self.category_ids: list[int] = sorted(self.coco.cats)
        self.class_names = [str(self.coco.cats[i].get("name", i)) for i in self.category_ids]
        self._labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        if training:
            self._drop(where, empty_images, bad_boxes)
        self.ids = self.ids[:limit]
        if not self.ids:
            raise ValueError(f"{where} leaves no images" + (" with boxes to train on" if training else ""))

    def _check(self, where: str, name: str) -> None:
        whole = self.coco.dataset
        for key in ("images", "annotations", "categories"):
            if not isinstance(whole.get(key), list):
                raise ValueError(
                    f"{where} is not in COCO's format: expected a list {key!r}, got {whole.get(key)!r:.60}"
                )
        if not whole["categories"]:
            raise ValueError(f"{where} has no categories")
        for key in ("images", "annotations", "categories"):
            ids = [item.get("id") for item in whole[key]]
            if len(set(ids)) != len(ids) or None in ids:
                raise ValueError(f"{where}: expected an 'id' of its own for everything in {key!r}, got {ids!r:.60}")
        for annotation in whole["annotations"]:
            about = f"{where}: annotation {annotation['id']}"
            if annotation.get("image_id") not in self.coco.imgs:
                raise ValueError(f"{about} is of image {annotation.get('image_id')!r}, which is not among the images")
            if annotation.get("category_id") not in self.coco.cats:
                raise ValueError(f"{about} has category {annotation.get('category_id')!r}, which is not among them")
            box = annotation.get("bbox")
            if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
                raise ValueError(f"{about}: expected 'bbox' [x, y, width, height], got {box!r:.60}")
        listed: dict[Path, set[str]] = {}  # one look at a folder instead of one at each of its files
        for image in whole["images"]:
            path = Path(self.root, str(image.get("file_name")))
            if path.parent not in listed:
                listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in listed[path.parent]:
                raise FileNotFoundError(f"{name}.images: {path} does not exist, which {where.split(': ')[1]} names")

    def _drop(self, where: str, empty_images: str, bad_boxes: str) -> None:
        bad, trainable = [], set()
        for annotation in self.coco.dataset["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            image = self.coco.imgs[annotation["image_id"]]
            size = (image.get("width", math.inf), image.get("height", math.inf))
            x1, y1, x2, y2 = _corners(annotation["bbox"])
            if min(x2, size[0]) - max(x1, 0) >= 1 and min(y2, size[1]) - max(y1, 0) >= 1:
                trainable.add(annotation["image_id"])
            else:
                bad.append(annotation)
        if bad:
            total = len(self.coco.dataset["annotations"])
            said = (
                f"{where}: {len(bad)} of {total} boxes are less than a pixel wide or high inside their image, "
                f"the first one {bad[0]['bbox']} of annotation {bad[0]['id']}"
            )
            if bad_boxes == "raise":
                raise ValueError(f"{said} (data.bad_boxes='skip' trains without them)")
            rank_zero_warn(f"{said}; training goes without them")
        if empty_images == "drop":
            self.ids = [i for i in self.ids if i in trainable]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.ids[index]
        try:
            image = self._load_image(image_id)  # RGB, whatever the file
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            path = Path(self.root, self.coco.imgs[image_id]["file_name"])
            raise ValueError(f"unreadable image {path}: {error}") from error
        found = self._load_target(image_id)
        if self.training:
            found = [annotation for annotation in found if not annotation.get("iscrowd", 0)]
        boxes = torch.tensor([_corners(annotation["bbox"]) for annotation in found], dtype=torch.float32)
        size = (image.height, image.width)
        target: Target = dict(
            image_id=image_id,
            boxes=tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            labels=torch.tensor([self._labels[annotation["category_id"]] for annotation in found], dtype=torch.int64),
        )
        if not self.training:
            target["iscrowd"] = torch.tensor([annotation.get("iscrowd", 0) for annotation in found], dtype=torch.int64)
            areas = [annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]) for annotation in found]
            target["area"] = torch.tensor(areas, dtype=torch.float32)
        return self.transforms(_as_tensor(image, self.in_chans), target)

    def filename(self, index: int) -> str:
        return str(self.coco.imgs[self.ids[index]]["file_name"])


class FolderImages(Dataset):
    """The images of a folder by name, for prediction; `image_id` counts them from 1."""

    def __init__(self, folder: Path, in_chans: int, transforms: Callable, limit: int | None = None) -> None:
        _require("predict", folder, "folder", Path.is_dir)
        known = Image.registered_extensions()
        self.paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)[:limit]
        if not self.paths:
            raise FileNotFoundError(f"predict: expected images in {str(folder)!r}, found none")
        self.in_chans, self.transforms = in_chans, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        try:
            with Image.open(self.paths[index]) as image:
                pixels = _as_tensor(image, self.in_chans)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(f"unreadable image {self.paths[index]}: {error}") from error
        return self.transforms(pixels, dict(image_id=index + 1))

    def filename(self, index: int) -> str:
        return self.paths[index].name


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
    """A data set whose random transforms draw from the seed that a `SeededSampler` gives."""

    def __init__(self, dataset: CocoImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]


class CocoDataModule(pl.LightningDataModule):
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
        limit: at most so many images of each split.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `CocoImages`; an unknown name, key or transform; splits whose
            categories differ.

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
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if name not in ("coco", "digit_scenes"):
            raise ValueError(unknown("data set name", name, ("coco", "digit_scenes"), "name"))
        for key, value in dict(batch_size=batch_size, eval_batch_size=eval_batch_size, limit=limit).items():
            if value is not None and value < 1:
                raise ValueError(f"{key}: expected at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans: expected 1 or 3, got {in_chans}")
        for key, chosen, known in (
            ("empty_images", empty_images, ("keep", "drop")),
            ("bad_boxes", bad_boxes, ("skip", "raise")),
        ):
            if chosen not in known:
                raise ValueError(f"{key}: expected {' or '.join(map(repr, known))}, got {chosen!r}")
        given = dict(train=train, val=val, test=test)
        self._scenes: dict[str, Any] = plain(scenes or {})
        if name == "digit_scenes":
            for key, split in given.items():
                if split is not None:
                    raise ValueError(f"{key}: 'digit_scenes' has splits of its own, got {split!r}")
            stamp = scene_stamp(**{key: value for key, value in self._scenes.items() if key != "limit"})
            self.root = Path(root) if root is not None else _cache(stamp | dict(limit=self._scenes.get("limit")))
            given = {
                split: dict(images=f"images/{split}", annotations=f"annotations/instances_{split}.json")
                for split in SPLITS
            }
        else:
            if scenes is not None:
                raise ValueError(f"scenes: only 'digit_scenes' takes them, got {scenes!r} for {name!r}")
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
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.empty_images, self.bad_boxes, self.limit = num_workers, empty_images, bad_boxes, limit
        self.augment = build_transforms("augment", augment)
        self._num_classes = num_classes
        self._datasets: dict[str, Any] = {}
        self.data_config = dict(in_chans=in_chans)
        # Hyperparameters of module and data module may share names, which Lightning's loggers refuse to merge.
        self.save_hyperparameters(
            {key: plain(value) for key, value in locals().items() if key in arguments(type(self))}, logger=False
        )

    # -- classes ------------------------------------------------------------------------------------------------------

    @property
    def category_ids(self) -> list[int]:
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
        raise ValueError("num_classes: without train, val and test nothing names the categories; pass num_classes")

    # -- data sets ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if self.name == "digit_scenes":
            write_scenes(self.root, **self._scenes)

    def _dataset(self, stage: str) -> Any:
        if stage not in self._datasets:
            self._datasets[stage] = self._create(stage)
        return self._datasets[stage]

    def _create(self, stage: str) -> Any:
        if stage == "predict":
            if self.predict_folder is None:
                return self._dataset("test")
            return FolderImages(self.root / self.predict_folder, self.in_chans, v2.Compose(_LAST), self.limit)
        split = self.splits[stage]
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
            if known is not None and known.category_ids != dataset.category_ids:
                odd = sorted(set(known.category_ids) ^ set(dataset.category_ids))[0]
                raise ValueError(f"{stage}.annotations: category {odd} is in only one of {stage} and {other}")
        return dataset

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        for name in dict(fit=("train", "val"), validate=("val",), test=("test",), predict=("predict",))[stage]:
            if name == "val" and stage == "fit" and self.splits["val"] is None:
                continue
            self._dataset(name)

    def _loader(self, stage: str) -> DataLoader:
        dataset, training = self._dataset(stage), stage == "train"
        batch_size = self.batch_size if training else self.eval_batch_size
        trainer = self.trainer
        place = dict(num_replicas=1, rank=0) if trainer is None else _place_of(trainer)
        sampler: DistributedSampler
        if training:
            share = len(dataset) // place["num_replicas"]
            if share < batch_size:
                raise ValueError(f"batch_size: expected at most the {share} images to train on, got {batch_size}")
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            dataset = Seeded(dataset)
            sampler = SeededSampler(dataset, **place, shuffle=True, seed=seed, drop_last=True)
        else:
            if len(dataset) < place["num_replicas"]:
                raise ValueError(
                    f"{stage}: expected an image for each of {place['num_replicas']} processes, got {len(dataset)}"
                )
            # An image that is seen twice, as a DistributedSampler pads, would change the metric.
            sampler = UnrepeatedDistributedSampler(dataset, **place, shuffle=False)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.splits["val"] is None else self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict")

    def filenames(self, stage: str = "predict") -> dict[int, str]:
        """Return the file name of every image of a split, by image id."""
        dataset = self._dataset(stage)
        ids = dataset.ids if isinstance(dataset, CocoImages) else range(1, len(dataset) + 1)
        return {int(i): dataset.filename(index) for index, i in enumerate(ids)}


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return images and targets of a batch as two lists, as torchvision's detectors take them."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


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


def _as_tensor(image: Image.Image, in_chans: int) -> tv_tensors.Image:
    return v2.functional.to_image(image.convert("L" if in_chans == 1 else "RGB"))


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _require(name: str, path: Path, what: str, holds: Callable[[Path], bool]) -> None:
    if not holds(path):
        state = f"which is no {what}" if path.exists() else "which does not exist"
        raise FileNotFoundError(f"{name}: expected a {what}, got {str(path)!r}, {state}")


def _cache(stamp: Mapping[str, Any]) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
    return Path(base, "dcn_plugin", f"digit_scenes-{digest}")


def _place_of(trainer: pl.Trainer) -> dict[str, int]:
    return dict(num_replicas=trainer.world_size, rank=trainer.global_rank)
