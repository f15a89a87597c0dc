"""A page to point at: where each output pixel of deformable layers samples the image, in one file of HTML.

The page's parts lie in `page/`: its markup and style, `points.js`, which knows where taps read, and `explore.js`, which
draws and tells it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor, nn

from ._figure import as_colours, asking_for_matplotlib
from .convolutions import LayerRecord, labels, record

__all__ = ["explore"]

_PARTS = Path(__file__).with_name("page")
_LARGEST = 32767  # of a 16-bit integer


def explore(
    model: nn.Module,
    image: Tensor,
    path: str | os.PathLike[str],
    layers: int | str | Sequence[str] | None = None,
    picture: Tensor | None = None,
    call: int | None = None,
    title: str | None = None,
    limit_mb: float = 32.0,
) -> Path:
    """Write a page on which each output pixel of deformable layers shows where its taps read the image.

    Pointing at the image, tapping it or the arrow keys choose a pixel of a layer's output. The page shows its taps, or
    those through up to three layers, carried to the image as `trace` does: K^L points for L layers, the product of
    their modulations as opacity. Beside them stand the effective dilation (see `effective_dilation`) of the pixel and
    of the whole map, a histogram of the lengths of all offsets, the numbers of each tap, and on request the plain grid.

    The file needs nothing else and asks no network: it opens from the disk. Offsets and masks are stored as 16-bit
    integers in steps of the smallest power of two that reaches the layer's largest value; half a step, which the page
    names, is the largest error: 1/8192 of a pixel where offsets stay below eight. It takes about
    16/3 * G*K*H'*W' bytes for the offsets of a layer, and half of that for a mask.

    Args:
        model: any module with layers that `record` knows: convolutions and aggregations with a window, attention to a
            deformed grid, and layers of one's own that keep the contract. It runs once, in eval mode.
        image: [C, H, W] (or [1, C, H, W]) as the model takes it: floating-point numbers, normalised for most models.
        path: file to write; replaced only by a whole one.
        layers: names of the layers to show, one name, or how many of the last ones; None shows all. Consecutive ones
            are followed through each other.
        picture: [C, H, W] to draw instead of `image`, for example before normalisation.
        call: which call of each layer to show, where one runs several times: 0 is the first, -1 the last; None shows
            all.
        title: heading of the page; None names the model's class.
        limit_mb: largest file that is written, in 10^6 bytes.

    Returns:
        The path.

    Raises:
        ValueError: several images, one of integers, no such layers (see `record`), offsets or masks that are not
            finite, a page larger than `limit_mb`.
        FileNotFoundError, IsADirectoryError: no folder to write to, a folder in place of a file.

    Example:
        >>> import tempfile, torch
        >>> from dcn_plugin.layers import DCNv2
        >>> model = torch.nn.Sequential(DCNv2(3, 8, 3, padding=1), DCNv2(8, 8, 3, padding=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = explore(model, torch.rand(3, 16, 16), f"{folder}/page.html")
        ...     page.read_text().splitlines()[0]
        '<!doctype html>'

    Source: Dai et al., Deformable Convolutional Networks, 2017, figure 6 (the 9^3 points of three layers) and table 2.
    """
    if image.dim() not in (3, 4) or image.dim() == 4 and len(image) != 1:
        raise ValueError(f"image: expected one, [C, H, W] or [1, C, H, W], got {list(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"image: expected floating-point numbers, as the model takes them, got {image.dtype}")
    if isinstance(layers, int) and layers < 1:
        raise ValueError(f"layers: expected at least 1 layer, got {layers}")
    if not limit_mb > 0:
        raise ValueError(f"limit_mb: expected a positive number, got {limit_mb}")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got {path}, which is a folder")
    image = image.reshape(image.shape[-3:])
    records = record(model, image, None if isinstance(layers, int) else layers, call)
    if isinstance(layers, int):
        records = records[-layers:]
    names = [name or type(item.layer).__name__ for name, item in zip(labels(records), records, strict=True)]
    data = {
        "size": list(image.shape[-2:]),
        "picture": f"data:image/png;base64,{_text_of(_as_png(image, picture))}",
        "layers": [_described(name, item) for name, item in zip(names, records, strict=True)],
    }
    heading = f"Where {type(model).__name__} samples" if title is None else title
    # Names of files may have bytes that are no text, which Python keeps as halves of a character.
    text = _page(heading.encode("utf-8", "replace").decode("utf-8"), data)
    if (size := len(text.encode())) > limit_mb * 1e6:
        raise ValueError(
            f"limit_mb: expected at least {math.ceil(size / 1e5) / 10} for this image and {', '.join(names)}, got "
            f"{limit_mb:g}; fewer `layers` or a smaller image need less"
        )
    return _write(path, text)


# -- what the page is told --------------------------------------------------------------------------------------------


def _described(name: str, item: LayerRecord) -> dict[str, Any]:
    """Return one call of a layer as `points.js` reads it: each pixel's numbers side by side, for each offset group."""
    offset, mask, window = item.offset[0], None if item.mask is None else item.mask[0], item.window
    groups = len(offset)
    if window is None:  # the samples of a grid are the taps of all outputs
        assert item.places is not None
        first, stride, size = item.places.reshape(-1, 2), (0.0, 0.0), item.input_size
    else:
        first, stride, size = item.taps(), window.stride, (offset.shape[-2], offset.shape[-1])
    return {
        "name": name,
        "kind": type(item.layer).__name__,
        "map": list(size),
        "input": list(item.input_size),
        "groups": groups,
        "shared": window is None,
        "kernel": None if window is None else list(window.kernel_size),
        "stride": list(stride),
        "first": first.tolist(),
        "grid": item.grid,
        "outGrid": item.out_grid,
        "offset": _packed(name, "offsets", offset.permute(0, 3, 4, 1, 2)),
        "mask": None if mask is None else _packed(name, "masks", mask.permute(0, 2, 3, 1)),
    }


def _packed(name: str, what: str, values: Tensor) -> dict[str, Any]:
    """Return values as 16-bit integers, little-endian in base64, and the power of two that they count."""
    largest = values.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(f"model: expected finite {what}, got {largest} in {name}")
    step = math.ldexp(1.0, math.frexp(largest / _LARGEST)[1])
    return {"step": step, "data": _text_of((values / step).round().numpy().astype("<i2").tobytes())}


def _as_png(image: Tensor, picture: Tensor | None) -> bytes:
    with asking_for_matplotlib():
        from matplotlib.image import imsave

    file = BytesIO()
    imsave(file, as_colours(image, picture), format="png")
    return file.getvalue()


def _text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# -- the file ---------------------------------------------------------------------------------------------------------


def _page(title: str, data: dict[str, Any]) -> str:
    """Put the page's parts together. Its policy lets a browser run this script and this style, and load nothing."""
    style = (_PARTS / "explore.css").read_text(encoding="utf-8")
    script = "".join((_PARTS / name).read_text(encoding="utf-8") for name in ("points.js", "explore.js"))
    # No string can end the element that it stands in, or begin another.
    told = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        told = told.replace(letter, f"\\u{ord(letter):04x}")
    return Template((_PARTS / "explore.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), data=told, style=style, script=script,
        style_hash=_hash_of(style), script_hash=_hash_of(script),
    )  # fmt: skip


def _hash_of(text: str) -> str:
    return f"sha256-{_text_of(hashlib.sha256(text.encode()).digest())}"


def _write(path: Path, text: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        whole.write_text(text, encoding="utf-8", newline="\n")
        os.replace(whole, path)
    return path
