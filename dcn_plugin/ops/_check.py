"""Argument checks that operators share: an exception names the argument, what was expected and what came."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..reference._dense import require_dense as require_dense
from ._transforms import has_values, unrecorded

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# What the compiled operators take at most for a stride, a padding, ...: sums and products of such stay exact.
MOST = 2**30
# And for what is counted inside of regions: bins, parts, groups of channels, samples.
MOST_OF_REGION = 2**20


def integer(name: str, value: Any, least: int, most: int = MOST) -> int:
    """Return `value` as an int from `least` to `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        # Sizes that are symbols while tracing must stay symbols.
        number: Any = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    if number > most:
        raise ValueError(f"{name}: expected at most {most}, got {number}")
    return number


def integers(name: str, value: Any, least: int, lengths: tuple[int, ...] = (2,), most: int = MOST) -> tuple[int, ...]:
    """Return `value`, an integer (repeated) or a sequence of one of `lengths` integers, as a tuple."""
    if type(value) is tuple and len(value) in lengths:  # what a layer gives in every call
        for item in value:
            if type(item) is not int or not least <= item <= most:
                break
        else:
            return value
    if not isinstance(value, (tuple, list)) and not _is_sequence(value):
        return (integer(name, value, least, most),) * lengths[0]
    if len(value) not in lengths:
        allowed = " or ".join(map(str, lengths))
        raise ValueError(f"{name}: expected an integer or {allowed} integers, got {len(value)}: {value!r}")
    return tuple(integer(name, item, least, most) for item in value)


def _is_sequence(value: Any) -> bool:
    """Whether `value` holds several numbers: lists of config systems, arrays and tensors do, as for `nn.Conv2d`."""
    if isinstance(value, (int, torch.SymInt, str)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def is_long(value: Any) -> bool:
    """Whether `value` has a length; a tensor or an array of one number has none, though it has the method."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def pairs_of(name: str, table: Tensor) -> list[list[int]]:
    """Return what stands in a tensor of integer pairs, where that can be known."""
    # torch.compile leaves its graph here, reads them, and goes on with a graph for these levels.
    found = table.tolist() if not table.is_meta and has_values(table) else None
    if found is None or any(isinstance(size, torch.SymInt) for pair in found for size in pair):
        raise ValueError(
            f"{name}: expected pairs (H, W) of integers in place of a tensor whose numbers are not known (of a graph "
            f"that is made whole, of vmap, on meta), got one of shape {tuple(table.shape)}"
        )
    return found


def number(name: str, value: Any, positive: bool = False) -> float:
    """Return `value` as a finite float, above 0 if `positive`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt, Real)):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        found = float(value)
    except OverflowError:  # an integer beyond every float
        found = math.inf
    if not (abs(found) < math.inf and (found > 0 or not positive)):
        raise ValueError(f"{name}: expected a {'positive ' * positive}finite number, got {value}")
    return found


def tensor(value: object, name: str, dim: int | tuple[int, ...], shape: str) -> None:
    """Check that `value` is a dense floating-point tensor of (one of) `dim` dimensions; `shape` is how to say it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    require_dense(name, value)
    allowed = (dim,) if isinstance(dim, int) else dim
    if value.dim() not in allowed:
        dims = " or ".join(f"{d}-D" for d in allowed)
        raise ValueError(f"{name}: expected a {dims} tensor {shape}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {value.dtype}")


@unrecorded
def boxes(value: Sequence[Tensor], name: str, input: Tensor) -> None:
    """Check that `value` has boxes `[L, 4]` for each image of `input`."""
    if len(value) != input.shape[0]:
        raise ValueError(f"{name}: expected {input.shape[0]} tensors [L, 4], one for each image, got {len(value)}")
    for i, own in enumerate(value):
        tensor(own, f"{name}[{i}]", 2, "[L, 4]")
        if own.shape[1] != 4:
            raise ValueError(f"{name}[{i}]: expected shape [L, 4] (x1, y1, x2, y2), got {tuple(own.shape)}")
        same_device(own, f"{name}[{i}]", input)


def shape(value: Tensor, name: str, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")


def same_device(value: Tensor, name: str, input: Tensor, input_name: str = "input") -> None:
    if value.device != input.device:
        raise ValueError(f"{name}: expected to be on {input.device} like {input_name}, got {value.device}")


def same_dtype(value: Tensor, name: str, input: Tensor, or_float32: bool = False, input_name: str = "input") -> None:
    """Check the type of `value` against the input's; under autocast types are brought together later."""
    if value.dtype == input.dtype or (or_float32 and value.dtype == torch.float32 and input.dtype != torch.float64):
        return
    if input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type):
        return
    also = " or torch.float32" if or_float32 and input.dtype not in (torch.float32, torch.float64) else ""
    article = "an" if input_name == "input" else "a"
    raise TypeError(
        f"{name}: expected {input.dtype}{also} beside {article} {input_name} of {input.dtype}, got {value.dtype}"
    )
