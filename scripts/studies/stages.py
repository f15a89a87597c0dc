"""What the studies share: stages that are reused or resumed, mean and spread over seeds, tables in Markdown."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dcn_plugin.export import load_exported
from dcn_plugin.finetune.run import find_checkpoint, load_config, run

RESULT = "result.json"
# On a busy machine the processor's time tells more than the clock on the wall.
CLOCKS = {"train_seconds": time.perf_counter, "cpu_seconds": time.process_time}
Measure = Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Return the seeds as a list; raise ValueError if there are none, or one twice, or one that is no seed."""
    found = list(seeds)
    if not found:
        raise ValueError("seeds: expected at least one, got none")
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seeds: expected integers from 0 to 2**32 - 1, got {seed!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"seeds: expected each once, got {found}")
    return found


def check_arms(arms: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the arms as a list; raise ValueError if there are none, or one twice, or one that is not known."""
    found = list(arms)
    if not found or not set(found) <= set(known) or len(set(found)) < len(found):
        raise ValueError(f"arms: expected some of {', '.join(known)}, each once, got {found}")
    return found


def run_stage(
    path: Path,
    folder: Path,
    options: Mapping[str, Any],
    measure: Measure,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one config in `folder` and return its numbers; what was finished before is reused, or else resumed.

    Args:
        path: the config.
        folder: where checkpoints, the exported model and `result.json` go.
        options: overrides for the config.
        measure: called with the exported model, the config and what `run` returned; gives numbers that JSON can hold.
        start: weights to start from, as the config's `checkpoint`; other weights are another stage.

    Returns:
        The numbers, beside `train_seconds` and `cpu_seconds` (with validation and test), `parameters`, `export`,
        `checkpoint` and `config`.
    """
    values = load_config(path, options)
    weights = b"" if start is None else Path(start["path"]).read_bytes()
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode() + weights).hexdigest()
    if start is not None:
        values["checkpoint"] = dict(start)

    def train(resume: Path | None) -> dict[str, Any]:
        return run(values, folder, "fit", resume)

    def describe(fitted: Mapping[str, Any]) -> dict[str, Any]:
        model = load_exported(fitted["export"])
        return dict(
            **measure(model, values, fitted),
            parameters=sum(p.numel() for p in model.parameters()),
            export=fitted["export"],
            checkpoint=fitted.get("checkpoint"),
            config=values,
        )

    return run_once(folder, key, path.name, train, describe)


def run_once(
    folder: Path,
    key: str,
    what: str,
    train: Callable[[Path | None], Mapping[str, Any]],
    describe: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Train in `folder` and return the numbers; what was finished before under the same key is reused, or else resumed.

    Args:
        folder: where checkpoints (`last*.ckpt`) and `result.json` go.
        key: of everything that the numbers depend on.
        what: is trained, in words.
        train: called with a checkpoint to go on from, or None; its time is taken.
        describe: makes of what `train` returned the numbers, which JSON can hold, and `export`, a path.
    """
    state = folder / RESULT
    saved = _read(state)
    if saved.get("key") == key and saved.get("finished") and Path(saved["export"]).exists():
        print(f"{folder}: finished before, reused")
        return saved
    resume = find_checkpoint(folder) if saved.get("key") == key else None
    spent = {clock: saved.get(clock, 0.0) if resume else 0.0 for clock in CLOCKS}
    folder.mkdir(parents=True, exist_ok=True)
    _write(state, dict(key=key, finished=False, **spent))
    print(f"{folder}: {'resumed' if resume else 'started'} ({what})")
    began = {clock: read() for clock, read in CLOCKS.items()}
    try:
        found = train(resume)
    finally:
        # Of an interrupted session too: the next one goes on from its checkpoint.
        spent = {clock: spent[clock] + read() - began[clock] for clock, read in CLOCKS.items()}
        _write(state, dict(key=key, finished=False, **spent))
    saved = dict(key=key, finished=True, **spent, **describe(found))
    _write(state, saved)
    return saved


def _read(state: Path) -> dict[str, Any]:
    """Return what the file holds; nothing where there is none, or one that was cut off."""
    try:
        saved = json.loads(state.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _write(state: Path, saved: Mapping[str, Any]) -> None:
    """Replace the file as a whole: whatever stops the program, it is the old one or the new one."""
    new = state.with_name(state.name + ".new")
    new.write_text(json.dumps(saved, indent=2))
    os.replace(new, state)


def over_seeds(outcomes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return `dict(mean=..., spread=..., values=...)` of each number; one seed has no spread (standard deviation)."""
    row = {}
    for key in (*keys, *CLOCKS):
        values = [outcome[key] for outcome in outcomes]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[key] = dict(mean=statistics.fmean(values), spread=spread, values=values)
    return row


def percent(value: Mapping[str, Any]) -> str:
    spread = "" if value["spread"] is None else f" ± {100 * value['spread']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"


def seconds(row: Mapping[str, Any]) -> str:
    return f"{row['train_seconds']['mean']:.0f} ({row['cpu_seconds']['mean']:.0f})"


def sizes(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a network's parameters and multiply-adds."""
    return [f"{row['parameters'] / 1e3:.0f} k", f"{row['multiply_adds'] / 1e6:.2f} M"]


def write_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown with columns of equal width."""
    lines = [head, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def write_results(work_dir: Path, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]], table: str) -> str:
    """Write `results.json` and `results.md` to `work_dir` and return the path of the latter."""
    (work_dir / "results.json").write_text(json.dumps(dict(seeds=list(seeds), rows=rows), indent=2))
    (work_dir / "results.md").write_text(table)
    return str(work_dir / "results.md")


def save_figures(folder: Path, figures: Mapping[str, Any], dpi: int = 120) -> dict[str, str]:
    """Save matplotlib figures as `<name>.png` in `folder` and return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, figure in figures.items():
        files[name] = str(folder / f"{name}.png")
        figure.savefig(files[name], dpi=dpi)
    return files
