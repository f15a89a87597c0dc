"""Draw the pictures in docs/images: `python docs/make_figures.py [--export FOLDER]`.

What the operator's rules look like is computed with the operator. FOLDER is an exported model trained on the warped
digits (`work_dirs/digits_study/seed0/dcn/export` after the quickstart); without it the picture of sampling points stays
as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from dcn_plugin.ops import deform_conv2d

IMAGES = Path(__file__).resolve().parent / "images"
RED, BLUE, GRAY, DARK = "#d62728", "#1f77b4", "#b5b5b5", "#333333"


def save(figure: Figure, name: str) -> None:
    # Neither a date nor random ids: the same drawing gives the same file.
    figure.savefig(IMAGES / name, metadata={"Date": None} if name.endswith(".svg") else None)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draw an arrow between two (y, x) positions."""
    style = dict(arrowstyle="-|>", color=color, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", xy=end[::-1], xytext=start[::-1], arrowprops=style)


def sampling() -> Figure:
    """The taps of one output pixel, without and with offsets, and the bilinear read of one of them."""
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    size, p0 = 7, (3.0, 3.0)
    left.scatter(*torch.cartesian_prod(torch.arange(size), torch.arange(size)).T.tolist(), s=14, c=GRAY)
    offset = torch.tensor(
        [
            [-1.3, -0.9],
            [-1.2, 0.3],
            [-0.7, 1.4],
            [0.4, -1.5],
            [0.3, 0.4],
            [-0.4, 1.7],
            [1.4, -0.6],
            [1.2, 0.5],
            [0.8, 1.3],
        ]
    )
    for tap in range(9):
        base = (p0[0] + tap // 3 - 1, p0[1] + tap % 3 - 1)
        end = (base[0] + offset[tap, 0].item(), base[1] + offset[tap, 1].item())
        arrow(left, base, end, GRAY)
        left.plot(base[1], base[0], "o", markersize=7, markerfacecolor="white", markeredgecolor=BLUE)
        left.plot(end[1], end[0], "o", markersize=6, color=RED)
        left.text(end[1] + 0.12, end[0] - 0.12, str(tap), color=RED, fontsize=10)
    left.set_title(
        "taps k = 0..8 of one output pixel: without offsets (blue),\nat their sampling positions (red)", fontsize=10
    )

    y, x = 0.35, 0.7
    corners = {(0, 0): (1 - y) * (1 - x), (0, 1): (1 - y) * x, (1, 0): y * (1 - x), (1, 1): y * x}
    for (row, column), weight in corners.items():
        right.plot(column, row, "o", color=DARK, markersize=9)
        names = f"({'y0' if row == 0 else 'y0+1'}, {'x0' if column == 0 else 'x0+1'})"
        place, align = (-0.08, "bottom") if row == 0 else (0.13, "center")
        right.text(column, row + place, f"{names}\nweight {weight:.3f}", ha="center", va=align, fontsize=9)
    right.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color=GRAY, linewidth=1)
    right.plot([x, x], [0, 1], [0, 1], [y, y], color=RED, linewidth=0.8, linestyle=":")
    right.plot(x, y, "o", color=RED, markersize=8)
    right.text(x - 0.04, y + 0.09, f"ly = {y}, lx = {x}", color=RED, fontsize=9, ha="right")
    right.set_title("a position is read from its four corners", fontsize=10)
    right.set_xlim(-0.5, 1.5)
    right.set_ylim(1.35, -0.35)
    left.set_ylim(size - 0.5, -0.5)
    for axes in (left, right):
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("x →")
        axes.set_ylabel("← y")
    return figure


def border() -> Figure:
    """Value and derivative of one tap that moves over a map of ones, from above it to below it."""
    height = 4
    eps = 1e-3
    corners = torch.tensor([-1.0, 0.0, height - 1.0, height])
    y = (
        torch.cat([torch.linspace(-2, height + 1, 301, dtype=torch.float64), corners - eps, corners + eps])
        .sort()
        .values
    )
    # One image per position, each with one output pixel at (0, 0), which the offset moves to (y, 1).
    offset = torch.stack([y, torch.ones_like(y)], dim=1)[:, :, None, None].requires_grad_()
    images = torch.ones(1, 1, height, height, dtype=torch.float64).expand(len(y), -1, -1, -1)
    value = deform_conv2d(images, offset, torch.ones(1, 1, 1, 1, dtype=torch.float64), stride=height)
    (gradient,) = torch.autograd.grad(value.sum(), offset)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(y, value.detach().flatten(), color=BLUE)
    top.set_ylabel("value")
    bottom.plot(y, gradient[:, 0].flatten(), color=RED, linewidth=1)
    for edge in (-1, height):
        bottom.plot(edge, 0, "o", color=RED, markersize=5)
        bottom.plot(edge, -1 if edge > 0 else 1, "o", markerfacecolor="white", markeredgecolor=RED, markersize=5)
        top.plot(edge, 0, "o", color=BLUE, markersize=5)
    bottom.set_ylabel("d value / dy")
    bottom.set_xticks([-1, 0, height - 1, height], ["−1", "0", "H−1", "H"])
    bottom.set_xlabel("position y of the tap on a map of ones")
    for axes in (top, bottom):
        axes.axvspan(-2, -1, color="#eeeeee")
        axes.axvspan(height, height + 1, color="#eeeeee")
        axes.set_xlim(-2, height + 1)
        axes.grid(axis="x", alpha=0.4)
    top.text(-1.5, 0.5, "outside", ha="center", fontsize=9)
    top.text(height + 0.5, 0.5, "outside", ha="center", fontsize=9)
    return figure


def layout() -> Figure:
    """The channels of offset and mask for two offset groups of a 3x3 kernel."""
    groups, taps = 2, 9
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    colors = ("#cfe2f3", "#fce5cd")

    def cell(x: float, y: float, width: float, text: str, color: str, size: int = 8) -> None:
        axes.add_patch(matplotlib.patches.Rectangle((x, y), width, 0.8, facecolor=color, edgecolor=DARK, linewidth=0.6))
        axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=size)

    for group in range(groups):
        for tap in range(taps):
            x = 2 * (group * taps + tap)
            cell(x, 2.4, 1, "y", colors[group])
            cell(x + 1, 2.4, 1, "x", colors[group])
            cell(x, 0, 2, str(group * taps + tap), colors[group])
            axes.text(x + 1, 1.85, f"k={tap}", ha="center", fontsize=8)
            axes.text(x + 0.5, 3.35, str(x), ha="center", fontsize=6, color="#777777")
            axes.text(x + 1.5, 3.35, str(x + 1), ha="center", fontsize=6, color="#777777")
        middle = taps * (2 * group + 1)
        axes.text(middle, 3.95, f"offset group g = {group}", ha="center", fontsize=10)
    axes.text(-0.4, 2.8, "offset\n[N, 2·G·K, H', W']", ha="right", va="center", fontsize=9)
    axes.text(-0.4, 0.4, "mask\n[N, G·K, H', W']", ha="right", va="center", fontsize=9)
    axes.set_xlim(-7.5, 2 * groups * taps + 0.2)
    axes.set_ylim(-0.2, 4.6)
    axes.set_axis_off()
    return figure


