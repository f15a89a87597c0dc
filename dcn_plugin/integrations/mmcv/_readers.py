"""What stands under NumPy's and MMEngine's names while `torch.load` reads a checkpoint.

NumPy's own `dtype` believes a file that says which bytes are objects, and NumPy then follows them. These readers take
numbers and text, and refuse everything else. What they make is NumPy's and MMEngine's: `np.float64`, `HistoryBuffer`;
an array is of a subclass of `np.ndarray`, as torch gives a state only to types that are allowed.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Numbers, and text of a fixed length. No objects, no records, no dates.
_CODE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5}")
_STATISTICS = ("min", "max", "current", "mean")


def _is_code(code: Any) -> bool:
    return type(code) is str and _CODE.fullmatch(code) is not None


class Dtype:
    """A dtype while it is read: NumPy's own would take all that a file states of it."""

    value: np.dtype | None = None

    def __setstate__(self, state: Any) -> None:
        """Take the order of the bytes; a subtype, fields and flags (but 8, of text) are for others."""
        plain = type(state) is tuple and len(state) == 8 and state[1] in ("<", ">", "|")
        if self.value is None or not plain or any(part is not None for part in state[2:5]) or state[7] not in (0, 8):
            raise ValueError(f"dtype: expected the order of bytes and no fields or flags, got {state!r}")
        self.value = self.value.newbyteorder(state[1])


def dtype(code: Any, *_: Any) -> Any:
    """Read `numpy.dtype`. Where others have allowed NumPy's own, their functions take nothing else, so it is that."""
    if not _is_code(code):
        raise ValueError(f"dtype: expected one of numbers or text, such as 'f8', got {code!r}")
    made = np.dtype(code, False, True)  # a copy, as NumPy reads it
    if {np.dtype, type(made)} <= set(torch.serialization.get_safe_globals()):
        return made
    reader = Dtype()
    reader.value = made
    return reader


def _checked(given: Any) -> np.dtype:
    """Return a dtype of its own: one that a file has given a state may lie about what it holds."""
    found = given.value if type(given) is Dtype else given
    code = found.str if isinstance(found, np.dtype) else None
    if isinstance(found, np.dtype) and found.kind == "U":
        code = f"{code[0]}U{found.itemsize // 4}"  # type: ignore[index]
    if code is None or not _is_code(code[1:]):
        raise ValueError(f"dtype: expected one of numbers or text, got {found!r}")
    return np.dtype(code)


class Array(np.ndarray):
    """An array that checks the state that a file has for it. It is pickled as NumPy's."""

    def __new__(cls, *_: Any) -> Array:
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: Any) -> None:
        if self.size:  # somebody may read from the memory that it has
            raise ValueError("array: expected one state, got a second")
        if type(state) is not tuple or len(state) != 5:
            raise ValueError(f"array: expected version, shape, dtype, order and bytes, got {type(state).__name__}")
        _, shape, kind, by_columns, data = state
        kind = _checked(kind)
        sizes = type(shape) is tuple and len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
        # Sizes beside a 0 are free, and numbers all the same.
        if not sizes or math.prod(max(n, 1) for n in shape) > 2**40:
            raise ValueError(f"array: expected a tuple of at most 32 sizes, got {shape!r}")
        length = math.prod(shape) * kind.itemsize
        if type(data) is not bytes or len(data) != length:
            got = f"{len(data)}" if type(data) is bytes else type(data).__name__
            raise ValueError(f"array: expected {length} bytes for shape {shape}, got {got}")
        if kind.kind == "U":  # numbers that are no characters raise here
            data.decode("utf-32-be" if kind.str[0] == ">" else "utf-32-le", "surrogatepass")
        super().__setstate__((1, shape, kind, by_columns is True, data))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def array(*_: Any) -> Array:
    """Read `_reconstruct`, which makes an empty array whose state follows."""
    return Array()


def scalar(dtype: Any, data: Any = b"") -> Any:
    """Read `scalar`, a number or a text of NumPy's."""
    made = Array()
    made.__setstate__((1, (), dtype, False, data))
    return np.array(made)[()]


def statistic(owner: Any, name: Any) -> Any:
    """Read `getattr`: a log history is pickled with its four methods. It is for nothing but these."""
    if owner is not Log or name not in _STATISTICS:
        raise ValueError(f"name: expected a statistic of MMEngine's HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


def nothing() -> bytes:
    """Read `bytes()`, as which the bytes of an array of size 0 are pickled."""
    return b""


class Log(HistoryBuffer):
    """A `HistoryBuffer` until it has its state; MMEngine's would put functions of the file where all buffers look."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise ValueError(f"HistoryBuffer: expected a dict, got {type(state).__name__}")
        length, methods = state.get("max_length"), state.get("statistics_methods", {})
        histories = [state.get(name) for name in ("_log_history", "_count_history")]
        if type(length) is not int or any(not isinstance(each, np.ndarray) or each.ndim != 1 for each in histories):
            raise ValueError(f"HistoryBuffer: expected a length and two arrays of numbers, got {sorted(state)}")
        own = {name: getattr(HistoryBuffer, name) for name in _STATISTICS}
        if type(methods) is not dict or any(own.get(name) is not method for name, method in methods.items()):
            raise ValueError(f"HistoryBuffer: expected its own statistics, {', '.join(own)}, got {methods!r}")
        self.__class__ = HistoryBuffer  # type: ignore[assignment]
        self._set_default_statistics()
        self.max_length = length
        self._log_history, self._count_history = (np.array(each) for each in histories)


# By the names of NumPy 1 and 2; types that are given a state are allowed under names of their own, too, as another
# may have allowed NumPy's.
ALLOWED: list[Any] = [
    *(Array, Dtype, Log),
    (Array, "numpy.ndarray"),
    (dtype, "numpy.dtype"),
    (Log, f"{HistoryBuffer.__module__}.HistoryBuffer"),
    (statistic, "builtins.getattr"),
    (nothing, "builtins.bytes"),
    *((array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
