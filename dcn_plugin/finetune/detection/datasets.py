"""Data sets of images with boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..classes import Id
from ..photos import LOOKED_AT, Sample, Target, read, require
from .annotations import AnnotatedImage, AnnotationFile


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
        first = range(len(self))[index]  # an IndexError beyond, so that a loop over the set ends
        for step in range(len(self) if self.training else 1):
            sample = self._sample(self.images[(first + step) % len(self)])
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
