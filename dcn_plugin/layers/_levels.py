"""What attention over several maps looks at in its arguments: messages have the names that a layer gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._check import is_long, pairs_of, require_dense, tensor
from ..ops._transforms import unrecorded, values_are_known
from .arguments import pair

Levels = list[tuple[int, int]]


class Names(NamedTuple):
    """What a layer calls its arguments."""

    query: str
    reference: str
    value: str
    shapes: str
    starts: str
    mask: str


@unrecorded
def check_levels(names: Names, given: Any, parameter: Any, width: int, levels: int, batch_first: bool = True) -> Levels:
    """Return (height, width) of each level if the arguments of a call fit together.

    `given` are the arguments in the order of `names`, batch first; `parameter` is one of the layer's (a
    quantised layer's is no tensor, and then no device is known to compare with).
    """
    query, reference, value, shapes, starts, mask = given
    for name, each, what in ((names.query, query, "Q"), (names.value, value, "S")):
        axes = f"[N, {what}, {width}]" if batch_first else f"[{what}, N, {width}]"
        tensor(each, name, 3, axes)
        if each.shape[2] != width:
            raise ValueError(f"{name}: expected {axes}, got {_said(each, batch_first)}")
        _on(each, name, parameter)
    images, queries, pixels = query.shape[0], query.shape[1], value.shape[1]
    sizes = _sizes(names.shapes, shapes, levels)
    total = sum(height * width for height, width in sizes)
    if value.shape[0] != images:
        raise ValueError(
            f"{names.value}: expected {images} images like {names.query}, got {value.shape[0]}"
            + _if_swapped(value, total, batch_first)
        )
    if total != pixels:
        raise ValueError(
            f"{names.shapes}: expected levels that add up to the {pixels} pixels of {names.value}, got {total} "
            f"from {sizes}" + _if_swapped(value, total, batch_first)
        )
    _check_starts(names.starts, starts, sizes, isinstance(shapes, Tensor))
    tensor(reference, names.reference, 4, f"[N, Q, {levels}, 2 or 4]")
    if (
        reference.shape[:2] != query.shape[:2]
        or reference.shape[2] not in (1, levels)
        or reference.shape[3] not in (2, 4)
    ):
        raise ValueError(
            f"{names.reference}: expected [{images}, {queries}, {levels} or 1, 2 (x, y) or 4 (x, y, w, h)], got "
            f"{list(reference.shape)}"
        )
    _on(reference, names.reference, parameter)
    if mask is not None:
        _check_mask(names.mask, mask, images, pixels, parameter)
    return sizes


def _if_swapped(value: Tensor, total: int, batch_first: bool) -> str:
    """Say how the first two axes are read, if the levels fit the other one.

    Asked only where a call is refused: the answer binds sizes that are symbols.
    """
    if value.shape[0] != total:
        return ""
    return " (the layer reads [N, S, C])" if batch_first else " (batch_first=False reads [S, N, C])"


def _said(value: Tensor, batch_first: bool) -> list[int]:
    return list(value.shape if batch_first else value.transpose(0, 1).shape)


def _on(value: Tensor, name: str, parameter: Any) -> None:
    if isinstance(parameter, Tensor) and value.device != parameter.device:
        raise ValueError(
            f"{name}: expected to be on {parameter.device} like the layer's parameters, got {value.device}"
        )


def _check_integers(name: str, given: Tensor, shape: list[int]) -> None:
    if list(given.shape) != shape or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers {shape}, got {given.dtype} {list(given.shape)}")


def _sizes(name: str, given: Any, levels: int) -> Levels:
    if isinstance(given, Tensor):
        _check_integers(name, given, [levels, 2])
        given = pairs_of(name, given)
    if len(_row(given)) != levels or any(len(_row(row)) != 2 for row in given):
        raise ValueError(f"{name}: expected {levels} pairs (H, W), or a tensor of them, got {given!r}")
    return [pair(name, size, 1) for size in given]


def _row(given: Any) -> Sequence[Any]:
    """What is in an order and has a length: lists, arrays, tensors. Nothing is in what is not."""
    return given if is_long(given) and not isinstance(given, (str, int, dict, set, frozenset)) else ()


def _check_starts(name: str, given: Any, sizes: Levels, waited: bool) -> None:
    """Check the first pixel of each level, which the sizes say too; on a device where that waits, if it `waited`."""
    if given is None:
        return
    if isinstance(given, Tensor):
        if not values_are_known(given) or given.is_meta or (given.is_cuda and not waited):
            return
        _check_integers(name, given, [len(sizes)])
        given = given.tolist()
    wanted, first = [], 0
    for height, width in sizes:
        wanted.append(first)
        first += height * width
    if len(_row(given)) != len(wanted) or any(i != first for i, first in zip(given, wanted, strict=True)):
        raise ValueError(f"{name}: expected {wanted}, where the levels begin, got {given}")


@unrecorded
def check_added(name: str, given: Any, query: Any, rows: str) -> None:
    """Check what is added to queries, which torch would repeat them for: one for each, or for all images or queries."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor {rows} like query, got {type(given).__name__}")
    tensor(query, "query", 3, rows)
    own, whole = given.shape, query.shape
    if len(own) > len(whole) or any(a != b and a != 1 for a, b in zip(own[::-1], whole[::-1], strict=False)):
        raise ValueError(f"{name}: expected {rows} like query, {list(whole)}, got {list(own)}")


def _check_mask(name: str, mask: Any, images: int, pixels: int, parameter: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a tensor of torch.bool, True where there is padding, or None, got {got}")
    require_dense(name, mask)
    if list(mask.shape) != [images, pixels]:
        raise ValueError(f"{name}: expected [{images}, {pixels}], one for each pixel, got {list(mask.shape)}")
    _on(mask, name, parameter)
