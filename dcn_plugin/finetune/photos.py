"""Photos from files: one of them, in gray or colour, and all of a folder, for prediction."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .classes import Id
from .folders import is_hidden, looks_like_an_image
from .images import UnreadableImage, pass_over, read_image

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
# How many images of a set are looked at before a run, evenly over the set.
LOOKED_AT = 8


class FolderImages(Dataset):
    """The images of a folder by name, for prediction; `image_id` counts them from 1.

    Every image is turned as its EXIF orientation says, as viewers show it, and predictions are in pixels of that.
    Hidden files are left alone; other images that are not read are counted in a warning. `bad_images` is 'raise', or
    'skip', where a sample that cannot be read is None.
    """

    def __init__(
        self, folder: Path, in_chans: int, transforms: Callable, limit: int | None = None, bad_images: str = "raise"
    ) -> None:
        require("predict", folder, "folder", Path.is_dir)
        images = looks_like_an_image()
        found = [path for path in below(folder) if path.suffix.lower() in images]
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


def below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, but for hidden ones."""
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


def require(name: str, path: Path, what: str, holds: Callable[[Path], bool]) -> None:
    """Raise FileNotFoundError unless `path` is what the argument `name` expects."""
    if not holds(path):
        state = f"which is no {what}" if path.exists() else "which does not exist"
        raise FileNotFoundError(f"{name}: expected a {what}, got {str(path)!r}, {state}")
