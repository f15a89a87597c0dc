"""Names of classes and categories: what files say of them, and their comparison, by name and in order."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn

from .._config import as_names
from ..checkpoint import LoadReport

Id = int | str


def names_in(path: str | Path) -> list[str] | None:
    """Return the class names beside the weights in a file, of a checkpoint or an exported folder, or None."""
    path = Path(path)
    if path.suffix == ".safetensors":
        config = path.with_name("config.json")
        return as_names(json.loads(config.read_text()).get("label_names")) if config.is_file() else None
    if not zipfile.is_zipfile(path):
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads the weights says what is wrong with the file
        return None
    ours = content.get("dcn_plugin") if isinstance(content, Mapping) else None
    return as_names(ours.get("class_names")) if isinstance(ours, Mapping) else None


def names_of_pretrained(model: nn.Module, spec: Any, num_classes: int) -> tuple[list[str] | None, str]:
    """Return the class names of a pretrained timm model whose classifier is used as it is, and where they come from."""
    if isinstance(spec, Mapping) and spec.get("pretrained") and "name" in spec:
        names = as_names((getattr(model, "pretrained_cfg", None) or {}).get("label_names"))
        if names is not None and len(names) == num_classes:
            return names, spec["name"]
    return None, ""


def head_was_loaded(model: nn.Module, report: LoadReport | None, names: Sequence[str]) -> bool:
    """Whether the classifier has the weights that were loaded, as far as a model tells which part of it that is."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    kept = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    if any(name.startswith(kept) for name in (() if report is None else report.allowed)):
        return False
    return len(names) == getattr(model, "num_classes", len(names))


def compare(
    known: Sequence[str] | None, where: str, found: Sequence[str] | None, there: str, warn: bool = False
) -> None:
    """Raise ValueError, or warn, naming the first class that has another name; do nothing where names are unknown."""
    if known is None or found is None:
        return
    names, others = (dict(enumerate(map(str, each))) for each in (known, found))
    said = first_difference(names, where, others, there, "class")
    if said is None:
        return
    if not warn:
        raise ValueError(f"class_names: {said} (give weights to start from, for other classes, as checkpoint=)")
    rank_zero_warn(f"class_names: {said}: the classifier goes on from weights that were trained for the former")


def first_difference(
    these: Mapping[Any, str], here: str, those: Mapping[Any, str], there: str, what: str = "category"
) -> str | None:
    """Word the first category, or class, that differs between two sets of names by id; None where they agree.

    Example:
        >>> first_difference({1: 'cat', 2: 'dog'}, 'in train', {1: 'cat', 2: 'Dog'}, 'in val')
        "category 2 is 'dog' in train and 'Dog' in val"
    """
    for key in sorted({**these, **those}, key=order):
        if key not in these or key not in those:
            name, where = (these[key], here) if key in these else (those[key], there)
            return f"{what} {key!r} ({name!r}) is only {where}"
        if these[key] != those[key]:
            return f"{what} {key!r} is {these[key]!r} {here} and {those[key]!r} {there}"
    return None


def order(key: Id) -> tuple[bool, Id]:
    """Return what to sort ids by: numbers before strings."""
    return isinstance(key, str), key
