"""Take the weights out of a file that holds more than weights, without running any of its code.

A pickle names functions and classes, and reading it calls them. Here every name but those that build tensors and plain
containers gives an empty stand-in, so whatever the file asks for, nothing of it is called. What lies in tensors,
dicts, lists and modules survives; everything else is left out.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals

from ._weight_files import refuse_others

_BUILTIN = {
    f"builtins.{kind.__name__}": kind for kind in (set, frozenset, list, dict, tuple, bytes, bytearray, complex)
}


class _StandIn:
    """An object of a class that was not imported: keeps what it is given, and does nothing."""

    source = ""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        made = object.__new__(cls)
        made.__dict__["items_"] = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return type(self)()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({k: v for k, v in part.items() if isinstance(k, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items_"][key] = value

    def append(self, *_: Any) -> None:
        pass

    extend = add = update = append


class _Dtype:
    """The letter and the size of a numpy dtype, and the order of its bytes."""

    source = "numpy.dtype"

    types: ClassVar[dict[Any, torch.dtype]] = {
        "b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
        "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32,
        "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128,
    }  # fmt: skip

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.swapped = code, False

    def __setstate__(self, state: Any) -> None:
        self.swapped = state[1] == ">"


class _Array:
    """A numpy array, read here: numpy believes a file that says which bytes are objects, and follows them."""

    source = "numpy.ndarray"
    value: Tensor | None = None  # None: of objects, text, records

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        self.fill(data, dtype, shape, by_columns)

    def fill(self, data: Any, dtype: Any, shape: Any, by_columns: bool = False) -> _Array:
        kind = _Dtype.types.get(dtype.code) if isinstance(dtype, _Dtype) else None
        if kind is None:
            return self
        data = bytearray(data.encode("latin1") if isinstance(data, str) else data)  # text: of Python 2
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(data) != math.prod(shape) * kind.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} cannot have {len(data)} bytes")
        if dtype.swapped:
            part = kind.itemsize // (2 if kind.is_complex else 1)
            data = bytearray(byte for i in range(0, len(data), part) for byte in reversed(data[i : i + part]))
        flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        self.value = (
            flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if by_columns else flat.reshape(shape)
        )
        return self


# numpy's way to an array; its modules have two names, one before and one since numpy 2.
_NUMPY: dict[str, Any] = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype}
for _core in ("numpy.core", "numpy._core"):
    _NUMPY[f"{_core}.multiarray._reconstruct"] = _Array
    _NUMPY[f"{_core}.multiarray.scalar"] = lambda dtype, data=b"": _Array().fill(data, dtype, ())
    _NUMPY[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order: _Array().fill(
        data, dtype, shape, order == "F"
    )

_OURS: dict[str, Any] = {
    **_BUILTIN,
    **_NUMPY,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in protocol 2
    # The tensor of a subclass's values, without what else the file wants to set on it.
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function(*arguments),
}


def _build(unpickler: Any) -> None:
    """Give an object its state, as the instruction BUILD asks.

    Only what was made for this file gets any: pickle's own would set attributes of the functions and classes that
    `find_class` returns, which the whole program uses.
    """
    state, made = unpickler.stack.pop(), unpickler.stack[-1]
    if isinstance(made, (_StandIn, _Array, _Dtype)):
        made.__setstate__(state)
    elif isinstance(made, OrderedDict) and isinstance(state, dict):
        made.__dict__.update(state)  # the versions of modules
    elif isinstance(made, Tensor) and type(state) is tuple and len(state) in (4, 5):
        made.__setstate__(state)


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]  # the one in C always sets attributes
    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names
        full = f"{module}.{name}"
        for known in (_OURS, _get_allowed_globals()):
            if full in known:
                return known[full]
        return type(name, (_StandIn,), {"source": full})


def _load(path: str | os.PathLike[str]) -> Any:
    refuse_others(path)
    reader: Any = ModuleType("restricted_pickle")
    reader.Unpickler, reader.UnpicklingError = _Unpickler, pickle.UnpicklingError
    reader.load = lambda file, **options: _Unpickler(file, **options).load()
    with open(path, "rb") as file:
        try:
            if torch.serialization._is_zipfile(file):
                # As torch.load() finds out, which would hand such a file to torch.jit, and that runs its code.
                if "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records():
                    raise pickle.UnpicklingError("it holds TorchScript, which is code")
                file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
        except Exception as error:
            try:  # a pickle that torch did not write, such as detectron2's
                file.seek(0)
                return _Unpickler(file, encoding="latin1").load()
            except Exception:
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"{os.fspath(path)}: expected a readable checkpoint, got {what}") from error


def extract_weights(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Write what a checkpoint holds in tensors and plain values to another file, without running code of the first.

    The layout stays; a module that was pickled whole is replaced by its state dict. Classes that are not installed do
    not matter.

    Args:
        path: a file that `torch.save` or `pickle` wrote.
        target: file to write, which `torch.load(weights_only=True)` and `load_checkpoint` read.

    Returns:
        What was left out, as `name (class)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, something else (TorchScript, an archive, ...: it is named), or holds no tensor.

    Example:
        >>> import argparse, tempfile, torch
        >>> from dcn_plugin.checkpoint import extract_weights, read_checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> saved = {"model": {"weight": torch.zeros(2)}, "args": argparse.Namespace(lr=0.1)}
        >>> torch.save(saved, f"{folder}/x.pth")
        >>> extract_weights(f"{folder}/x.pth", f"{folder}/y.pth")
        ['args (argparse.Namespace)']
        >>> list(read_checkpoint(f"{folder}/y.pth"))
        ['weight']
    """
    left_out: list[str] = []
    try:
        found = _plain(_load(path), "", lambda name, kind: left_out.append(f"{name or 'all'} ({kind})"))
    except RecursionError:
        what = "expected weights by name, got containers in each other without end"
        raise ValueError(f"{os.fspath(path)}: {what}") from None
    if not isinstance(found, dict) or next(_tensors(found), None) is None:
        has = ", ".join(left_out[:6]) or type(found).__name__
        raise ValueError(f"{os.fspath(path)}: expected weights, got none beside {has}")
    torch.save(found, Path(target))
    return left_out


