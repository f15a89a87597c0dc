"""Small helpers around plain configuration values: conversion, key checks, and objects named by a config."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:
    """Return `value` with every mapping as a dict, every sequence or array as a list and every path as a string.

    Lightning reads its checkpoints with `weights_only=True`, which knows these but no `ConfigDict` and no `Path`.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__array__") and hasattr(value, "tolist"):  # numpy's numbers, too
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def storable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as plain types; raise TypeError for one that neither checkpoints nor exported folders can hold.

    Found at the start of a run, not where it is resumed or exported.
    """

    def check(where: str, value: Any) -> None:
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                check(f"{where}.{key}", item)
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"{where}: expected numbers, strings, lists or dicts, which checkpoints and exported folders hold, got "
                f"{type(value).__name__} {value!r}"
            )

    result = {key: plain(value) for key, value in values.items()}
    for key, value in result.items():
        check(key, value)
    return result


def are_numbers(values: Any) -> bool:
    """Whether `values` is a sequence of finite numbers."""
    return isinstance(values, Sequence) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def unknown(what: str, name: Any, known: Iterable[str], where: str = "") -> str:
    """Word an error about a name that is not among the known ones."""
    known = sorted(known)
    return (
        f"{where + ': ' if where else ''}unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
    )


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return the end of an error about `name`: the known name that is close to it, or ''."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_timm_model(argument: str, name: Any) -> None:
    """Raise ValueError where timm has no model of this name, with those close to it; folders' and the hub's pass."""
    import timm

    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a timm model's name, got {name!r}")
    if ":" in name or timm.is_model(name.partition(".")[0]):
        return
    close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
    those = f"close to it: {', '.join(close)}" if close else "timm.list_models() has their names"
    raise ValueError(f"{argument}: expected a timm model, got {name!r}; {those}")


def check_keys(where: str, values: Mapping, known: Iterable[str]) -> None:
    """Raise ValueError naming the first key of `values` that is not among the `known` ones."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: expected a dict, got {type(values).__name__} {values!r}")
    known = list(known)
    for key in values:
        if key not in known:
            raise ValueError(unknown("key", key, known, where))


def arguments(function: Callable, *leave_out: str) -> list[str]:
    """Return the names of the arguments of `function` that a config may set."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in kinds and p.name not in ("self", *leave_out)]


def check_kinds(section: str, values: Mapping, function: Callable) -> None:
    """Raise TypeError for a value that is text where `function` takes a number, or no dict where it takes one.

    Such a value, a slip on the command line, would otherwise end a run in the middle, far from its name.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        value = values.get(name)
        if value is None:
            continue
        kind = str(parameter.annotation)
        number = isinstance(parameter.default, (int, float)) or re.search(r"\b(int|float)\b", kind)
        if isinstance(value, str) and number and not re.search(r"\bstr\b|PRECISION|Literal|Any\b", kind):
            raise TypeError(f"{section}{name}: expected a number, got {value!r}")
        if re.fullmatch(r"Mapping\[str, Any\]( \| None)?", kind) and not isinstance(value, Mapping):
            raise TypeError(f"{section}{name}: expected a dict, got {type(value).__name__} {value!r}")


def build_object(where: str, spec: Mapping, table: Mapping[str, type]) -> Any:
    """Build the object that `dict(type='Name', **kwargs)` describes from a table of classes.

    Raises ValueError for an unknown type or keyword, naming it, `where` it stands and what is known.
    """
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ValueError(f"{where}: expected dict(type=..., ...), got {spec!r}")
    kwargs = plain(spec)
    name = kwargs.pop("type")
    if name not in table:
        raise ValueError(unknown("type", name, table, where))
    accepts_any = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(table[name]).parameters.values()
    )
    if not accepts_any:
        check_keys(f"{where} ({name})", kwargs, arguments(table[name]))
    return table[name](**kwargs)


def as_names(labels: Any) -> list[str] | None:
    """Return names in label order from a list of names, or a dict from label to name as timm's folders may have."""
    if isinstance(labels, Mapping):
        numbered = {int(label): name for label, name in labels.items()}
        labels = [numbered[label] for label in sorted(numbered)] if set(numbered) == set(range(len(numbered))) else None
    return None if labels is None else [str(name) for name in labels]
