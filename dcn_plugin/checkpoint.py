"""Read checkpoint files safely and load weights that other projects named differently."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._unpickling import extract_weights
from ._weight_files import State, find_weights, read_file, refuse_others
from .layers import SamplingModule, prefix_note, rename_former_keys

__all__ = [
    "LoadReport", "extract_weights", "find_weights", "load_checkpoint", "match_wrappers", "read_checkpoint",
    "read_file", "refuse_others",
]  # fmt: skip

logger = logging.getLogger("dcn_plugin")

# What wrappers put into names: torch.compile, DDP and other data parallelism, FSDP, activation checkpointing.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What wrappers, detectors and Lightning modules put before a backbone's names, tried in this order.
_PREFIXES = (
    "module.", "model.", "backbone.", "module.backbone.", "model.backbone.", "_orig_mod.", "module.model.",
    "generator.",
)  # fmt: skip


class _Project(NamedTuple):
    """The names of a whole model of another project; those inside of our layers are renamed by the layers.

    Fields:
        marks: each is found in some name, and together they are found in no other project's.
        renames: patterns and what takes their place, in this order.
        note: what should be known of such weights in a given model, or ''.
        alone: True where names that no pattern fits are none of the backbone's, and left alone.
    """

    marks: tuple[re.Pattern[str], ...]
    renames: tuple[tuple[re.Pattern[str], str], ...]
    note: Callable[[nn.Module], str]
    alone: bool = False


_DETECTRON2_START = r"^(?:backbone\.)?(?:bottom_up\.)?"
# All of them into torchvision's names of a ResNet, which are timm's and mmdetection's.
_PROJECTS = (
    _Project(  # detectron2
        (re.compile(r"(^|\.)res[2-5]\.\d+\.conv\d\."),),
        tuple(
            (re.compile(pattern), new)
            for pattern, new in (
                (rf"{_DETECTRON2_START}stem\.conv(\d)\.norm\.", r"bn\1."),
                (rf"{_DETECTRON2_START}stem\.conv(\d)\.", r"conv\1."),
                *((rf"{_DETECTRON2_START}res{stage + 1}\.", f"layer{stage}.") for stage in (1, 2, 3, 4)),
                (r"^(layer\d\.\d+\.)conv(\d)\.norm\.", r"\1bn\2."),
                (r"^(layer\d\.\d+\.)shortcut\.norm\.", r"\1downsample.1."),
                (r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample.0."),
            )
        ),
        lambda model: (
            "detectron2's names; its ResNets are mostly trained on BGR images in 0..255, and with the stride in conv1 "
            "(STRIDE_IN_1X1): see the config the file came with"
        ),
        alone=True,
    ),
    _Project(  # YOLACT and YOLACT++
        (re.compile(r"^layers\.\d\.\d+\.conv2\."),),
        tuple((re.compile(rf"^layers\.{stage - 1}\."), f"layer{stage}.") for stage in (1, 2, 3, 4)),
        lambda model: "",
    ),
    _Project(  # DBNet of MhLiao and of EasyOCR
        (re.compile(r"^smooth\.weight$"), re.compile(r"^layer\d\.0\.conv2_offset\.")),
        (),
        prefix_note,
    ),
)


@dataclass
class LoadReport:
    """What `load_checkpoint` did, name by name; prints as text.

    Attributes:
        source: the file, or 'state dict'.
        loaded: names in the model that got a value.
        renamed: old name in the source to new name in the model.
        missing: names in the model that the source lacks.
        unexpected: names in the source that the model lacks.
        mismatched: name to (shape in the source, shape in the model).
        allowed: names among the three above that `allow_*` patterns allowed, or that are BatchNorm's
            `num_batches_tracked`, which older files lack; they keep the model's value.
        outside: names in the source outside `prefix`, left alone.
        notes: what else was decided or should be known.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    allowed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What `strict=True` refuses, as sentences; empty where everything fits."""
        allowed = set(self.allowed)
        missing = [name for name in self.missing if name not in allowed]
        unexpected = [name for name in self.unexpected if name not in allowed]
        mismatched = [name for name in self.mismatched if name not in allowed]
        found = []
        if missing:
            found.append(f"{len(missing)} missing (in the model, not in the source): {', '.join(missing)}")
        if unexpected:
            found.append(f"{len(unexpected)} unexpected (in the source, not in the model): {', '.join(unexpected)}")
        for name in mismatched:
            given, wanted = self.mismatched[name]
            found.append(f"shape of {name} differs: source has {list(given)}, model has {list(wanted)}")
        return found

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"note: {note}" for note in self.notes]
        renames = [f"{old} -> {new}" for old, new in self.renamed.items()]
        for title, attribute, items in (
            ("renamed", "renamed", renames),
            ("not loaded, as allowed", "allowed", self.allowed),
            ("outside the backbone or prefix, left alone", "outside", self.outside),
        ):
            if items:
                more = f", ... (all in .{attribute})" if len(items) > 6 else ""
                lines.append(f"{len(items)} {title}: {', '.join(items[:6])}{more}")
        return "\n  ".join(lines + self.problems)


def read_checkpoint(path: str | os.PathLike[str], key: str | Sequence[str] | None = None) -> dict[str, Any]:
    """Read the weights in a file, or in the shards of one, without ever executing code from it.

    safetensors reads its own format, `torch.load(weights_only=True)` everything else, whatever the file is called.

    Args:
        path: a file; an index of shards, such as `model.safetensors.index.json`; or the folder of either.
        key: entry of the file that holds the weights, with dots (`'ema.module'`) or as a list where it is nested; by
            default the first of `state_dict_ema`, `model_ema` (as timm does), `state_dict`, `model`,
            `model_state_dict`, `model_state`, `ema_state_dict`, `ema`, `module`, `params`, `params_ema`, or the file
            itself.

    Returns:
        Names to tensors, on the CPU. What else lies beside them is left out.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: the file is damaged, something else (a Git LFS pointer, an HTML page, an archive: it is named),
            holds objects that are code (the message names them, and a command that takes the weights out), or no
            weights.
        TypeError: there are no tensors where the weights should be.
        ImportError: a safetensors file without safetensors installed.

    Example:
        >>> import torch, tempfile
        >>> from dcn_plugin.checkpoint import read_checkpoint
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, file.name)
        ...     list(read_checkpoint(file.name))
        ['weight']
    """
    return find_weights(read_file(path), key, str(path), [])


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    prefix: str | None = None,
    key: str | Sequence[str] | None = None,
    allow_missing: str | Sequence[str] = (),
    allow_unexpected: str | Sequence[str] = (),
    allow_mismatched: str | Sequence[str] = (),
) -> LoadReport:
    """Load weights from a file or state dict, whichever of the known layouts it has, and report every difference.

    Understood: timm, torchvision and mmdetection ResNets (the names used here); detectron2's (`bottom_up.res3.0...`)
    and YOLACT's (`layers.1.0...`); for `conv2.conv_offset`, `conv2_offset` (detectron2, mmdetection before 2.0, DBNet),
    `conv2.conv_offset_mask` (chengdazhi, CharlesShang, CenterNet, YOLACT++) and BiRefNet's `conv2.offset_conv` with
    `conv2.modulator_conv`; `offset_mask_fc` (CharlesShang) for a modulated `DeformPSRoIPoolPack`; what wrappers put
    into names, at the start or inside (`_orig_mod.` of `torch.compile`, `module.`, FSDP's). Everything is
    compared before anything is copied: after an error the model is as it was.

    Args:
        model: receives the weights.
        source: path of a file, an index or a folder (see `read_checkpoint`), or a state dict.
        strict: raise if a name is missing or unexpected or a shape differs. False loads what fits and reports the rest.
        prefix: use the names that start with this and drop it, e.g. `'backbone.'` of a detector, whose dot may be
            left out. By default the names as they are or, if none of them fits the model, the first usual prefix that
            does (reported).
        key: entry of the file that holds the weights, see `read_checkpoint`.
        allow_missing: glob or globs of model names that may be absent from the source. A plain ResNet goes into a
            deformable one with `'*.conv_offset.*'`.
        allow_unexpected: globs of source names the model may lack, e.g. `'fc.*'`.
        allow_mismatched: globs of names that keep the model's value where the shape differs, e.g. `'fc.*'`.

    Returns:
        A printable `LoadReport`, which is also logged ('dcn_plugin', INFO; WARNING where there are notes).

    Raises:
        RuntimeError: `strict` and something does not fit; the message lists every name.
        ValueError: the file cannot be read, or `prefix` fits nothing.
        TypeError: an argument has the wrong type, or the state dict holds no tensors.

    Example:
        >>> from torch import nn
        >>> import dcn_plugin
        >>> plain, model = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)) for _ in range(2))
        >>> _ = dcn_plugin.convert(model, dict(match="0", layer=dict(type="DCNv2")))
        >>> report = dcn_plugin.load_checkpoint(model, plain.state_dict(), allow_missing="*.conv_offset.*")
        >>> report.loaded, report.allowed
        (['0.weight', '0.bias'], ['0.conv_offset.weight', '0.conv_offset.bias'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    patterns = {
        name: _globs(name, value)
        for name, value in dict(
            allow_missing=allow_missing, allow_unexpected=allow_unexpected, allow_mismatched=allow_mismatched
        ).items()
    }
    if isinstance(source, Mapping):
        report, content = LoadReport("state dict"), source
    elif isinstance(source, (str, os.PathLike)):
        report, content = LoadReport(os.fspath(source)), read_file(source)
    else:
        raise TypeError(f"source: expected a path or a state dict, got {type(source).__name__}")
    state = find_weights(content, key, report.source, report.notes)
    shard = re.search(r"-(\d+)-of-(\d+)\.\w+$", report.source)
    if shard and int(shard[2]) > 1:
        which = f"{int(shard[1])} of {int(shard[2])}"
        report.notes.append(f"this is shard {which}: give the index file or the folder for all")
    own = model.state_dict()
    state = _of_project(model, own, _fit_names(model, own, state, prefix, report), report)

    earlier = {new: old for old, new in report.renamed.items()}
    renamed, note = rename_former_keys(model, state)
    for old, new in renamed.items():
        report.renamed[earlier.get(old, old)] = new
    if note:
        report.notes.append(note)
    for name, module in model.named_modules():
        fit = getattr(module, "fit_state_dict", None)
        if fit is not None:
            report.notes += fit(state, f"{name}." if name else "")

    _compare(model, own, state, report, patterns)
    if strict and report.problems:
        text = "\n  ".join([*report.problems, *(f"note: {note}" for note in report.notes)])
        raise RuntimeError(
            f"source: expected weights of {type(model).__name__}, got {report.source}; nothing was loaded:\n  {text}"
        )
    # strict=False: what is missing has been decided above.
    model.load_state_dict(State({name: state[name] for name in report.loaded}, state.metadata), strict=False)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def _globs(name: str, value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{name}: expected a glob or a list of globs, got {value!r}")
    return list(items)


def match_wrappers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a state dict that has what wrappers such as `torch.compile` put into names to what `model` has.

    `model` may be wrapped in another way, or not. What fits as it is comes back as it is.
    """
    given = State(state, getattr(state, "_metadata", None))
    return _fit_names(model, model.state_dict(), given, None, LoadReport("state dict"))


def _hits(names: Iterable[str], own: Mapping[str, Any]) -> int:
    return sum(name in own for name in names)


def _fits(model: nn.Module, own: Mapping[str, Any], names: Mapping[str, Any]) -> int:
    """How many names are those of `model`, once what other projects and layouts call them is renamed."""
    tried = dict(_of_project(model, own, State(names, None), LoadReport("state dict")))
    rename_former_keys(model, tried)
    return _hits(tried, own)


def _without(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in names.items() if name.startswith(prefix)}


def _inside(state: State, prefix: str | None, report: LoadReport) -> State:
    inside = _strip(state, prefix or "", report)
    if not inside:
        has = ", ".join(report.outside[:3])
        raise ValueError(
            f"prefix: expected the start of names in {report.source}, which has {has}, ..., got {prefix!r}"
        )
    return inside


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _of_project(model: nn.Module, own: Mapping[str, Any], state: State, report: LoadReport) -> State:
    """Give `state` the names of `model` where it has those of another project."""
    project = next((p for p in _PROJECTS if all(any(map(mark.search, state)) for mark in p.marks)), None)
    if project is None:
        return state
    result, renamed, outside = {}, {}, []
    for old, value in state.items():
        new = old
        for pattern, replacement in project.renames:
            new = pattern.sub(replacement, new)
        if new != old:
            renamed[old] = new
        elif project.alone:
            outside.append(old)
            continue
        result[new] = value
    if renamed and not project.alone and _hits(result, own) <= _hits(state, own):
        return state  # the model is that project's own
    if note := project.note(model):
        report.notes.append(note)
    report.renamed |= renamed
    report.outside += outside
    return State(result, None) if renamed else state


def _fit_names(model: nn.Module, own: Mapping[str, Any], state: State, prefix: str | None, report: LoadReport) -> State:
    """Drop a prefix and, where more names fit then, what wrappers such as `torch.compile` put into names.

    The model may be wrapped as well: its own wrappers are put in.
    """
    if prefix == "":
        return state
    if prefix and any(name.startswith(f"{prefix}.") for name in state):  # a module's name, without the dot behind it
        prefix += "."
    bare = {_bare(name): name for name in state}
    plain = {_bare(name) for name in own}
    modules = {_bare(name): name for name, _ in model.named_modules()}  # of two equal ones the inner one

    def wrapped(name: str) -> str:
        parts = name.split(".")
        length = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
        return ".".join(filter(None, [modules[".".join(parts[:length])], *parts[length:]]))

    def fits_as_it_is(prefix: str) -> int:
        return _fits(model, own, _without(prefix, state))

    def fits_bare(prefix: str) -> int:
        inside = _without(prefix, bare)
        return _fits(model, own, {wrapped(new): state[old] for new, old in inside.items()})

    # max() takes the first of equals: the names as they are.
    usual = ("", *_PREFIXES)
    used = max(usual, key=fits_as_it_is) if prefix is None else prefix
    short = max(usual, key=fits_bare) if prefix is None else _bare(prefix)
    if len(bare) < len(state) or len(plain) < len(own) or fits_bare(short) <= fits_as_it_is(used):
        return _inside(state, used, report)
    versions = None if state.metadata is None else {_bare(k): v for k, v in state.metadata.items()}
    inside = _inside(State({new: state[old] for new, old in bare.items()}, versions), short, report)
    changed = sum(new != old for new, old in bare.items())
    kinds = sorted({part for name in (*state, *own) for part in name.split(".")} & _WRAPPERS)
    what = " and ".join(map(repr, kinds))
    report.notes.append(f"{what}, which wrappers put into names, taken out of {changed} names")
    metadata = inside.metadata and {wrapped(k): v for k, v in inside.metadata.items()}
    return State({wrapped(name): value for name, value in inside.items()}, metadata)


def _strip(state: State, prefix: str, report: LoadReport) -> State:
    if not prefix:
        return state
    report.outside += [name for name in state if not name.startswith(prefix)]
    inside = _without(prefix, state)
    report.notes.append(f"prefix {prefix!r} removed from {len(inside)} names")
    return State(inside, state.metadata and _without(prefix, state.metadata))


def _compare(
    model: nn.Module,
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    report: LoadReport,
    patterns: Mapping[str, list[str]],
) -> None:
    def allow(name: str, kind: str) -> None:
        if any(fnmatchcase(name, pattern) for pattern in patterns[kind]):
            report.allowed.append(name)

    def storage(tensor: Tensor) -> tuple[int, torch.Size]:
        return tensor.data_ptr(), tensor.shape

    # Files without duplicates (safetensors) hold a tensor that the model has under two names only once.
    given = {storage(value) for name, value in own.items() if name in state and isinstance(value, Tensor)}
    for name, value in own.items():
        if name not in state:
            if isinstance(value, Tensor) and value.data_ptr() and storage(value) in given:
                continue
            report.missing.append(name)
            if name.endswith("num_batches_tracked"):
                report.allowed.append(name)
            else:
                allow(name, "allow_missing")
        elif isinstance(value, Tensor) and isinstance(state[name], Tensor) and value.shape != state[name].shape:
            report.mismatched[name] = (tuple(state[name].shape), tuple(value.shape))
            allow(name, "allow_mismatched")
            report.notes += _explanations(model, name, state[name].shape)
        else:
            report.loaded.append(name)
    for name in state:
        if name not in own:
            report.unexpected.append(name)
            allow(name, "allow_unexpected")


def _explanations(model: nn.Module, name: str, shape: torch.Size) -> list[str]:
    """What the layer whose branch holds `name` says of a tensor that does not fit, if anything."""
    layers = (
        layer
        for path, layer in model.named_modules()
        if isinstance(layer, SamplingModule)
        and name.startswith(path and f"{path}.")
        and layer.predicts_with(name[len(path) :].lstrip("."))
    )
    return [text for layer in layers if (text := layer.explain_mismatch(name, shape))]
