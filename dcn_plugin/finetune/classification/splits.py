"""Where the splits of an image data set lie, and what they say of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What timm accepts in place of 'train' and 'validation' when it looks for a split's folder.
_FOLDERS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def require_root(root: str | None) -> Path:
    """Return the folder of the data; raise FileNotFoundError where it is not there."""
    path = Path(root or "")
    if not path.exists():
        raise FileNotFoundError(f"root: expected the folder of the data, got {str(path)!r}, which does not exist")
    return path


def split_path(root: str | None, split: str | None, stage: str) -> Path:
    """Return folder or tar of a split; unlike timm's search, never fall back to the whole of `root`.

    Raises:
        FileNotFoundError: no such split, with what is found there.
    """
    path = require_root(root)
    if not split or path.is_file():
        return path
    names = next((group for group in _FOLDERS if split in group), ())
    for name in (split, *names):
        if (path / name).exists():
            return path / name
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(
        f"{stage}_split: expected split {split!r} in {path}, got {found} ({stage}_split='' takes root itself)"
    )


def check_shards(root: str | None, shards: Sequence[str]) -> None:
    """Raise FileNotFoundError for the first shard that is missing: webdataset logs it and goes on, without end."""
    for shard in shards:
        path = Path(root or "", shard)
        if "::" not in shard and ":" not in str(root) and not path.is_file():
            raise FileNotFoundError(f"root: expected shard {shard!r} in it, got {str(path)!r}, which does not exist")


def classes_of(dataset: Any) -> dict[str, int]:
    """Return class name -> label, as far as the data set or its reader tells; {} where they tell nothing."""
    for holder in (dataset := getattr(dataset, "dataset", dataset), getattr(dataset, "reader", None)):
        for name in ("class_to_idx", "class_name_to_idx"):
            if getattr(holder, name, None):
                return dict(getattr(holder, name))
    return {name: label for label, name in enumerate(getattr(dataset, "classes", None) or ())}
