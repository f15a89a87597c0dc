"""Take the weights out of a file that holds more than weights, without running any of its code.

A pickle names functions and classes, and reading it calls them. Here every name but those that build tensors and plain
containers gives an empty stand-in, so whatever the file asks for, nothing of it is called. What lies in tensors,
dicts, lists and modules survives; everything else is left out.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals

_BUILTIN = {f"builtins.{kind.__name__}": kind for kind in (set, frozenset, list, dict, tuple, bytearray, complex)}
# numpy's way to an array; its modules have two names, one before and one since numpy 2.
_NUMPY = {"numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names
        full = f"{module}.{name}"
        for known in (_get_allowed_globals(), _BUILTIN):
            if full in known:
                return known[full]
        if full == "_codecs.encode":  # bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        if full in _NUMPY:
            return super().find_class(module, name)
        return type(name, (_StandIn,), {"source": full})


def _load(path: str | os.PathLike[str]) -> Any:
    reader: Any = ModuleType("restricted_pickle")
    reader.Unpickler, reader.UnpicklingError = _Unpickler, pickle.UnpicklingError
    reader.load = lambda file, **options: _Unpickler(file, **options).load()
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception as error:
        try:  # a pickle that torch did not write, such as detectron2's
            with open(path, "rb") as file:
                return _Unpickler(file, encoding="latin1").load()
        except Exception:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)} is not a readable checkpoint: {what}") from error


def extract_weights(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Write what a checkpoint holds in tensors and plain values to another file, without running code of the first.

    The layout stays; a module that was pickled whole is replaced by its state dict. Classes that are not installed do
    not matter.

    Args:
        path: a file that ``torch.save`` or ``pickle`` wrote.
        target: file to write, which ``torch.load(weights_only=True)`` and :func:`load_checkpoint` read.

    Returns:
        What was left out, as ``name (class)``.

    Raises:
        ValueError: the file is damaged, or holds no tensor.

    Example::

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
    found = _plain(_load(path), "", lambda name, kind: left_out.append(f"{name or 'all'} ({kind})"))
    if not isinstance(found, dict) or next(_tensors(found), None) is None:
        has = ", ".join(left_out[:6]) or type(found).__name__
        raise ValueError(f"{os.fspath(path)} holds no weights; it has {has}")
    torch.save(found, Path(target))
    return left_out


_NOTHING = object()


def _plain(value: Any, name: str, leave_out: Callable[[str, str], None]) -> Any:
    """Turn what was read into tensors and plain containers, or ``_NOTHING``."""
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
    if hasattr(value, "__array__") and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    leave_out(name, getattr(value, "source", "") or type(value).__name__)
    return _NOTHING


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
