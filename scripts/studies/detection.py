"""What deformable RoI pooling buys two small detectors on the embedded digit scenes, at the same budget.

Faster R-CNN with RoIAlign and with deformable RoI pooling, R-FCN and its deformable form are trained from scratch on
the same scenes with the same optimizer, schedule and number of epochs. Everything runs through `run` and the configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcn_plugin import visualize
from dcn_plugin._config import plain
from dcn_plugin.export import load_exported
from dcn_plugin.finetune.detection.data import CocoDataModule
from dcn_plugin.finetune.run import quiet

from .stages import (
    check_arms,
    check_seeds,
    over_seeds,
    percent,
    run_stage,
    save_figures,
    seconds,
    write_results,
    write_table,
)

# Arm -> (detector, RoI pooling, config).
ARMS = {
    "faster-rcnn": ("Faster R-CNN", "RoIAlign", "faster-rcnn_resnet10-dcn_roialign_digit-scenes.py"),
    "faster-rcnn-deformable": (
        "Faster R-CNN",
        "deformable",
        "faster-rcnn_resnet10-dcn_deform-roi-pool_digit-scenes.py",
    ),
    "rfcn": ("R-FCN", "position-sensitive", "rfcn_resnet10-dcn_digit-scenes.py"),
    "rfcn-deformable": ("R-FCN", "deformable position-sensitive", "rfcn-deformable_resnet10-dcn_digit-scenes.py"),
}
# Column of the table -> what torchmetrics calls it.
SCORES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


def run_study(
    configs: str | Path,
    work_dir: str | Path,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = tuple(ARMS),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md` and pictures to `work_dir`.

    An arm that finished before with the same configuration is reused; one that was interrupted is resumed. The pictures
    are those of the first seed: what each arm finds in the same test scenes, and where the deformable ones move bins.

    Args:
        configs: folder of the detection configs.
        work_dir: one folder per seed and arm is made below it.
        seeds: seeds of initial weights, order and sampling of proposals; the scenes are always the same.
        arms: which of `ARMS` to run.
        options: overrides for every arm's config, such as `{'trainer.max_epochs': 1}`.

    Returns:
        `dict(rows=..., table=..., files=...)`: numbers per arm, the Markdown table, and the paths of what was written.

    Raises:
        ValueError: no seeds or no arms, one of them twice, or an unknown arm.
    """
    seeds = check_seeds(seeds)
    arms = check_arms(arms, ARMS)
    configs, work_dir = Path(configs), Path(work_dir)
    outcomes: dict[str, list[dict]] = {arm: [] for arm in arms}
    with quiet():
        for seed in seeds:
            for arm in arms:
                changes = {"seed": seed, **(options or {})}
                folder = work_dir / f"seed{seed}" / arm
                outcomes[arm].append(run_stage(configs / ARMS[arm][2], folder, changes, _measure))
    files = _pictures({arm: found[0] for arm, found in outcomes.items()}, work_dir / "pictures")
    rows = [_summary(arm, outcomes[arm]) for arm in arms]
    table = _table(rows)
    files = dict(results=write_results(work_dir, seeds, rows, table), **files)
    return dict(rows=rows, table=table, files=files)


def _measure(model: nn.Module, values: Mapping[str, Any], fitted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fitted[f"test_{key}"] for name, key in SCORES.items()}


def _summary(arm: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    detector, pooling, _ = ARMS[arm]
    row: dict[str, Any] = dict(arm=arm, detector=detector, pooling=pooling, **over_seeds(outcomes, list(SCORES)))
    return row | dict(parameters=outcomes[0]["parameters"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["detector", "RoI pooling", *(f"test {name} %" for name in SCORES), "parameters", "training s (CPU s)"]
    lines = [
        [
            row["detector"],
            row["pooling"],
            *(percent(row[name]) for name in SCORES),
            f"{row['parameters'] / 1e3:.0f} k",
            seconds(row),
        ]
        for row in rows
    ]
    return write_table(head, lines)


def _pictures(outcomes: Mapping[str, Mapping[str, Any]], folder: Path, scenes: int = 3) -> dict[str, str]:
    data = CocoDataModule(**plain(next(iter(outcomes.values()))["config"]["data"]))
    data.setup("test")
    images, targets = next(iter(data.test_dataloader()))
    images, targets = images[:scenes], targets[:scenes]
    names = ["background", *data.class_names]
    figures = {}
    for arm, outcome in outcomes.items():
        model = load_exported(outcome["export"])
        with torch.no_grad():
            found = model(list(images))
        figures[f"{arm}_detections"] = visualize.draw_detections(images, found, targets, names)
        figures[f"{arm}_detections"].suptitle(": ".join(ARMS[arm][:2]), fontsize=9)
        if "deformable" in arm:
            # Of the true boxes, so that all detectors are asked the same.
            boxes, labels = targets[0]["boxes"][:4], targets[0]["labels"][:4]
            figures[f"{arm}_bins"] = visualize.bin_shifts(model, images[0], boxes, labels, class_names=names)
    return save_figures(folder, figures, dpi=80)