_NOTHING = object()


def _plain(value: Any, name: str, leave_out: Callable[[str, str], None]) -> Any:
    """Turn what was read into tensors and plain containers, or `_NOTHING`."""
    if isinstance(value, _StandIn) and {"_parameters", "_buffers", "_modules"} <= value.__dict__.keys():
        return dict(_state_of(value, ""))
    if isinstance(value, _StandIn) and value.__dict__["items_"]:
        value = value.__dict__["items_"]  # of a class derived from dict
    if isinstance(value, Mapping):
        items = {k: _plain(v, f"{name}.{k}".removeprefix("."), leave_out) for k, v in value.items() if _is_key(k)}
        return {k: v for k, v in items.items() if v is not _NOTHING}
    if isinstance(value, (list, tuple)):
        parts = [_plain(v, f"{name}[{i}]", leave_out) for i, v in enumerate(value)]
        return [part for part in parts if part is not _NOTHING]
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return value
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    leave_out(name, _class_of(value))
    return _NOTHING


def _class_of(value: Any) -> str:
    return str(getattr(type(value), "source", type(value).__name__))


def _is_key(key: Any) -> bool:
    return isinstance(key, (str, int, float, bool))


def _state_of(module: _StandIn, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """State dict of a module that was pickled whole."""
    own = module.__dict__
    passing = own.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in own[kind].items():
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in passing):
                yield f"{prefix}{name}", value.detach()
    for name, child in own["_modules"].items():
        if isinstance(child, _StandIn) and "_modules" in child.__dict__:
            yield from _state_of(child, f"{prefix}{name}.")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tensors(part)
