"""Annotation files in COCO's format, read and checked as a whole before anything runs."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from ..classes import Id, order

# Beyond this a number is no length in pixels, and float32 may not hold it.
_HUGE = 1e30


class Annotation(NamedTuple):
    """One object: `bbox` (x, y, width, height) in pixels of the image, and its area as the file gives it."""

    id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    iscrowd: int
    area: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The box as (x1, y1, x2, y2)."""
        x, y, width, height = self.bbox
        return x, y, x + width, y + height


class AnnotatedImage(NamedTuple):
    """One image: its path below the folder of images, (width, height) where the file has them, and its objects."""

    id: Id
    file_name: str
    size: tuple[int, int] | None
    annotations: list[Annotation]


class AnnotationFile:
    """What training and evaluation need of a file in COCO's format; everything else in it is left alone.

    `categories` are the names by id and `images` the images, both in ascending order of their ids, numbers before
    strings. An id is a whole number (1.0 is 1) or a string.

    Args:
        path: the file.
        split: what error messages call the split.

    Raises:
        ValueError: the file is no JSON, not in COCO's format, or its parts do not fit together. The message names the
            file, and the image, annotation or category.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.about = f"{split}.annotations: {path}"
        # The collector of garbage would go through all of a large file's objects again and again as they come.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._read(path)
        finally:
            if collects:
                gc.enable()

    def _read(self, path: Path) -> None:
        try:
            whole = json.loads(path.read_bytes())  # as bytes: UTF-8 whatever the locale, a byte order mark or not
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.about} is not JSON: {error}") from error
        if not isinstance(whole, Mapping):
            raise ValueError(f"{self.about} is not in COCO's format: expected a dict, got {whole!r:.60}")
        for key in ("images", "annotations", "categories"):
            if not isinstance(whole.get(key), list):
                got = f"{whole.get(key)!r:.60}"
                raise ValueError(f"{self.about} is not in COCO's format: expected a list {key!r}, got {got}")
        if not whole["categories"]:
            raise ValueError(f"{self.about} has no categories")
        categories, images, annotations = (self._by_id(whole, key) for key in ("categories", "images", "annotations"))
        self.categories = {key: self._name(key, categories[key]) for key in sorted(categories, key=order)}
        self.images = [self._image(key, images[key]) for key in sorted(images, key=order)]
        place = {image.id: image for image in self.images}
        for number, entry in annotations.items():
            place[self._image_of(number, entry, place)].annotations.append(self._annotation(number, entry))
        self._look_for_twins()

    def _by_id(self, whole: Mapping[str, list], key: str) -> dict[Id, Mapping[str, Any]]:
        entries: dict[Id, Mapping[str, Any]] = {}
        for number, entry in enumerate(whole[key]):
            if not isinstance(entry, Mapping):
                raise ValueError(f"{self.about}: {key}[{number}]: expected a dict, got {entry!r:.60}")
            found = _id(entry.get("id"))
            if found is None or found in entries:
                again = "" if found is None else f", which another one of {key!r} has too"
                raise ValueError(
                    f"{self.about}: {key}[{number}]: expected an 'id' of its own, a whole number or a string, "
                    f"got {entry.get('id')!r:.60}{again}"
                )
            entries[found] = entry
        return entries

    def _name(self, key: Id, entry: Mapping[str, Any]) -> str:
        name = entry.get("name", str(key))
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
            raise ValueError(f"{self.about}: category {key!r}: expected 'name', a string, got {name!r:.60}")
        return str(name)

    def _image(self, key: Id, entry: Mapping[str, Any]) -> AnnotatedImage:
        about = f"{self.about}: image {key!r}"
        name = entry.get("file_name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{about}: expected 'file_name', a path below the folder of images, got {name!r:.60}")
        sides = [entry[side] for side in ("width", "height") if side in entry]
        if not sides:
            return AnnotatedImage(key, name, None, [])
        if len(sides) < 2 or not all(_is_number(side) and side >= 1 and side == int(side) for side in sides):
            got = ", ".join(f"{side} {entry.get(side)!r:.60}" for side in ("width", "height"))
            raise ValueError(f"{about}: expected 'width' and 'height' in whole pixels, or neither, got {got}")
        return AnnotatedImage(key, name, (int(sides[0]), int(sides[1])), [])

    def _image_of(self, key: Id, entry: Mapping[str, Any], images: Mapping[Id, Any]) -> Id:
        found = _id(entry.get("image_id"))
        if found is None or found not in images:
            raise ValueError(
                f"{self.about}: annotation {key!r} is of image {entry.get('image_id')!r:.60}, which is not among the "
                f"images{_other_kind(found, images)}"
            )
        return found

    def _annotation(self, key: Id, entry: Mapping[str, Any]) -> Annotation:
        about = f"{self.about}: annotation {key!r}"
        category = _id(entry.get("category_id"))
        if category is None or category not in self.categories:
            raise ValueError(
                f"{about} has category {entry.get('category_id')!r:.60}, which is not among them"
                f"{_other_kind(category, self.categories)}"
            )
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(f"{about}: expected 'bbox' [x, y, width, height], four numbers, got {box!r:.60}")
        crowd = entry.get("iscrowd", 0)
        if not isinstance(crowd, (bool, int, float)) or crowd not in (0, 1):
            raise ValueError(f"{about}: expected 'iscrowd' 0 or 1, got {crowd!r:.60}")
        area = entry.get("area", max(box[2], 0) * max(box[3], 0))
        if not _is_number(area) or area < 0:
            raise ValueError(f"{about}: expected 'area' in square pixels, 0 or more, got {area!r:.60}")
        return Annotation(key, category, tuple(map(float, box)), int(crowd), float(area))  # type: ignore[arg-type]

    def _look_for_twins(self) -> None:
        used = {annotation.category_id for image in self.images for annotation in image.annotations}
        known: dict[str, Id] = {}
        for key, name in self.categories.items():
            # Some tools write a parent beside a class, with its name and without objects.
            if key in used and known.setdefault(name, key) != key:
                raise ValueError(
                    f"{self.about}: expected a name of its own for every category with objects, got {name!r} for "
                    f"categories {known[name]!r} and {key!r}"
                )
        files: dict[str, Id] = {}
        for image in self.images:
            if files.setdefault(image.file_name, image.id) != image.id:
                rank_zero_warn(
                    f"{self.about}: images {files[image.file_name]!r} and {image.id!r} are the same file, "
                    f"{image.file_name!r}: what one of them has annotated counts as background in the other"
                )
                break

    def check_files(self, folder: Path, split: str) -> None:
        """Raise FileNotFoundError naming the first image that is not a file below `folder`."""
        listed: dict[Path, set[str]] = {}  # one look at a folder instead of one at each of its files
        for image in self.images:
            path = Path(folder, image.file_name)
            if path.parent not in listed:
                listed[path.parent] = _files(path.parent)
            if path.name not in listed[path.parent]:
                said = "is no file" if path.is_dir() else "does not exist"
                where = self.about.split(": ", 1)[1]
                raise FileNotFoundError(f"{split}.images: {path} {said}, which {where} names for image {image.id!r}")


def _id(value: Any) -> Id | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return None if value == "" else value


def _other_kind(key: Id | None, known: Mapping[Id, Any]) -> str:
    """Say so where a number stands for a string, or a string for a number."""
    twin = next((other for other in known if str(other) == str(key)), None) if key is not None else None
    return "" if twin is None else f" (there is {twin!r}, which is a {'string' if isinstance(twin, str) else 'number'})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def _files(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}
