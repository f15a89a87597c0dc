"""Masks of classes as image files: ids in one channel, or the indices of a palette."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..visualize import class_colours
from .images import unreadable

# Pillow's modes with one number a pixel; of a palette that is the index, of two colours 0 and 1.
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Where the header of a PNG file has the bits of a sample.
_PNG_DEPTH = 24


def read_mask(path: Path, num_classes: int, ignore_index: int) -> np.ndarray:
    """Read a mask, [H, W]: the file's numbers, or the indices of its palette, as they are.

    The type is uint8 where that holds the classes and `ignore_index`, else int64.

    Raises:
        UnreadableImage: a missing or damaged file.
        ValueError: an image in colours, whose classes nobody can tell; a number that is neither a class nor
            `ignore_index`. The message names the file.
    """
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            file.load()
            mode, numbers = file.mode, np.asarray(file)
            stream.seek(_PNG_DEPTH)
            bits = stream.read(1)[0] if file.format == "PNG" else 8
    except Exception as error:  # Pillow's plug-ins raise whatever their parsing runs into
        raise unreadable(str(path), error) from error
    if mode not in _MODES:
        raise ValueError(
            f"mask {path}: expected class ids in one channel, or a palette whose indices they are, got {mode}"
        )
    values = numbers.astype(np.int64)
    if mode == "L" and bits in (2, 4):  # Pillow stretches these, and no others, to 0..255
        values //= 255 // (2**bits - 1)
    wrong = ((values < 0) | (values >= num_classes)) & (values != ignore_index)
    if wrong.any():
        raise ValueError(
            f"mask {path}: expected class ids 0 to {num_classes - 1}, or {ignore_index} where none is right, got "
            f"{values[wrong][0]} ({wrong.sum()} of {wrong.size} pixels are wrong)"
        )
    return values.astype(np.uint8) if max(num_classes - 1, ignore_index) <= 255 else values


def with_palette(mask: np.ndarray) -> Image.Image:
    """Return a mask [H, W] as an image that reads back as the mask.

    One of uint8 has a palette with PASCAL VOC's colours; any other has gray values of 16 bits, the classes themselves.
    """
    if mask.dtype != np.uint8:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask)
    image.putpalette(class_colours().flatten().tolist())
    return image
