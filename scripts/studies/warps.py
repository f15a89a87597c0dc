"""Does deformation replace augmentation? Small networks under growing rotation and scale of embedded digits.

Every arm is trained from scratch twice with the same budget: on digits that stand upright, and on digits turned by up
to 60 degrees and scaled by 0.6 to 1.3. Each is then tested at stated angles and scales, some of them beyond those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dcn_plugin.finetune.run import quiet

from . import networks  # noqa: F401  (names of timm's that arms ask for)
from .digits import digits_data, multiply_adds
from .stages import (
    check_arms,
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

CONFIG = "resnet10_digits-turned.py"
TRAININGS = {"upright": False, "turned and scaled": True}
ANGLES = (15, 30, 45, 60, 90)
SCALES = (0.4, 0.6, 0.8, 1.3, 1.6)
#: What test digits are put through, by its name: an angle in degrees, to either side, and a scale.
WARPS = {
    "upright": (0.0, 1.0),
    **{f"±{angle}°": (float(angle), 1.0) for angle in ANGLES},
    **{f"x {scale}": (0.0, scale) for scale in SCALES},
}
# The rest is in the plot and in `results.json`.
IN_TABLE = ("upright", "±30°", "±60°", "±90°", "x 0.4", "x 0.6", "x 1.6")
QUICK = {"data.dataset.limit": 48, "data.dataset.copies": 1, "data.batch_size": 24, "trainer.max_epochs": 1}


class Arm(NamedTuple):
    """What the table calls an arm, and what it changes in the config."""

    title: str
    changes: Mapping[str, Any]


def _deformable(title: str, layer: str, changes: Mapping[str, Any] | None = None, **options: Any) -> Arm:
    layers = {"model.name": "resnet18_dcn", "model.dcn_layer": dict(type=layer, **options)}
    return Arm(title, {**layers, **(changes or {})})


ARMS = {
    "plain": Arm("plain", {}),
    # As large as the network of DCNv2, in parameters and in multiply-adds.
    "plain-wide": Arm("plain, wider", {"model.channels": [18, 35, 69, 139]}),
    # The last stage's taps are 4 pixels of 6x6 maps apart already.
    "dilated": _deformable("Dilated, x 2", "Dilated", {"model.dcn_stages": [3, 4]}, factor=2),
    "transformer": Arm("SpatialTransformer, plain", {"model.name": "resnet18_behind_transformer"}),
    # Taps at the rate of the rest, as those of all but the transformer: at the published hundredth of it, and a tenth
    # for DCNv3's, they would hardly move in so few steps.
    "active": _deformable("ActiveConv2d", "ActiveConv2d", {"optimizer.offset_lr_mult": 100.0}),
    "affine": _deformable("DCNv1, affine", "DCNv1", offset_form="affine"),
    "similarity": _deformable("DCNv1, similarity", "DCNv1", offset_form="similarity"),
    "bounded": _deformable("DCNv1, at most 1 pixel", "DCNv1", offset_bound=1.0),
    "dcnv1": _deformable("DCNv1", "DCNv1"),
    "dcnv2": _deformable("DCNv2", "DCNv2"),
    # As large as that of DCNv2, too: a DCNv3 has fewer weights than the convolution whose place it takes here.
    "dcnv3": Arm(
        "DCNv3, wider",
        {
            "model.name": "resnet18_of_dcnv3",
            "model.channels": [20, 40, 80, 160],
            "optimizer.offset_lr_mult": 10.0,
        },
    ),
}


def run_study(
    configs: str | Path,
    work_dir: str | Path,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = tuple(ARMS),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md` and the plot to `work_dir`.

    A stage that finished before with the same configuration is reused; one that was interrupted is resumed.

    Args:
        configs: folder of the classification configs.
        work_dir: one folder per seed, arm and training is made below it.
        seeds: seeds of initial weights, order and warps; the split by source image is always the same.
        arms: which of `ARMS` to run.
        options: overrides for every stage's config, such as `{'trainer.max_epochs': 1}`.

    Returns:
        `dict(rows=..., table=..., files=...)`: numbers per arm and training, the Markdown table, and the paths of what
        was written.

    Raises:
        ValueError: no seeds or no arms, one of them twice, or an unknown arm.
    """
    seeds, arms = check_seeds(seeds), check_arms(arms, ARMS)
    work_dir = Path(work_dir)
    stages = [(arm, training) for training in TRAININGS for arm in arms]
    outcomes: dict[tuple[str, str], list[dict]] = {stage: [] for stage in stages}
    with quiet():
        for seed in seeds:
            for number, (arm, training) in enumerate(stages, 1):
                print(f"seed {seed}, {number} of {len(stages)}:", end=" ")
                data = {"seed": seed, "data.dataset.seed": seed, "data.dataset.warp": TRAININGS[training]}
                folder = work_dir / f"seed{seed}" / f"{arm}_{training.split()[0]}"
                changes = {**data, **ARMS[arm].changes, **(options or {})}
                outcomes[arm, training].append(run_stage(Path(configs) / CONFIG, folder, changes, _measure))
    rows = [_summary(*stage, outcomes[stage]) for stage in stages]
    table = _table(rows)
    files = dict(results=write_results(work_dir, seeds, rows, table))
    return dict(rows=rows, table=table, files=files | save_figures(work_dir, dict(warps=_plot(rows)), dpi=80))


