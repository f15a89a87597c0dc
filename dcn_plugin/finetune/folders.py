"""Class folders and tar files of them, as they are found: the class of an image is the folder below the split."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from timm.data import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

# What systems leave beside images without a dot before its name: macOS's archives, Synology's thumbnails.
_HIDDEN = ("__MACOSX", "@eaDir")
# Endings of images that Pillow does not know, and those that it knows and that are documents, films or tables.
_OTHER_IMAGES = {".heic", ".heif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
_NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib"}


class ClassFolders(Reader):
    """The images of a split, by timm's interface for readers: `reader[i]` is an open file and a label.

    The class of an image is the first folder on its way from the split (in a tar file: from the last folder that holds
    everything); what lies deeper belongs to it. Files and folders whose name starts with a dot, `__MACOSX` and
    `@eaDir` are left out.

    Args:
        root: a folder, or a tar file, which may hold one tar file for each class.
        stage: what messages call the split.
        class_map: class name -> label, or a file of it as timm reads it; folders of other names are left out. None
            numbers the folders in natural order.
        input_key: endings of the files to read, as `'.png;.webp'`; None takes timm's.
        labelled: whether images must lie in class folders; where not, labels are None.
        order: sorts the names of the classes; None is natural order ('n2' before 'n10'), as in timm.

    Raises:
        FileNotFoundError: no images.
        ValueError: a class folder without images, an image beside the class folders, a file that is no tar.
    """

    def __init__(
        self,
        root: str | Path,
        stage: str = "train",
        *,
        class_map: str | Mapping[str, int] | None = None,
        input_key: str | None = None,
        labelled: bool = True,
        order: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        endings = input_key.split(";") if input_key else get_img_extensions()
        self.endings = tuple(f".{ending.strip().lstrip('.').lower()}" for ending in endings)
        found = list(_in_tar(self.root, stage) if self.root.is_file() else _in_folder(self.root))
        taken = [place for place in found if place.ending in self.endings]
        others = Counter(place.ending for place in found if place.ending in looks_like_an_image(self.endings))
        self._warn(stage, others)
        if not taken:
            kinds = f", but {_counted(others)}" if others else ""
            raise FileNotFoundError(
                f"root: no class folders and no images in {self.root} for the {stage} split (looked for "
                f"{' '.join(self.endings)}{kinds})"
            )
        if self.root.is_file():
            _strip_common_folders(taken)
        self.class_to_idx: dict[str, int] = {}
        if labelled:
            self.class_to_idx = self._number(stage, taken, class_map, order or natural_key)
            left_out = Counter(place.class_name for place in taken if place.class_name not in self.class_to_idx)
            if left_out:
                rank_zero_warn(f"{stage}_split: class_map leaves out {_counted(left_out)} of {self.root}")
            taken = [place for place in taken if place.class_name in self.class_to_idx]
        self.places = sorted(taken, key=lambda place: natural_key(place.name))

    def _warn(self, stage: str, others: Mapping[str, int]) -> None:
        if others:
            key = ";".join([*self.endings, *sorted(set(others) & set(Image.registered_extensions()))])
            rank_zero_warn(
                f"{stage}_split: {self.root} holds images that are not read: {_counted(others)} (those that Pillow "
                f"knows are with data.dataset=dict(input_key={key!r}))"
            )

    def _number(self, stage: str, taken: Sequence[Place], class_map: Any, order: Callable) -> dict[str, int]:
        loose = next((place for place in taken if not place.class_name), None)
        if loose is not None:
            raise ValueError(f"root: image {loose.name} is not in a class folder of {self.root}")
        names = {place.class_name for place in taken}
        if class_map:
            try:
                return dict(load_class_map(class_map, str(self.root if self.root.is_dir() else self.root.parent)))
            except (AssertionError, OSError, ValueError) as error:
                raise ValueError(
                    f"class_map: expected a dict or a .txt file of names, got {class_map!r}: {error}"
                ) from error
        if self.root.is_dir():
            for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
                if entry.is_dir() and not is_hidden(entry.name) and entry.name not in names:
                    raise ValueError(
                        f"root: class folder {entry.path} has no images (looked for {' '.join(self.endings)})"
                    )
        return {name: label for label, name in enumerate(sorted(names, key=order))}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        place = self.places[index]
        return place.open(), self.class_to_idx.get(place.class_name)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.places[index].name
        if basename:
            return PurePosixPath(name).name
        return str(self.root / name) if absolute and self.root.is_dir() else name


class Place:
    """Where an image lies: a path below the split, and its bytes."""

    __slots__ = ("name", "class_name", "file", "start", "size")

    def __init__(self, name: str, file: str, start: int = 0, size: int | None = None) -> None:
        self.name, self.file, self.start, self.size = name, file, start, size
        folder, inside, _ = name.partition("/")
        self.class_name = sys.intern(folder) if inside else ""

    @property
    def ending(self) -> str:
        return os.path.splitext(self.name)[1].lower()

    def open(self) -> BinaryIO:
        # Opened anew for every image: processes that share an open file share its position, too.
        file = open(self.file, "rb")
        if self.size is None:
            return file
        with file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))


def looks_like_an_image(except_for: Iterable[str] = ()) -> set[str]:
    """Return the endings of image files, whether Pillow reads them or not."""
    return (set(Image.registered_extensions()) | _OTHER_IMAGES) - _NO_IMAGES - set(except_for)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is the system's or a program's rather than the user's."""
    return name.startswith(".") or name in _HIDDEN


def _in_folder(root: Path) -> Iterator[Place]:
    def walk(folder: str, below: str, above: tuple[str, ...]) -> Iterator[Place]:
        above = (*above, os.path.realpath(folder))
        for entry in os.scandir(folder):
            if is_hidden(entry.name):
                continue
            if not entry.is_dir():
                yield Place(below + entry.name, entry.path)
            elif os.path.realpath(entry.path) not in above:  # a link may lead back
                yield from walk(entry.path, f"{below}{entry.name}/", above)

    return walk(str(root), "", ())


def _in_tar(root: Path, stage: str) -> Iterator[Place]:
    def walk(tar: tarfile.TarFile, below: str, start: int) -> Iterator[Place]:
        for member in tar:
            parts = [part for part in PurePosixPath(member.name).parts if part not in (".", "/")]
            if not member.isfile() or any(map(is_hidden, parts)):
                continue
            begin = start + member.offset_data
            if not member.name.lower().endswith(".tar"):
                yield Place(below + "/".join(parts), str(root), begin, member.size)
                continue
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:  # a tar for each class
                yield from walk(inner, f"{below}{parts[-1][:-4]}/", begin)

    try:
        with tarfile.open(root, mode="r:") as tar:  # compressed, nothing in it could be found without reading all
            yield from walk(tar, "", 0)
    except tarfile.ReadError as error:
        wanted = "expected a folder or an uncompressed tar file"
        raise ValueError(f"{stage}_split: {wanted}, got {root}: {error}") from error


def _strip_common_folders(places: Sequence[Place]) -> None:
    """Take the class from below what holds all classes, as in `train/cat/1.jpg` of a tar made of the folder `train`."""
    parts, depth = [place.name.split("/") for place in places], 0
    while len({part[depth] for part in parts}) == 1 and min(map(len, parts)) > depth + 2:
        depth += 1
    for place, part in zip(places, parts, strict=True):
        place.class_name = part[depth] if len(part) > depth + 1 else ""


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name or '(no folder)'}" for name, count in sorted(counts.items()))
