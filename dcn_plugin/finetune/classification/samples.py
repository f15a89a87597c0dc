"""Data sets whose images are read by `read_image`, over what timm and torchvision offer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from ..images import UnreadableImage, interpret, pass_over, read_image, unreadable

_RETRIES = 10  # images in a row, as in timm


class ImageFiles(Dataset):
    """Images and labels of one of timm's readers; an unreadable image is an error that names it."""

    def __init__(self, reader: Any, mode: str, target_transform: Callable | None = None) -> None:
        self.reader, self.mode, self.target_transform = reader, mode, target_transform
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple:
        where = functools.partial(self._where, index)
        try:
            source, target, *_ = self.reader[index]
        except OSError as error:
            raise unreadable(where(), error) from error
        with source:
            image = read_image(source, self.mode, where=where)
        if self.transform is not None:
            image = self.transform(image)
        if target is not None and self.target_transform is not None:
            target = self.target_transform(target)
        return image, -1 if target is None else target

    def _where(self, index: int) -> str:
        path = self.reader.filename(index, absolute=True)
        if path is not None and Path(path).exists():
            return path
        return f"{path or index} of {getattr(self.reader, 'root', None) or 'the data set'}"  # in a tar or a table

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return self.reader.filenames(basename, absolute)


class BadImages(Dataset):
    """What becomes of the unreadable images of a data set: an error, or the next image with a warning."""

    def __init__(self, dataset: Any, bad_images: str) -> None:
        self.dataset, self.bad_images = dataset, bad_images
        # Which ones could not be read, known to the processes that load and to the one that writes predictions.
        self.bad = torch.zeros(len(dataset) if bad_images == "skip" else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        for _ in range(_RETRIES):
            try:
                return self.dataset[index]
            except UnreadableImage as error:
                pass_over(error, self.bad_images, "the next image is taken instead")
                self.bad[index] = True
                last, index = error, (index + 1) % len(self.dataset)
        raise UnreadableImage(f"{last}, and so were {_RETRIES - 1} images before it") from last.__cause__

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:  # timm's loaders set it
        self.dataset.transform = transform

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str] | None:
        names = getattr(self.dataset, "filenames", None)
        return None if names is None else names(basename, absolute)


class ImageStream(IterableImageDataset):
    """A stream of timm's that was made with `input_img_mode=''`: its images are turned and scaled by us.

    What timm's reader itself cannot decode is its own affair (see `ImageDataModule`).
    """

    def __init__(self, dataset: IterableImageDataset, mode: str, name: str, bad_images: str) -> None:
        super().__init__(None, reader=dataset.reader, target_transform=dataset.target_transform)
        self.mode, self.name, self.bad_images = mode, name, bad_images

    def __iter__(self) -> Iterator[tuple]:
        for number, (image, target) in enumerate(self.reader):
            try:
                image = interpret(image, self.mode)
            except Exception as error:
                failed = unreadable(f"{number} that came from {self.name}", error)
                failed.__cause__ = error
                pass_over(failed, self.bad_images, "it is left out")
                continue
            if self.transform is not None:
                image = self.transform(image)
            if self.target_transform is not None:
                target = self.target_transform(target)
            yield image, target


def read_files_of(dataset: Any, mode: str) -> Any:
    """Let a data set of torchvision's that reads files read them by `read_image`; others hold their pixels."""
    if hasattr(dataset, "loader"):
        dataset.loader = functools.partial(read_image, mode=mode)
    return dataset
