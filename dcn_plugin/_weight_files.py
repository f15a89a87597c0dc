"""Read files of weights without running code from them, call by its name what is no such file, and find the weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# What begins with it -> what it is, and what to do.
_OTHERS = (
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes, which is not read"),
    (b"GGUF", "a GGUF file, which is not read"),
)


# Weights averaged over training, which timm takes before all others, and whose accuracy its trainers tell.
_AVERAGED = ("state_dict_ema", "model_ema")
# Where training frameworks put the weights in what they save, tried in this order.
_NESTS = (
    *_AVERAGED, "state_dict", "model", "model_state_dict", "model_state", "ema_state_dict", "ema", "module", "params",
    "params_ema",
)  # fmt: skip
# These are also names of parts of models: taken only where there are no tensors beside them.
_WEAK_NESTS = _NESTS[-4:]
# Dicts of tensors that are no weights.
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loops|^state$|averaging_state|message_hub")


class State(dict[str, Any]):
    """A state dict with the module versions that `load_state_dict` looks for in `_metadata`."""

    def __init__(self, items: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> None:
        super().__init__(items)
        self.metadata = metadata
        if metadata is not None:
            self._metadata = metadata


def read_file(path: str | os.PathLike[str]) -> Any:
    """Return what a file, an index of shards or a folder of them holds: tensors and plain values, on the CPU.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: it is something else, damaged, or holds objects that are code (the message names them).
        ImportError: a safetensors file without safetensors installed.
    """
    file = Path(path)
    if file.is_dir():
        return read_file(_file_in(file))
    if not file.is_file():
        hint = ": download it first" if "://" in os.fspath(path) else ""
        raise FileNotFoundError(f"{os.fspath(path)}: expected a checkpoint file, got none of that name{hint}")
    refuse_others(file)
    if file.suffix == ".json":
        return _read_shards(file)
    if _looks_like_safetensors(file) or (file.suffix == ".safetensors" and not zipfile.is_zipfile(file)):
        return _read_safetensors(file)
    try:
        with file.open("rb") as opened:  # torch.load() goes by the name of a path
            return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_explain_unsafe(file, error)) from error
    except Exception as error:
        raise ValueError(f"{file}: expected a readable checkpoint, got {type(error).__name__}: {error}") from error


def refuse_others(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where a file is something that often lies in a checkpoint's place, and say what it is."""
    file = Path(path)
    with file.open("rb") as opened:
        head = opened.read(4096)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((words for start, words in _OTHERS if head.startswith(start)), "")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d+)", head, re.M)
        size_text = f" of {int(size[1]) / 1e6:.1f} MB" if size else ""
        what = f"a Git LFS pointer, not the file{size_text} itself: run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        title = re.search(rb"<title[^>]*>\s*(.*?)\s*</title>", head, re.I | re.S)
        titled = f" ({title[1].decode('utf-8', 'replace')!r})" if title else ""
        what = f"an HTML page{titled}, not a checkpoint: the download asked for a login or failed; download it again"
    elif zipfile.is_zipfile(file):
        what = _describe_zip(file)
    elif not what and tarfile.is_tarfile(file):
        what = f"a tar archive of {_some(tarfile.open(file).getnames())}: unpack it first"  # noqa: SIM115
    if what:
        raise ValueError(f"{file}: expected a checkpoint, got {what}")


def _describe_zip(file: Path) -> str:
    """What a zip archive is that `torch.save` did not write, or ''."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(re.fullmatch(r"[^/]*/?constants\.pkl", name) for name in names):
        return f"a TorchScript archive, which holds code: take torch.jit.load({os.fspath(file)!r}).state_dict()"
    if any(re.fullmatch(r"[^/]*/?data\.pkl", name) for name in names):
        return ""
    return f"a zip archive of {_some(names)}, which torch.save did not write"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _looks_like_safetensors(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") < file.stat().st_size


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"reading {file} needs safetensors: pip install safetensors") from None
    try:
        return load_file(file)
    except Exception as error:
        raise ValueError(f"{file}: expected a readable safetensors file, got {error}") from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Read the files that an index such as `model.safetensors.index.json` names, which lie beside it."""
    try:
        content = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"{index}: expected a readable index of shards, got {error}") from error
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{index}: expected weights, or an index of their shards, got JSON without a weight_map")
    shards = sorted(set(map(str, places.values())))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: expected names of files beside it, got {outside[0]!r}")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index}: expected {len(shards)} shards beside it, got all but {len(missing)}: {', '.join(missing)}"
        )
    parts = {name: read_file(index.parent / name) for name in shards}
    lost = [name for name, shard in places.items() if name not in parts[shard]]
    if lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        raise ValueError(f"{index}: expected {lost[0]!r}{others} in {places[lost[0]]!r}, got a file without")
    return {name: parts[shard][name] for name, shard in places.items()}


def _file_in(folder: Path) -> Path:
    """The file of a folder that holds its weights: an index of shards, or the only file of weights."""
    if (folder / ".metadata").is_file():
        out = folder.with_name(f"{folder.name}.pth")
        command = f"dcp_to_torch {shlex.quote(str(folder))} {shlex.quote(str(out))}"
        raise ValueError(
            f"{folder}: expected a file of weights, got a checkpoint of torch.distributed.checkpoint: make one of it "
            f"with python -m torch.distributed.checkpoint.format_utils {command}"
        )
    # safetensors, where a folder has the same weights in both formats
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        usual = [path for path in found if path.stem.partition(".")[0] in ("model", "pytorch_model")]
        chosen = found if len(found) == 1 else usual if len(usual) == 1 else []
        if chosen:
            return chosen[0]
        if found:
            names = _some([path.name for path in found])
            raise ValueError(f"{folder}: expected one file of weights, got {len(found)} ({names}): give one")
    held = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(f"{folder}: expected a checkpoint file in this folder, got {_some(held) or 'nothing'}")