def turned_and_scaled(images: Tensor, angle: float, scale: float, black: float) -> Tensor:
    """Return images `[N, C, H, W]` turned about their middle by degrees, and scaled; `black` is what lies around."""
    return F.affine(images, angle, [0, 0], scale, [0.0, 0.0], InterpolationMode.BILINEAR, fill=black)


def _measure(model: nn.Module, values: Mapping[str, Any], fitted: Mapping[str, Any]) -> dict[str, Any]:
    data = digits_data(values, warp=False)
    data.setup("test")
    batches = list(data.test_dataloader())
    black = -values["data"]["mean"][0] / values["data"]["std"][0]
    right = {
        name: sum(_right(model, images, labels, *warp, black) for images, labels in batches)
        for name, warp in WARPS.items()
    }
    total = sum(len(labels) for _, labels in batches)
    accuracy = {name: count / total for name, count in right.items()}
    return dict(**accuracy, multiply_adds=multiply_adds(model, values["data"]["input_size"]))


def _right(model: nn.Module, images: Tensor, labels: Tensor, angle: float, scale: float, black: float) -> float:
    """Return how many labels are found, as the mean over both directions of turning."""
    angles = {angle, -angle}
    with torch.no_grad():
        found = [model(turned_and_scaled(images, turn, scale, black)).argmax(1) == labels for turn in angles]
    return sum(int(hits.sum()) for hits in found) / len(angles)


def _summary(arm: str, training: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = dict(arm=arm, title=ARMS[arm].title, trained_on=training, **over_seeds(outcomes, list(WARPS)))
    return row | {key: outcomes[0][key] for key in ("parameters", "multiply_adds")}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["network", "trained on", *(f"{name} %" for name in IN_TABLE), "parameters", "multiply-adds"]
    lines = [
        [row["title"], row["trained_on"], *(percent(row[name]) for name in IN_TABLE), *sizes(row), seconds(row)]
        for row in rows
    ]
    return write_table([*head, "training s (CPU s)"], lines)


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against angle and scale, for each training; bars are the standard deviation over seeds."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    panels = (("angle to either side (degrees)", 0, (1.0,)), ("scale", 1, (0.0,)))
    for line, training in enumerate(TRAININGS):
        for column, (label, part, still) in enumerate(panels):
            # Warps that change this part of the two alone.
            names = [name for name, warp in WARPS.items() if warp[1 - part] in still]
            names.sort(key=lambda name: WARPS[name][part])
            place = axes[line, column]
            for number, row in enumerate(row for row in rows if row["trained_on"] == training):
                spread = [100 * (row[name]["spread"] or 0.0) for name in names]
                place.errorbar(
                    [WARPS[name][part] for name in names],
                    [100 * row[name]["mean"] for name in names],
                    spread,
                    label=row["title"],
                    color=f"C{number % 10}",
                    linestyle="-" if number < 10 else "--",
                    linewidth=1,
                    elinewidth=0.6,
                )
            place.set_title(f"trained on digits that are {training}", fontsize=10)
            place.set_xlabel(label)
            place.grid(alpha=0.3)
        axes[line, 0].set_ylabel("accuracy (%)")
    axes[0, 1].legend(fontsize=7)
    return figure
