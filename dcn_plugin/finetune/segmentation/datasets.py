"""Data sets of images with a mask each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..classes import Id
from ..images import UnreadableImage, pass_over
from ..masks import read_mask
from ..photos import LOOKED_AT, Sample, below, read, require


class MaskedImages(Dataset):
    """Images and masks of the same names in two folders, as in PASCAL VOC: `images/a.jpg` and `masks/a.png`.

    Sample i is the i-th image, uint8 [in_chans, H, W] before the transforms, and `dict(image_id=i + 1, mask=[H, W])`;
    transforms move both alike. Images may lie in folders below, masks then in folders of the same names.

    An image is turned as its EXIF orientation says where it then has its mask's width and height, and left as it is
    stored where it has them only so.

    Args:
        images, masks: the two folders.
        listed: text file with the names to take, one in a line, without ending; None takes every image.
        name: what error messages call the split.
        num_classes: masks have the classes 0 to `num_classes - 1`.
        ignore_index: what masks have where no class is right.
        training: whether a sample that cannot be read is replaced by the next one; elsewhere it is None.
        in_chans: 1 (gray) or 3 (RGB).
        transforms: called with image and target.
        bad_images: 'raise' stops at an image or mask that cannot be read, 'skip' warns.
        limit: keep only the first so many images.

    Raises:
        FileNotFoundError: a folder, the list, an image or a mask is missing.
        ValueError: no image, two images of one name, an image and a mask of different sizes, a mask that `read_mask`
            refuses. A few of the set are looked at right away.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        listed: Path | None = None,
        *,
        name: str = "train",
        num_classes: int,
        ignore_index: int = 255,
        training: bool = False,
        in_chans: int = 3,
        transforms: Callable,
        bad_images: str = "raise",
        limit: int | None = None,
    ) -> None:
        require(f"{name}.images", images, "folder", Path.is_dir)
        require(f"{name}.masks", masks, "folder", Path.is_dir)
        found = _images_by_name(images, name)
        chosen = sorted(found) if listed is None else _names_in(listed, name)
        for key in chosen:
            if key not in found:
                bare = key[: -len(Path(key).suffix)]
                without = f" (without ending it is {bare!r}, as names are there)" if bare in found else ""
                raise FileNotFoundError(f"{name}.images: {images / key} has no image, which {listed} names{without}")
        if not chosen:
            raise ValueError(f"{name}.images: expected images in {str(images)!r}, found none that Pillow reads")
        self.root, self.paths = images, [found[key] for key in chosen[:limit]]
        self.masks = [masks / f"{key}.png" for key in chosen[:limit]]
        for path, mask in zip(self.paths, self.masks, strict=True):
            if not mask.is_file():
                raise FileNotFoundError(f"{name}.masks: {mask} does not exist, the mask of image {path}")
        self.name, self.num_classes, self.ignore_index, self.training = name, num_classes, ignore_index, training
        self.in_chans, self.transforms, self.bad_images = in_chans, transforms, bad_images
        self._look_at_some()

    @property
    def ids(self) -> list[Id]:
        """Numbers of the images, from 1."""
        return list(range(1, len(self) + 1))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | None:
        first = range(len(self))[index]  # an IndexError beyond, so that a loop over the set ends
        for step in range(len(self) if self.training else 1):
            here = (first + step) % len(self)
            pair = self._read(here)
            if pair is not None:
                pixels, values = pair
                target: dict[str, Any] = dict(image_id=here + 1, mask=tv_tensors.Mask(torch.from_numpy(values)))
                return self.transforms(v2.functional.to_image(pixels), target)
        if self.training:
            raise ValueError(f"bad_images: expected an image that can be read in {self.root}, found none")
        return None

    def filename(self, index: int) -> str:
        """Return the path of an image below the folder of images."""
        return self.paths[index].relative_to(self.root).as_posix()

    def _read(self, index: int) -> tuple[Image.Image, np.ndarray] | None:
        path, mask = self.paths[index], self.masks[index]
        try:
            values = read_mask(mask, self.num_classes, self.ignore_index)
        except UnreadableImage as error:
            pass_over(error, self.bad_images, "it is left out")
            return None
        height, width = values.shape
        try:
            pixels = read(path, self.in_chans, self.bad_images, (width, height))
        except UnreadableImage:
            raise
        except ValueError as error:
            raise ValueError(f"mask {mask}: of another size than its image: {error}") from error
        return None if pixels is None else (pixels, values)

    def _look_at_some(self) -> None:
        count, seen = min(LOOKED_AT, len(self)), set[int]()
        for number in range(count):
            pair = self._read(number * len(self) // count)
            seen |= set() if pair is None else set(np.unique(pair[1]).tolist())
        classes = seen - {self.ignore_index}
        if len(classes) == 1 and self.ignore_index in seen:  # such as files of 0 and 255 that mean two classes
            rank_zero_warn(
                f"{self.name}.masks: {count} masks looked at have class {min(classes)} and, where no class is right, "
                f"{self.ignore_index}, and no other class; if {self.ignore_index} is one there, the masks need its id"
            )


def _images_by_name(folder: Path, name: str) -> dict[str, Path]:
    """Return the images below a folder by their paths without ending, as in `city/0001`."""
    found: dict[str, Path] = {}
    for path in sorted(below(folder)):
        if path.suffix.lower() in Image.registered_extensions():
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise ValueError(f"{name}.images: expected one image for each mask, got {found[key]} and {path}")
            found[key] = path
    return found


def _names_in(listed: Path, name: str) -> list[str]:
    require(f"{name}.list", listed, "file", Path.is_file)
    try:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}.list: expected text in UTF-8, got {str(listed)!r}: {error}") from error
    names = [line for line in lines if line]
    if not names:
        raise ValueError(f"{name}.list: expected names of images, one in a line, got none in {str(listed)!r}")
    one, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name}.list: expected each image once, got {one!r} {times} times in {listed}")
    return names