def _explain_unsafe(file: Path, error: Exception) -> str:
    if zipfile.is_zipfile(file):
        try:
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # damaged inside: the first error says how
            classes = []
        if not classes:
            return f"{file}: expected a readable checkpoint, got {error}"
        text = f"{file}: expected weights alone, got objects of {', '.join(sorted(classes))} as well"
    else:
        with file.open("rb") as opened:
            if opened.read(1) != b"\x80":  # every pickle of protocol 2 and later begins with it
                return f"{file}: expected a readable checkpoint, got {error}"
        text = (
            f"{file}: expected what torch.save writes, got a file of something else, or of a torch older than 1.6 "
            "together with objects that are code (detectron2's .pkl files are of this kind)"
        )
        classes = []
    code = (
        "from dcn_plugin.checkpoint import extract_weights; "
        f"extract_weights({str(file)!r}, {str(file.with_name(f'{file.stem}_weights.pth'))!r})"
    )
    # Double quotes read better, where the shell takes nothing between them to be its own.
    quoted = shlex.quote(code) if re.search(r'["$`\\!]', code) else f'"{code}"'
    text += (
        ". Creating those can run any code the file's author chose, so it is not read. This takes the weights out "
        f"without creating them: python -c {quoted}"
        "; then read the file it writes, or pass the state dict to load_checkpoint if you read it in another way"
    )
    if any("mmengine" in name for name in classes):
        text += (
            ". MMEngine's Runner saves its log history so; "
            "custom_hooks=[dict(type='dcn_plugin.WeightsOnlyCheckpointHook')] in the config keeps it out of later files"
        )
    return text


def find_weights(content: Any, key: str | Sequence[str] | None, source: str, notes: list[str]) -> State:
    """Return the weights in what a file holds; `notes` gets what else there is to choose from.

    Raises:
        TypeError: `key` is neither a string nor a list of them, or there are no tensors.
        ValueError: `key` is not there, or the file holds something other than a dict of weights.
    """
    if key is not None and not isinstance(key, str):
        if not isinstance(key, Sequence) or not all(isinstance(part, str) for part in key):
            raise TypeError(f"key: expected a string, such as 'ema.module', or a list of them, got {key!r}")
    if not isinstance(content, Mapping):
        what = "a whole pickled model" if isinstance(content, nn.Module) else f"a {type(content).__name__}"
        raise ValueError(f"{source}: expected a dict of weights, got {what}")
    everywhere = dict(_weights_in(content))
    path: tuple[str, ...] = ()
    if key is not None:
        path = _path_of(content, key)
        if not path:
            has = ", ".join(map(repr, content))
            deeper = [".".join(p) for p in everywhere if len(p) > 1]
            has += f" (weights under {', '.join(map(repr, deeper))})" if deeper else ""
            raise ValueError(
                f"key: expected the place of a dict of weights in {source}, which has {has}, got {_spelt(key)}"
            )
        content = _at(content, path)
    asked = path
    while nests := [
        name for name in _NESTS
        if isinstance(content.get(name), Mapping) and (name not in _AVERAGED or any(_weights_in(content[name])))
    ]:  # fmt: skip
        if nests[0] in _WEAK_NESTS and any(isinstance(value, Tensor) for value in content.values()):
            break
        path, content = (*path, nests[0]), content[nests[0]]
    others = [".".join(p) for p in everywhere if p != path and p[: len(asked)] == asked]
    if others:
        took = f"took {'.'.join(path)!r}" if path else "took the file itself"
        notes.append(f"{took}; the file also holds {', '.join(map(repr, others))} (choose with key=)")
    state = State(content, getattr(content, "_metadata", None))
    beside = []
    for name, value in content.items():
        if isinstance(name, str) and hasattr(value, "__array__") and not isinstance(value, Tensor):
            state[name] = torch.as_tensor(value)
        elif not isinstance(name, str) or (not isinstance(value, Tensor) and not name.endswith("_extra_state")):
            beside.append(name)
            del state[name]
    if not state and beside:
        value = content[beside[0]]
        inside = f"; it has weights under {', '.join(map(repr, others))}" if others else ""
        raise TypeError(
            f"{source}: expected tensors, got a {type(value).__name__} under {beside[0]!r}; "
            f"if the weights are deeper inside, say where with key={inside}"
        )
    if not state:
        raise ValueError(f"{source}: expected weights, got none")
    if beside:
        notes.append(f"left alone, since they are no tensors: {', '.join(map(repr, beside))}")
    return state


def _weights_in(content: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Every dict of tensors by name in a file, with its keys from the outside in; not what an optimizer remembers."""
    if len(path) > 4:
        return
    # Of tensors and numpy's arrays, not of single numbers.
    if any(isinstance(name, str) and getattr(value, "ndim", 0) for name, value in content.items()):
        yield path, content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and not _NO_WEIGHTS.search(name):
            yield from _weights_in(value, (*path, name))


def _path_of(content: Any, key: str | Sequence[str]) -> tuple[str, ...]:
    """Keys, from the outside in, that a dotted key names; keys themselves may have dots. Empty: there is no dict."""
    if not isinstance(key, str):
        return tuple(key) if key and isinstance(_at(content, key), Mapping) else ()
    if isinstance(content.get(key), Mapping):
        return (key,)
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and key.startswith(f"{name}."):
            rest = _path_of(value, key[len(name) + 1 :])
            if rest:
                return (name, *rest)
    return ()


def _at(content: Any, path: Sequence[str]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _spelt(key: str | Sequence[str]) -> str:
    return repr(key if isinstance(key, str) else ".".join(map(str, key)))
