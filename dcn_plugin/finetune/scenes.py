"""The embedded scenes: real handwritten digits among clutter, written as a COCO-format set with masks beside."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .digits import SPLITS, _source
from .masks import with_palette

STAMP = "scenes.json"
# Part of the stamp: another way of drawing needs another number, so that no old folder passes for a new one.
VERSION = 2
CLASSES = [str(digit) for digit in range(10)]
# From which brightness on a pixel counts as ink, out of 255; the boxes are those of the ink. From `EDGE` on it is part
# of a digit's soft edge, which masks leave open.
INK, EDGE = 48, 24
# What masks have where no class is right.
IGNORED = 255


def _ink(pixels: np.ndarray, height: int, stretch: float, angle: float) -> np.ndarray:
    """Return a small picture enlarged to `height`, stretched and turned, cut to its ink: uint8 [h, w]."""
    width = max(1, round(height * stretch * pixels.shape[1] / pixels.shape[0]))
    # A frame of one dark pixel, so that ink at the picture's own edge ends as softly as everywhere else.
    height, width = (round(side * (n + 2) / n) for side, n in zip((height, width), pixels.shape, strict=True))
    pixels = np.pad(pixels, 1)
    large = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    turned = np.asarray(large.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    rows, columns = np.nonzero(turned >= INK)
    if not len(rows):
        return turned[:0, :0]
    return turned[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _overlap(box: Sequence[int], others: Sequence[Sequence[int]]) -> float:
    """Return the largest share of the smaller of two boxes that `box` has in common with one of the others."""
    worst = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            worst = max(worst, width * height / smaller)
    return worst


def _place(
    rng: np.random.RandomState, canvas: np.ndarray, ink: np.ndarray, taken: list[list[int]], overlap: float
) -> list[int] | None:
    """Draw `ink` where it shares at most `overlap` with what is there; return its box, or None if it found no place."""
    height, width = ink.shape
    if not ink.size or max(height, width) > canvas.shape[0]:
        return None
    for _ in range(25):
        y, x = (int(rng.randint(0, canvas.shape[0] - side + 1)) for side in (height, width))
        box = [x, y, x + width, y + height]
        if _overlap(box, taken) <= overlap:
            region = canvas[y : y + height, x : x + width]
            np.maximum(region, ink, out=region)
            return box
    return None


def _mark(mask: np.ndarray, ink: np.ndarray, seen: np.ndarray, value: int) -> None:
    """Enter a digit into a part of a mask, where no brighter one covers it; its soft edge stays open."""
    mask[(ink >= INK) & seen] = value
    mask[(ink >= EDGE) & (ink < INK) & (mask == 0)] = IGNORED


def _strokes(rng: np.random.RandomState, size: int, count: int) -> np.ndarray:
    """Return `count` long bent lines as uint8 [size, size], soft like enlarged digits, but longer and thinner."""
    fine = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(fine)
    for _ in range(count):
        ends = rng.uniform(-0.2, 2.2, size=(3, 2)) * size
        t = np.linspace(0.0, 1.0, 24)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
        draw.line([tuple(point) for point in curve.tolist()], fill=int(rng.randint(110, 230)), width=rng.randint(3, 7))
    return np.asarray(fine.resize((size // 2, size // 2), Image.Resampling.BOX).resize((size, size)))


class Scene(NamedTuple):
    """A picture uint8 [size, size], boxes [x1, y1, x2, y2] and labels 0..9 of its digits, and its mask.

    The mask is uint8 [size, size]: label + 1 on a digit's ink, 255 on its soft edge, 0 elsewhere.
    """

    image: np.ndarray
    boxes: list[list[int]]
    labels: list[int]
    mask: np.ndarray


def draw_scene(
    split: str,
    index: int,
    *,
    size: int = 128,
    digits: Sequence[int] = (3, 6),
    digit_size: Sequence[int] = (22, 46),
    degrees: float = 25.0,
    stretch: Sequence[float] = (0.75, 1.25),
    strokes: int = 3,
    fragments: int = 8,
    noise: float = 12.0,
    overlap: float = 0.1,
    seed: int = 0,
) -> Scene:
    """Draw scene `index` of a split: digits of that split's own source images, and clutter.

    Everything is drawn from `(seed, split, index)` alone. Clutter is long strokes, fragments (quarters of digits, drawn
    smaller than any digit), a brightness that drifts over the canvas, and noise.

    Args:
        split: 'train', 'val' or 'test'; no source image is in two of them (see `Digits`).
        index: number of the scene.
        size: height and width of the canvas in pixels.
        digits: fewest and most digits of a scene (fewer where no room is left).
        digit_size: smallest and largest height of a digit before it is turned, in pixels.
        degrees: largest rotation to either side.
        stretch: smallest and largest width in relation to the height.
        strokes: number of strokes.
        fragments: number of fragments.
        noise: standard deviation of the noise, out of 255.
        overlap: largest share of the smaller of two boxes that they may have in common.
        seed: seed of everything.

    Returns:
        Image uint8 [size, size]; tight boxes of the drawn ink as [x1, y1, x2, y2] (x2 and y2 exclusive); labels 0..9;
        mask (see `Scene`).

    Raises:
        ValueError: unknown split, or a size, number or range that makes no sense.

    Example:
        >>> image, boxes, labels, mask = draw_scene('test', 0)
        >>> image.shape == mask.shape, 3 <= len(boxes) == len(labels) <= 6
        (True, True)
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    ranges = dict(digits=(digits, 1, 100), digit_size=(digit_size, 12, size), stretch=(stretch, 0.1, 10.0))
    for name, (value, low, high) in ranges.items():
        if len(value) != 2 or not low <= value[0] <= value[1] <= high:
            raise ValueError(f"{name}: expected (smallest, largest) within {low}..{high}, got {tuple(value)}")
    for name, number in dict(degrees=degrees, strokes=strokes, fragments=fragments, noise=noise).items():
        if number < 0:
            raise ValueError(f"{name}: expected 0 or more, got {number}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected 0 <= overlap < 1, got {overlap}")
    # RandomState's stream is frozen by numpy's compatibility promise; a Generator's is not.
    rng = np.random.RandomState([seed, list(SPLITS).index(split), index])
    images, targets = _source()
    first, last = SPLITS[split]

    def source() -> tuple[np.ndarray, int]:
        chosen = rng.randint(first, last)
        return images[chosen, 0].numpy(), int(targets[chosen])

    canvas, mask = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(rng.randint(digits[0], digits[1] + 1)):
        pixels, label = source()
        height = int(rng.randint(digit_size[0], digit_size[1] + 1))
        ink = _ink(pixels, height, rng.uniform(stretch[0], stretch[1]), rng.uniform(-degrees, degrees))
        shown = (ink * rng.uniform(0.65, 1.0)).astype(np.uint8)
        box = _place(rng, canvas, shown, boxes, overlap)
        if box is not None:
            boxes.append(box)
            labels.append(label)
            here = slice(box[1], box[3]), slice(box[0], box[2])
            _mark(mask[here], ink, shown == canvas[here], label + 1)
    taken = list(boxes)
    for _ in range(fragments):
        pixels, _ = source()
        y, x = rng.randint(0, 5, size=2)
        height = int(rng.randint(digit_size[0] // 4, digit_size[0] // 2 + 1))
        ink = _ink(pixels[y : y + 4, x : x + 4], height, rng.uniform(stretch[0], stretch[1]), rng.uniform(-180, 180))
        box = _place(rng, canvas, (ink * rng.uniform(0.65, 1.0)).astype(np.uint8), taken, overlap)
        if box is not None:
            taken.append(box)
    canvas = np.maximum(canvas, _strokes(rng, size, strokes))
    drift = Image.fromarray(rng.randint(0, 70, size=(4, 4)).astype(np.uint8))
    background = np.asarray(drift.resize((size, size), Image.Resampling.BICUBIC))
    noisy = np.maximum(canvas, background) + noise * rng.standard_normal((size, size))
    return Scene(noisy.round().clip(0, 255).astype(np.uint8), boxes, labels, mask)


def write_scenes(
    root: str | Path, *, train: int = 200, val: int = 50, test: int = 100, limit: int | None = None, **options: Any
) -> Path:
    """Write scenes as a COCO-format set below `root` and return it; a set with the same arguments there is left alone.

    `root` gets `images/<split>/*.png` (gray), `annotations/instances_<split>.json` (category id = digit + 1),
    `masks/<split>/*.png` (with a palette: digit + 1, 0 elsewhere, 255 on soft edges) and a stamp with the arguments.
    The set is written beside `root` and moved there when it is whole, so what has a stamp is complete; a set with other
    arguments is replaced.

    Args:
        root: folder of the set; made if missing.
        train, val, test: number of scenes of each split.
        limit: at most so many scenes of each split.
        options: arguments of `draw_scene`.

    Raises:
        ValueError: an unknown option, or a value that makes no sense.
        FileExistsError: `root` is a folder with other contents.

    Example:
        >>> import os, tempfile
        >>> root = write_scenes(os.path.join(tempfile.mkdtemp(), 'scenes'), train=2, val=1, test=1)
        >>> sorted(path.name for path in root.iterdir())
        ['annotations', 'images', 'masks', 'scenes.json']
    """
    root = Path(root)
    counts = dict(train=train, val=val, test=test)
    for name, count in dict(counts, limit=1 if limit is None else limit).items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1 scene, got {count}")
    stamp = scene_stamp(**{name: min(count, limit or count) for name, count in counts.items()}, **options)
    if _is_written(root, stamp):
        return root
    if root.exists() and not (root / STAMP).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root: expected a folder for the scenes, got {str(root)!r}, which holds something else")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        for split in counts:
            _write_split(partial, split, stamp[split], stamp["options"])
        (partial / STAMP).write_text(json.dumps(stamp, indent=2))
        _move(partial, root, stamp)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def scene_stamp(train: int = 200, val: int = 50, test: int = 100, **options: Any) -> dict[str, Any]:
    """Return what tells one set of scenes from another: every argument, also those left at their defaults."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(draw_scene).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in known:
            raise ValueError(f"scenes: unknown option {name!r}; known: train, val, test, limit, {', '.join(known)}")
    stamp = dict(version=VERSION, train=train, val=val, test=test, options=known | options)
    return json.loads(json.dumps(stamp))


def folder_of_scenes(root: str | Path | None, scenes: Mapping[str, Any]) -> Path:
    """Return `root`, or the folder of the user's cache for scenes with these arguments of `write_scenes`."""
    stamp = scene_stamp(**{key: value for key, value in scenes.items() if key != "limit"})
    if root is not None:
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    stamp |= dict(limit=scenes.get("limit"))
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
    return Path(base, "dcn_plugin", f"digit_scenes-{digest}")


def _is_written(root: Path, stamp: Mapping[str, Any]) -> bool:
    try:
        return json.loads((root / STAMP).read_text()) == stamp
    except (OSError, ValueError):
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_split(root: Path, split: str, count: int, options: Mapping[str, Any]) -> None:
    folder, masks = (root / kind / split for kind in ("images", "masks"))
    for made in (folder, masks):
        made.mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        pixels, boxes, labels, mask = draw_scene(split, index, **options)
        name = f"{index:06d}.png"
        Image.fromarray(pixels).save(folder / name)
        with_palette(mask).save(masks / name)
        height, width = pixels.shape
        images.append(dict(id=index + 1, file_name=name, height=height, width=width))
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=label + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=0,
                )
            )
    categories = [dict(id=label + 1, name=name, supercategory="digit") for label, name in enumerate(CLASSES)]
    whole = dict(info=dict(description="digit scenes"), images=images, annotations=annotations, categories=categories)
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole))


def _move(partial: Path, root: Path, stamp: Mapping[str, Any]) -> None:
    """Put a whole set in its place; another process that was faster with the same set wins."""
    old = None
    if root.exists():
        if _is_written(root, stamp):
            return
        old = partial.with_name(partial.name + ".old")
        with contextlib.suppress(FileNotFoundError):  # the other process is about to put its own here
            root.rename(old)
    try:
        partial.rename(root)
    except OSError:
        if not _is_written(root, stamp):
            raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
