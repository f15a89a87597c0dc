"""What is in the shards of a stream that gave nothing, in words for the error that says so."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Enough to see what kind of members there are; a shard may have 100,000.
_SHARDS, _MEMBERS = 3, 2000


def describe_split(data: Any, stage: str) -> str:
    """Say which split a data module reads for `stage` ('train', 'val', 'test', 'predict') and what is found there."""
    if data is None:
        return "its data loader"
    splits = getattr(data, "splits", None)
    split = splits.get(stage) if isinstance(splits, Mapping) else None
    place = f" in {data.root}" if getattr(data, "root", None) else ""
    said = f"data set {getattr(data, 'name', type(data).__name__)!r}{place}"
    said += f" (split {split!r})" if split is not None else ""
    datasets = getattr(data, "_datasets", None)  # of a data module of one's own this may be anything
    dataset = datasets.get(stage) if isinstance(datasets, Mapping) else None
    reader = getattr(getattr(dataset, "dataset", dataset), "reader", None)
    shards = getattr(getattr(reader, "split_info", None), "filenames", None)
    if isinstance(shards, Sequence) and not isinstance(shards, str) and hasattr(reader, "input_key"):
        said += f": {describe_shards(getattr(data, 'root', None) or '', list(shards))}. {_wanted(reader)}"
    return said


def describe_shards(root: str, shards: Sequence[str]) -> str:
    """Return the names of shards and how many members of which extensions the first of them have."""
    said = []
    for shard in shards[:_SHARDS]:
        path = Path(root, shard)
        if "::" in shard or ":" in root or not path.is_file():
            said.append(f"{shard} (not a local file)")
            continue
        found: Counter[str] = Counter()
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    found[_extension(member.name)] += member.isfile()
                    if found.total() >= _MEMBERS:
                        break
        except (tarfile.TarError, OSError, EOFError) as error:
            said.append(f"{shard} (does not read as a tar file: {error})")
            continue
        counts = ", ".join(f"{number} {name}" for name, number in found.most_common(8) if number)
        said.append(f"{shard} ({'begins with ' if found.total() >= _MEMBERS else ''}{counts or 'empty'})")
    more = f" and {len(shards) - _SHARDS} more" if len(shards) > _SHARDS else ""
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(said)}{more}" if said else "no shards"


def _extension(name: str) -> str:
    """Return what WebDataset takes for the key of a member: all behind the first dot of its file name."""
    key = os.path.basename(name).partition(".")[2]
    return f".{key}" if key else "without extension"


def _wanted(reader: Any) -> str:
    images = ", ".join(f".{key}" for key in str(reader.input_key).split(";"))
    label = getattr(reader, "target_key", None)
    labels = f"field {label!r} of .json" if label else "the number in .cls"
    return (
        f"timm takes the image of a sample from {images} (data.dataset.input_key='jpg;jpeg' would add one) and its "
        f"label from {labels} (data.dataset.target_key names a field of .json); a sample that lacks one, or does not "
        "decode, is left out"
    )
