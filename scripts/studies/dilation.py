"""Where do receptive fields grow? Effective dilation by the size of the object that a unit lies on.

The question of Dai et al. (2017), table 2. A detector with deformable convolutions is trained on the embedded digit
scenes. Each unit of a deformable layer then belongs to the small, the medium or the large third of the test scenes'
digits, or to the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dcn_plugin import visualize
from dcn_plugin.finetune.detection.data import CocoDataModule
from dcn_plugin.finetune.run import quiet

from .detection import ARMS as DETECTORS
from .stages import check_arms, check_seeds, over_seeds, run_stage, save_figures, write_results, write_table

# Detectors whose RoI pooling does not deform, so that nothing but convolutions does.
ARMS = {arm: detector for arm, (detector, pooling, _) in DETECTORS.items() if "deformable" not in pooling}
SIZES = ("small", "medium", "large", "background")
QUICK = {"data.scenes": dict(train=16, val=2, test=6), "trainer.max_epochs": 1}


def run_study(
    configs: str | Path,
    work_dir: str | Path,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = tuple(ARMS),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md` and the plot to `work_dir`.

    An arm that finished before with the same configuration is reused; one that was interrupted is resumed.

    Args:
        configs: folder of the detection configs.
        work_dir: one folder per seed and arm is made below it.
        seeds: seeds of initial weights, order and sampling of proposals; the scenes are always the same.
        arms: which of `ARMS` to run.
        options: overrides for every arm's config, such as `{'trainer.max_epochs': 1}`.

    Returns:
        `dict(rows=..., table=..., files=...)`: numbers per arm and layer, the Markdown table, and the paths of what was
        written.

    Raises:
        ValueError: no seeds or no arms, one of them twice, or an unknown arm.
    """
    seeds, arms = check_seeds(seeds), check_arms(arms, ARMS)
    configs, work_dir = Path(configs), Path(work_dir)
    outcomes: dict[str, list[dict]] = {arm: [] for arm in arms}
    with quiet():
        for seed in seeds:
            for arm in arms:
                changes = {"seed": seed, **(options or {})}
                folder = work_dir / f"seed{seed}" / arm
                outcomes[arm].append(run_stage(configs / DETECTORS[arm][2], folder, changes, _measure))
    rows = [row for arm in arms for row in _summaries(arm, outcomes[arm])]
    table = _table(rows)
    files = dict(results=write_results(work_dir, seeds, rows, table))
    return dict(rows=rows, table=table, files=files | save_figures(work_dir, dict(dilation=_plot(rows)), dpi=80))


def sizes_of_units(places: Tensor, boxes: Tensor, limits: Sequence[float]) -> Tensor:
    """Return which of `SIZES` each unit belongs to, and -1 where it lies in several boxes.

    Args:
        places: `[H', W', 2]`, the units' centres in image pixels, (y, x), 0 the centre of the first pixel.
        boxes: `[L, 4]` as x1, y1, x2, y2, from the first pixel's upper left corner.
        limits: the largest root of an area, in pixels, that is small, and that is medium.
    """
    y, x = (places[..., None, axis] + 0.5 for axis in (0, 1))
    x1, y1, x2, y2 = boxes.unbind(1)
    inside = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)  # [H', W', L]
    number = torch.bucketize(_sides(boxes), torch.tensor(limits))
    count = inside.sum(-1)
    sizes = torch.where(count == 1, (inside * number).sum(-1), -1)
    return torch.where(count == 0, SIZES.index("background"), sizes)


def _sides(boxes: Tensor) -> Tensor:
    return ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()


def dilation_by_size(
    model: nn.Module, batches: Iterable[tuple[Tensor, Sequence[Tensor]]], limits: Sequence[float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the effective dilation of each layer for each size, in pixels of the layer's map.

    Args:
        model: a detector, or any module that `visualize.record` takes.
        batches: images `[N, C, H, W]`, and the boxes in each.
        limits: as in `sizes_of_units`.

    Returns:
        Layer -> size -> `dict(mean=..., deviation=..., units=...)`, over the units, each the mean of its offset groups.
    """
    values: dict[str, list[Tensor]] = {}
    owners: dict[str, list[Tensor]] = {}
    for images, boxes in batches:
        for item in visualize.record(model, images):
            window = item.window
            assert window is not None
            dilation = visualize.effective_dilation(item.offset.flatten(1, 3), window.kernel_size, window.dilation)
            height, width = dilation.shape[-2:]
            cells = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
            scale, shift = torch.tensor(item.out_grid).T
            places = cells * scale + shift
            owner = torch.stack([sizes_of_units(places, own, limits) for own in boxes])
            values.setdefault(item.name, []).append(dilation.mean(1).flatten())
            owners.setdefault(item.name, []).append(owner.flatten())
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, parts in values.items():
        dilations, numbers = torch.cat(parts), torch.cat(owners[name])
        of_size = {size: dilations[numbers == number] for number, size in enumerate(SIZES)}
        found[name] = {size: _described(own) for size, own in of_size.items()}
    return found


def _described(values: Tensor) -> dict[str, float]:
    mean = values.mean()
    return dict(mean=mean.item(), deviation=(values - mean).square().mean().sqrt().item(), units=len(values))


def _measure(model: nn.Module, values: Mapping[str, Any], fitted: Mapping[str, Any]) -> dict[str, Any]:
    data = CocoDataModule(**values["data"])
    data.setup("test")
    batches = [
        (torch.stack(list(images)), [target["boxes"] for target in targets])
        for images, targets in data.test_dataloader()
    ]
    sides = _sides(torch.cat([own for _, boxes in batches for own in boxes]))
    limits = [sides.quantile(third / 3).item() for third in (1, 2)]
    return dict(AP=fitted["test_map"], limits=limits, dilation=dilation_by_size(model, batches, limits))


def _summaries(arm: str, outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each layer."""
    rows = []
    for layer in outcomes[0]["dilation"]:
        flat = [
            dict(outcome, **{size: found["mean"] for size, found in outcome["dilation"][layer].items()})
            for outcome in outcomes
        ]
        own = outcomes[0]["dilation"][layer]
        rows.append(
            dict(arm=arm, layer=layer, **over_seeds(flat, ["AP", *SIZES]), limits=outcomes[0]["limits"])
            | dict(units={size: own[size]["units"] for size in SIZES})
            | dict(deviation={size: own[size]["deviation"] for size in SIZES})
        )
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [ARMS[row["arm"]], row["layer"].removeprefix("backbone.body."), *(_cell(row[size]) for size in SIZES)]
        for row in rows
    ]
    low, high = rows[0]["limits"]
    limits = (f" (to {low:.0f} pixels)", f" (to {high:.0f})", " (above)", "")
    return write_table(["detector", "layer", *map("".join, zip(SIZES, limits, strict=True))], lines)


def _cell(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.2f}" + ("" if value["spread"] is None else f" ± {value['spread']:.2f}")


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Effective dilation by size, a line for each layer; bars are the standard deviation over seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        means, spreads = ([row[size][key] or 0.0 for size in SIZES] for key in ("mean", "spread"))
        label = f"{ARMS[row['arm']]}, {row['layer'].removeprefix('backbone.body.')}"
        axes.errorbar(SIZES, means, spreads, marker="o", label=label, capsize=3)
    axes.set_xlabel("size of the object that a unit lies on")
    axes.set_ylabel("effective dilation (pixels of the map)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
