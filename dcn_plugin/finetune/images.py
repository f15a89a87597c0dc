"""Reading an image file as the file means it: its orientation, its bit depth, its name where it cannot be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

__all__ = ["UnreadableImage", "read_image"]

_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TELLS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # keys of Image.info
# Undoes the turns that exchange width and height.
_TURN_BACK = {**_TURN, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
# Formats whose grey values of more than 8 bits Pillow hands on, or stretches, to the whole of 0..65535.
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _SMALLEST, _LARGEST = 258, 262, 339, 340, 341  # TIFF's tags


#: What `bad_images` may say of images that cannot be read: stop at the first, or warn of each and go on without it.
BAD_IMAGES = ("raise", "skip")


class UnreadableImage(ValueError):
    """An image that cannot be read, or whose values the file does not explain; the message names it."""


def unreadable(name: str, error: Exception) -> UnreadableImage:
    """Return the error for an image of this name whose reading ended in `error`."""
    return UnreadableImage(f"unreadable image {name}: {said(error)}")


def pass_over(error: UnreadableImage, bad_images: str, instead: str) -> None:
    """Warn that an image is passed over, or raise its error where `bad_images` does not say 'skip'.

    `instead` says what becomes of it: 'it is left out', 'the next image is taken instead'.
    """
    if bad_images != "skip":
        raise UnreadableImage(f"{error} (with data.bad_images='skip' {instead})") from error.__cause__
    warnings.warn(f"{error}; {instead}", stacklevel=3)  # by whichever process met it: no other one will


def read_image(
    source: str | os.PathLike[str] | BinaryIO,
    mode: str = "RGB",
    *,
    size: tuple[int, int] | None = None,
    where: str | Callable[[], str] | None = None,
) -> Image.Image:
    """Read an image, turned as its EXIF orientation says, with 8 bits a channel.

    Grey values of more than 8 bits are scaled by what the file says of their range: the whole range of unsigned PNG,
    PGM, JPEG 2000 and TIFF samples, or TIFF's SMinSampleValue to SMaxSampleValue. Signed and floating-point samples
    without those two say nothing and are refused. Alpha is dropped, palettes are looked up, CMYK is converted, as
    Pillow does it.

    Args:
        source: a path, or a binary file, which stays open.
        mode: Pillow's mode of the result: 'RGB', 'L' (grey), ...
        size: width and height that annotations were made for. The image is turned where it then has that size, and left
            as it is stored where it has that size only unturned.
        where: what messages call the image, or a function that returns it; None means the path.

    Raises:
        UnreadableImage: a missing or damaged file, more pixels than Pillow reads (`PIL.Image.MAX_IMAGE_PIXELS`), values
            whose range is unknown.
        ValueError: an image of another size than `size`.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(file, 'PNG')
        >>> np.asarray(read_image(file, 'L')).tolist()
        [[0, 100, 255]]
    """

    def name() -> str:
        return where() if callable(where) else str(source if where is None else where)

    try:
        with Image.open(source) as file:
            _warn_of_many_pixels(file, name)
            stored = _orientation(file)
            image = interpret(file, mode)
    except Exception as error:  # Pillow's plug-ins raise whatever their parsing runs into
        raise unreadable(name(), error) from error
    if size is None or image.size == tuple(size):
        return image
    unturned = image.transpose(_TURN_BACK[stored]) if stored in _TURN else image
    if unturned.size == tuple(size):
        return unturned
    turned = f", turned by its EXIF orientation {'x'.join(map(str, image.size))}" if stored in _TURN else ""
    raise ValueError(
        f"image {name()}: expected {'x'.join(map(str, size))} pixels (width x height) as annotated, got "
        f"{'x'.join(map(str, unturned.size))}{turned}"
    )


def said(error: Exception) -> str:
    """Return what an error says, to be part of a sentence."""
    return str(error).rstrip(".") or type(error).__name__


def interpret(file: Image.Image, mode: str) -> Image.Image:
    """Return an image that somebody else has opened as `read_image` would; it outlives its file."""
    file.load()
    orientation = _orientation(file)  # Pillow has turned a TIFF by now, and nothing else
    image = file.transpose(_TURN[orientation]) if orientation in _TURN else file
    # A conversion to the mode that the image has is a copy.
    image = (_to_grey(file, image) or image).convert(mode)
    for key in _TELLS_ORIENTATION:  # what has been done is not to be done again
        image.info.pop(key, None)
    return image


def _warn_of_many_pixels(image: Image.Image, name: Callable[[], str]) -> None:
    # From twice its limit on Pillow raises; before that it warns, without saying of what.
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        warnings.warn(f"image {name()} has {pixels} pixels", Image.DecompressionBombWarning, stacklevel=4)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data, beside pixels that can be read
        return 1


def _to_grey(file: Image.Image, image: Image.Image) -> Image.Image | None:
    """Return an image of 8 bits for one of more bits in one channel, and None for every other."""
    tags = getattr(file, "tag_v2", {})  # TIFF alone
    given = [_single(tags.get(tag)) for tag in (_SMALLEST, _LARGEST)]
    bits = max(tags.get(_BITS_PER_SAMPLE, (8,)))
    if not image.mode.startswith(("I", "F")):
        if bits > 8 and None not in given and given != [0, 2**bits - 1]:
            raise ValueError(f"its values lie in {given}, and Pillow reads only the upper 8 of its {bits} bits")
        return None
    values = np.asarray(image)
    unsigned = _single(tags.get(_SAMPLE_FORMAT, 1)) == 1
    if bits == 32 and image.mode == "I" and unsigned:
        values = values.view(np.uint32)  # Pillow keeps them as if they were signed
    if file.format in _SIXTEEN_BITS and image.mode != "F":
        low, high = 0.0, 65535.0
    elif None not in given:
        low, high = map(float, given)
    elif file.format == "TIFF" and unsigned:
        low, high = 0.0, 2.0**bits - 1
    else:
        kind = "floating-point" if image.mode == "F" else "integer"
        advice = "; a TIFF does with SMinSampleValue and SMaxSampleValue" if file.format == "TIFF" else ""
        raise ValueError(f"its file does not say which of its {kind} values are black and white{advice}")
    if not low < high or np.isnan(values).any():
        got = f"{values.min()} to {values.max()}"
        raise ValueError(f"expected numbers between black {low:g} and white {high:g}, got {got}")
    scaled = ((values.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        scaled = 255 - scaled
    return Image.fromarray(scaled.astype(np.uint8))


def _single(value: Any) -> Any:
    """Return the one value of a TIFF tag, which may have one for each channel; None where they differ."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(set(value)) == 1 else None
