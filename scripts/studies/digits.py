"""The question of the paper's readers, on the embedded digits: what do learned sampling points buy on warped images?

A plain small ResNet learns upright digits. From its weights, the same network and its deformable form are then
fine-tuned on warped digits with the same budget; optionally both also without warps. Everything runs through `run` and
the configs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcn_plugin import visualize
from dcn_plugin.export import load_exported
from dcn_plugin.finetune.classification.data import ImageDataModule
from dcn_plugin.finetune.digits import Digits
from dcn_plugin.finetune.run import quiet

from .stages import (
    check_seeds,
    over_seeds,
    percent,
    run_stage,
    save_figures,
    seconds,
    sizes,
    write_results,
    write_table,
)

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
    seeds = check_seeds(seeds)
    configs, work_dir = Path(configs), Path(work_dir)
    arms = ARMS | (UPRIGHT_ARMS if upright_arms else {})
    outcomes: dict[str, list[dict]] = {"base": [], **{arm: [] for arm in arms}}
    with quiet():
        for seed in seeds:
            folder = work_dir / f"seed{seed}"
            changes = {"seed": seed, "data.dataset.seed": seed, **(options or {})}
            base = run_stage(configs / BASE, folder / "base", changes, _measure)
            outcomes["base"].append(base)
            start = dict(path=str(Path(base["export"]) / "model.safetensors"), allow_missing=["*.conv_offset.*"])
            for arm, (_, _, config) in arms.items():
                outcomes[arm].append(run_stage(configs / config, folder / arm, changes, _measure, start))
        files = _pictures(outcomes["dcn"][0], work_dir / "pictures")
    what = {"base": ("plain", "upright (start of the others)")}
    what |= {arm: (model, f"upright, then {data}") for arm, (model, data, _) in arms.items()}
    rows = [_summary(arm, *what[arm], outcomes[arm]) for arm in ("base", *arms)]
    table = _table(rows)
    files = dict(
        checkpoint=outcomes["dcn"][0]["checkpoint"],
        export=outcomes["dcn"][0]["export"],
        results=write_results(work_dir, seeds, rows, table),
        **files,
    )
    return dict(rows=rows, table=table, files=files)


def _measure(model: nn.Module, values: Mapping[str, Any], fitted: Mapping[str, Any]) -> dict[str, Any]:
    upright, warped = (_accuracy(model, values, warp) for warp in (False, True))
    size = values["data"]["input_size"]
    return dict(
        upright=upright,
        warped=warped,
        multiply_adds=multiply_adds(model, size),
        milliseconds_per_image=_latency(model, size),
    )


def digits_data(values: Mapping[str, Any], warp: bool) -> ImageDataModule:
    """Return the data of a config, all splits upright or all warped, with four warps of each image."""
    dataset = dict(values["data"].get("dataset", {}), warp=warp, copies=4 if warp else 1)
    return ImageDataModule(**dict(values["data"], dataset=dataset, train_dataset=None))


def _accuracy(model: nn.Module, values: Mapping[str, Any], warp: bool) -> float:
    data = digits_data(values, warp)
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
    row |= over_seeds(outcomes, ("upright", "warped", "milliseconds_per_image"))
    return row | {key: outcomes[0][key] for key in ("parameters", "multiply_adds")}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["model", "trained on", "upright test %", "warped test %", "parameters", "multiply-adds"]
    lines = [
        [
            row["model"],
            row["trained_on"],
            percent(row["upright"]),
            percent(row["warped"]),
            *sizes(row),
            seconds(row),
            f"{row['milliseconds_per_image']['mean']:.3f}",
        ]
        for row in rows
    ]
    return write_table([*head, "training s (CPU s)", "ms per image"], lines)


def _pictures(outcome: Mapping[str, Any], folder: Path) -> dict[str, str]:
    model = load_exported(outcome["export"])
    data = digits_data(outcome["config"], warp=True)
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
    return save_figures(folder, figures)
