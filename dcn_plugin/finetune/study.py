"""The question of the paper's readers, on the embedded digits: what do learned sampling points buy on warped images?

A plain small ResNet learns upright digits. From its weights, the same network and its deformable form are then
fine-tuned on warped digits with the same budget; optionally both also without warps. Everything runs through `run` and
the configs.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import visualize
from .config import plain
from .data import ImageDataModule
from .digits import Digits
from .export import load_exported
from .run import check_config, find_checkpoint, quiet, run

# Arm -> (what it is, config). The base comes first; the others start from its weights.
BASE = "resnet10_digits-upright.py"
ARMS = {
    "plain": ("plain", "warped", "resnet10_digits-warped.py"),
    "dcn": ("DCN", "warped", "resnet10-dcn_digits-warped.py"),
}
UPRIGHT_ARMS = {
    "plain-upright": ("plain", "upright", "resnet10_digits-upright-finetune.py"),
    "dcn-upright": ("DCN", "upright", "resnet10-dcn_digits-upright-finetune.py"),
}
RESULT = "result.json"
# On a busy machine the processor's time tells more than the clock on the wall.
CLOCKS = {"train_seconds": time.perf_counter, "cpu_seconds": time.process_time}


def multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return the multiply-adds of one image [C, H, W] through convolutions, deformable ones and matrix products."""
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def run_study(
    configs: str | Path,
    work_dir: str | Path,
    seeds: Sequence[int] = (0,),
    upright_arms: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md` and pictures to `work_dir`.

    A stage that finished before with the same configuration is reused; one that was interrupted is resumed.

    Args:
        configs: folder of the classification configs.
        work_dir: one folder per seed and stage is made below it.
        seeds: seeds of initial weights, order and warps; the split by source image is always the same.
        upright_arms: also fine-tune both networks without warps.
        options: overrides for every stage's config, such as `{'trainer.max_epochs': 1}`.

    Returns:
        `dict(rows=..., table=..., files=...)`: numbers per arm, the Markdown table, and the paths of what was written.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    configs, work_dir = Path(configs), Path(work_dir)
    arms = ARMS | (UPRIGHT_ARMS if upright_arms else {})
    outcomes: dict[str, list[dict]] = {"base": [], **{arm: [] for arm in arms}}
    with quiet():
        for seed in seeds:
            folder = work_dir / f"seed{seed}"
            base = _stage(configs / BASE, folder / "base", seed, options)
            outcomes["base"].append(base)
            start = dict(path=str(Path(base["export"]) / "model.safetensors"), allow_missing=["*.conv_offset.*"])
            for arm, (_, _, config) in arms.items():
                outcomes[arm].append(_stage(configs / config, folder / arm, seed, options, start))
        files = _pictures(outcomes["dcn"][0], work_dir / "pictures")
    what = {"base": ("plain", "upright (start of the others)")}
    what |= {arm: (model, f"upright, then {data}") for arm, (model, data, _) in arms.items()}
    rows = [_summary(arm, *what[arm], outcomes[arm]) for arm in ("base", *arms)]
    table = _table(rows)
    (work_dir / "results.json").write_text(json.dumps(dict(seeds=list(seeds), rows=rows), indent=2))
    (work_dir / "results.md").write_text(table)
    files = dict(
        checkpoint=outcomes["dcn"][0]["checkpoint"],
        export=outcomes["dcn"][0]["export"],
        results=str(work_dir / "results.md"),
        **files,
    )
    return dict(rows=rows, table=table, files=files)


def _stage(
    path: Path, folder: Path, seed: int, options: Mapping[str, Any] | None, start: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    config = Config.fromfile(str(path))
    config.merge_from_dict({"seed": seed, "data.dataset.seed": seed, **(options or {})})
    values = plain(config.to_dict())
    check_config(values)
    weights = b"" if start is None else Path(start["path"]).read_bytes()
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode() + weights).hexdigest()
    if start is not None:
        values["checkpoint"] = dict(start)
    state = folder / RESULT
    saved = json.loads(state.read_text()) if state.is_file() else {}
    if saved.get("key") == key and saved.get("finished") and Path(saved["export"]).is_dir():
        print(f"{folder}: finished before, reused")
        return saved
    resume = find_checkpoint(folder) if saved.get("key") == key else None
    spent = {clock: saved.get(clock, 0.0) if resume else 0.0 for clock in CLOCKS}
    folder.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps(dict(key=key, finished=False, **spent)))
    print(f"{folder}: {'resumed' if resume else 'started'} ({path.name})")
    began = {clock: read() for clock, read in CLOCKS.items()}
    fitted = run(values, folder, "fit", resume)
    spent = {clock: spent[clock] + read() - began[clock] for clock, read in CLOCKS.items()}
    model = load_exported(fitted["export"])
    upright, warped = (_accuracy(model, values, warp) for warp in (False, True))
    saved = dict(
        key=key,
        finished=True,
        **spent,
        upright=upright,
        warped=warped,
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds(model, values["data"]["input_size"]),
        milliseconds_per_image=_latency(model, values["data"]["input_size"]),
        export=fitted["export"],
        checkpoint=fitted.get("checkpoint"),
        config=values,
    )
    state.write_text(json.dumps(saved, indent=2))
    return saved


def _data(values: Mapping[str, Any], warp: bool) -> ImageDataModule:
    dataset = dict(values["data"].get("dataset", {}), warp=warp, copies=4 if warp else 1)
    return ImageDataModule(**dict(values["data"], dataset=dataset, train_dataset=None))


def _accuracy(model: nn.Module, values: Mapping[str, Any], warp: bool) -> float:
    data = _data(values, warp)
    data.setup("test")
    right, total = 0, 0
    with torch.no_grad():
        for images, labels in data.test_dataloader():
            right += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    return right / total


def _latency(model: nn.Module, input_size: Sequence[int], batch: int = 64, repeats: int = 20) -> float:
    images = torch.zeros(batch, *input_size)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - began)
    return 1000 * min(times[1:]) / batch


def _summary(arm: str, model: str, trained_on: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = dict(arm=arm, model=model, trained_on=trained_on)
    for key in ("upright", "warped", *CLOCKS, "milliseconds_per_image"):
        values = [outcome[key] for outcome in outcomes]
        row[key] = dict(
            mean=statistics.fmean(values), spread=statistics.stdev(values) if len(values) > 1 else None, values=values
        )
    return row | {key: outcomes[0][key] for key in ("parameters", "multiply_adds")}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    def percent(value: Mapping[str, Any]) -> str:
        spread = "" if value["spread"] is None else f" ± {100 * value['spread']:.1f}"
        return f"{100 * value['mean']:.1f}{spread}"

    head = ["model", "trained on", "upright test %", "warped test %", "parameters", "multiply-adds"]
    lines = [[*head, "training s (CPU s)", "ms per image"]]
    for row in rows:
        lines.append(
            [
                row["model"],
                row["trained_on"],
                percent(row["upright"]),
                percent(row["warped"]),
                f"{row['parameters'] / 1e3:.0f} k",
                f"{row['multiply_adds'] / 1e6:.2f} M",
                f"{row['train_seconds']['mean']:.0f} ({row['cpu_seconds']['mean']:.0f})",
                f"{row['milliseconds_per_image']['mean']:.3f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def _pictures(outcome: Mapping[str, Any], folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    model = load_exported(outcome["export"])
    data = _data(outcome["config"], warp=True)
    data.setup("test")
    data.test_dataloader()
    digits: Digits = data._dataset("test")
    images = torch.stack([digits[i][0] for i in range(min(64, len(digits)))])
    side = images.shape[-1]
    units = [(side / 2, side / 2), (side / 8, side / 8)]  # on the digit, and on the background
    figures = dict(
        sampling_points=visualize.sampling_points(model, images[:3], units, layers=2),
        offset_field=visualize.offset_field(model, images[0]),
        effective_dilation=visualize.dilation_plot(model, images),
    )
    files = {}
    for name, figure in figures.items():
        files[name] = str(folder / f"{name}.png")
        figure.savefig(files[name], dpi=120)
    return files