def digits(export: str) -> Figure:
    """Sampling points of the first deformable layer of a trained model on upright and warped digits."""
    from dcn_plugin.finetune import Digits, load_exported
    from dcn_plugin.visualize import record, trace

    model = load_exported(export)
    figure = Figure(figsize=(9.6, 2.5), layout="constrained")
    upright, warped = Digits("test", warp=False), Digits("test", warp=True)
    chosen = ((upright, 0), (warped, 0), (upright, 6), (warped, 6))
    for axes, (data, index) in zip(figure.subplots(1, 4), chosen, strict=True):
        picture = data.draw(index)[0].float() / 255
        first = record(model, (picture - 0.5)[None] / 0.5)[:1]
        still = [replace(first[0], offset=torch.zeros_like(first[0].offset))]
        unit = torch.nonzero(picture > 0.5).float().median(dim=0).values
        axes.imshow(picture, cmap="gray", interpolation="nearest")
        for records, style in ((still, dict(facecolors="none", edgecolors="#5ab4ff")), (first, dict(color="#ff2d2d"))):
            points = trace(records, (unit[0].item(), unit[1].item()))
            axes.scatter(points[:, 1], points[:, 0], s=16, linewidths=1.0, **style)
        axes.set_xlim(-0.5, picture.shape[1] - 0.5)
        axes.set_ylim(picture.shape[0] - 0.5, -0.5)
        axes.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", help="exported model to draw the sampling points of")
    args = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "dcn_plugin", "svg.fonttype": "path", "font.size": 9})
    IMAGES.mkdir(exist_ok=True)
    for draw in (sampling, border, layout):
        save(draw(), f"{draw.__name__}.svg")
    if args.export:
        save(digits(args.export), "digits.png")


if __name__ == "__main__":
    main()
