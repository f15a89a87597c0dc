"""Data sets of images with boxes, of images alone, and the order that training takes them in."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..classes import Id
from ..folders import is_hidden, looks_like_an_image
from ..images import UnreadableImage, pass_over, read_image
from .annotations import AnnotatedImage, AnnotationFile

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
# How many images of a set are looked at before a run, evenly over the set.
LOOKED_AT = 8


def _unchanged(image: Any, target: Target) -> Sample:
    return image, target


class CocoImages(Dataset):
    """Images with boxes from a file in COCO's format, as torchvision's detectors and transforms take them.

    Sample i is the image with the i-th id: an image float32 [in_chans, H, W] in 0..1, and `image_id`, `boxes` float32
    [L, 4] (x1, y1, x2, y2), `labels` int64 [L] in 1..K (the category ids in ascending order), `iscrowd` and `area` [L].
    A training sample has no crowd boxes, its boxes are clipped to the image, and those less than a pixel wide or high
    are left out. An evaluation sample has every box as it stands in the file, so that the metric is COCO's own.

    An image is turned as its EXIF orientation says where it then has the annotated width and height, and left as it is
    stored where it has them only so; every other size is an error. Where the file has no sizes, it is turned.

    Args:
        images: folder of the images.
        annotations: JSON file in COCO's format.
        name: what error messages call the split.
        training: as above.
        in_chans: 1 (gray) or 3 (RGB).
        transforms: called with image (uint8) and target.
        empty_images: 'keep', or 'drop' what is without a box to train on.
        bad_boxes: 'skip' warns of boxes less than a pixel wide or high inside the image, 'raise' stops at them.
        bad_images: 'raise' stops at an image that cannot be read. 'skip' warns; training takes the next image instead,
            and elsewhere the sample is None, which `collate` leaves out.
        limit: keep only the first so many images.

    Raises:
        FileNotFoundError: folder, annotation file or an image is missing.
        ValueError: annotations as `AnnotationFile`, or without a box to train on; an unreadable image; an image of
            another size than annotated. A few images of the set are looked at right away.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        name: str = "train",
        training: bool = False,
        in_chans: int = 3,
        transforms: Callable = _unchanged,
        empty_images: str = "keep",
        bad_boxes: str = "skip",
        bad_images: str = "raise",
        limit: int | None = None,
    ) -> None:
        require(f"{name}.images", images, "folder", Path.is_dir)
        require(f"{name}.annotations", annotations, "file", Path.is_file)
        file = AnnotationFile(annotations, name)
        file.check_files(images, name)
        self.root, self.training, self.in_chans, self.transforms = images, training, in_chans, transforms
        self.bad_images = bad_images
        self.categories = file.categories
        self._labels = {category: label for label, category in enumerate(file.categories, start=1)}
        chosen = file.images
        if training:
            trainable = _trainable(file, bad_boxes)
            if not trainable:
                raise ValueError(f"{file.about} has no box to train on")
            if empty_images == "drop":
                chosen = [image for image in chosen if image.id in trainable]
        elif all(annotation.iscrowd for image in chosen for annotation in image.annotations):
            rank_zero_warn(f"{file.about} has no objects: the average precision of {name} will be -1")
        self.images = chosen[:limit]
        if not self.images:
            raise ValueError(f"{file.about} leaves no images")
        self._look_at_some()

    @property
    def ids(self) -> list[Id]:
        """Ids of the images, in the order of the samples."""
        return [image.id for image in self.images]

    @property
    def category_ids(self) -> list[Id]:
        """Ids of the categories, in the order of the labels."""
        return list(self.categories)

    @property
    def class_names(self) -> list[str]:
        """Names of the categories, in the order of the labels."""
        return list(self.categories.values())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | None:
        for step in range(len(self) if self.training else 1):
            sample = self._sample(self.images[(index + step) % len(self)])
            if sample is not None:
                return sample
        if self.training:
            raise ValueError(f"bad_images: expected an image that can be read in {self.root}, found none")
        return None

    def _look_at_some(self) -> None:
        count = min(LOOKED_AT, len(self))
        for number in range(count):
            self._read(self.images[number * len(self) // count])

    def _read(self, image: AnnotatedImage) -> Image.Image | None:
        path = Path(self.root, image.file_name)
        return read(path, self.in_chans, self.bad_images, image.size)

    def _sample(self, image: AnnotatedImage) -> Sample | None:
        pixels = self._read(image)
        if pixels is None:
            return None
        found = image.annotations
        if self.training:
            found = [annotation for annotation in found if not annotation.iscrowd]
        boxes = torch.tensor([annotation.corners for annotation in found], dtype=torch.float32).reshape(-1, 4)
        size = (pixels.height, pixels.width)
        labels = [self._labels[annotation.category_id] for annotation in found]
        target: Target = dict(
            image_id=image.id,
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            labels=torch.tensor(labels, dtype=torch.int64),
        )
        if not self.training:
            target["iscrowd"] = torch.tensor([annotation.iscrowd for annotation in found], dtype=torch.int64)
            target["area"] = torch.tensor([annotation.area for annotation in found], dtype=torch.float32)
        return self.transforms(v2.functional.to_image(pixels), target)

    def filename(self, index: int) -> str:
        """Return the file name of a sample as the annotation file has it."""
        return self.images[index].file_name


class FolderImages(Dataset):
    """The images of a folder by name, for prediction; `image_id` counts them from 1.

    Every image is turned as its EXIF orientation says, as viewers show it, and predictions are in pixels of that.
    Hidden files are left alone; other images that are not read are counted in a warning. `bad_images` is as in
    `CocoImages`.
    """

    def __init__(
        self, folder: Path, in_chans: int, transforms: Callable, limit: int | None = None, bad_images: str = "raise"
    ) -> None:
        require("predict", folder, "folder", Path.is_dir)
        images = looks_like_an_image()
        found = [path for path in _below(folder) if path.suffix.lower() in images]
        known = Image.registered_extensions()
        self.paths = sorted(path for path in found if path.parent == folder and path.suffix.lower() in known)[:limit]
        deeper = sum(path.parent != folder for path in found)
        others = Counter(path.suffix for path in found if path.parent == folder and path.suffix.lower() not in known)
        left = [f"{count} {ending}" for ending, count in sorted(others.items())]
        left += [f"{deeper} in folders below"] if deeper else []
        if not self.paths:
            but = f", but {', '.join(left)}" if left else ""
            raise FileNotFoundError(f"predict: expected images in {str(folder)!r}, found none that Pillow reads{but}")
        if left:
            rank_zero_warn(f"predict: {folder} holds images that are not read: {', '.join(left)}")
        self.in_chans, self.transforms, self.bad_images = in_chans, transforms, bad_images

    @property
    def ids(self) -> list[Id]:
        """Numbers of the images, from 1."""
        return list(range(1, len(self) + 1))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | None:
        pixels = read(self.paths[index], self.in_chans, self.bad_images)
        return None if pixels is None else self.transforms(v2.functional.to_image(pixels), dict(image_id=index + 1))

    def filename(self, index: int) -> str:
        """Return the name of an image's file."""
        return self.paths[index].name


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(place, name) for name in files if not is_hidden(name))


def read(path: Path, in_chans: int, bad_images: str, size: tuple[int, int] | None = None) -> Image.Image | None:
    """Read an image in gray or RGB; warn and return None where it cannot be read and `bad_images` is 'skip'."""
    try:
        return read_image(path, "L" if in_chans == 1 else "RGB", size=size)
    except UnreadableImage as error:
        pass_over(error, bad_images, "it is left out")
        return None


def _trainable(file: AnnotationFile, bad_boxes: str) -> set[Id]:
    """Return the ids of the images with a box to train on, and complain of boxes that are none."""
    bad, trainable, total = [], set(), 0
    for image in file.images:
        width, height = image.size or (math.inf, math.inf)
        for annotation in image.annotations:
            total += 1
            if annotation.iscrowd:
                continue
            x1, y1, x2, y2 = annotation.corners
            if min(x2, width) - max(x1, 0) >= 1 and min(y2, height) - max(y1, 0) >= 1:
                trainable.add(image.id)
            else:
                bad.append(annotation)
    if bad:
        said = (
            f"{file.about}: {len(bad)} of {total} boxes are less than a pixel wide or high inside their image, "
            f"the first one [{', '.join(f'{side:.10g}' for side in bad[0].bbox)}] of annotation {bad[0].id}"
        )
        if bad_boxes == "raise":
            raise ValueError(f"{said} (data.bad_boxes='skip' trains without them)")
        rank_zero_warn(f"{said}; training goes without them")
    return trainable


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

    def __init__(self, dataset: CocoImages) -> None:
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
    """Return images and targets of a batch as two lists, as torchvision's detectors take them.

    What could not be read (None) is left out; of nothing, both lists are empty.
    """
    read = [sample for sample in samples if sample is not None]
    return [image for image, _ in read], [target for _, target in read]


def require(name: str, path: Path, what: str, holds: Callable[[Path], bool]) -> None:
    """Raise FileNotFoundError unless `path` is what the argument `name` expects."""
    if not holds(path):
        state = f"which is no {what}" if path.exists() else "which does not exist"
        raise FileNotFoundError(f"{name}: expected a {what}, got {str(path)!r}, {state}")
