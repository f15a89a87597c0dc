"""The spatial transformer against torch's `affine_grid` and `grid_sample`, the localiser left out of both."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import LAYOUTS, OURS, Call, Contestant, Setting, differentiated, exact, require_agreement, times_ours
from torch import Tensor, nn

from dcn_plugin.layers import SpatialTransformer

NAME = "spatial_transformer"
TORCH = "grid_sample"
COLUMNS = {
    "cpu": f"""`{TORCH} /` is the time of torch's functions over ours, in
the same layout, and `in its best` that of the faster of their two layouts."""
}
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(name, layout) for name in (OURS, TORCH) for layout in LAYOUTS]}


class Shape(NamedTuple):
    batch: int
    channels: int
    side: int
    padding_mode: str = "zeros"

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}, {self.padding_mode}"


SHAPES = {
    "cpu": [
        Shape(64, 1, 28),
        Shape(16, 3, 64),
        Shape(8, 16, 56),
        Shape(1, 64, 56),
        Shape(8, 64, 28),
        Shape(8, 64, 28, "border"),
        Shape(8, 64, 28, "reflection"),
        Shape(4, 256, 14),
    ]
}
QUICK = {"cpu": [SHAPES["cpu"][0], SHAPES["cpu"][3]]}


class Given(nn.Module):
    """A localiser that returns what it holds."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta


def about(setting: Setting) -> str:
    return "transformations the identity and N(0, 0.2^2), align_corners=False; gradients of map and transformation"


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    if name == TORCH and setting.dtype != torch.float32:
        return {}  # it computes positions in half precision
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.side, shape.side)
    x, grad = (torch.randn(size).to(setting.dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    theta = torch.eye(2, 3) + 0.2 * torch.randn(shape.batch, 2, 3)
    layer = SpatialTransformer(shape.channels, Given(theta), padding_mode=shape.padding_mode)
    if name == OURS:
        return differentiated(lambda: layer(x), [x, layer.localiser.theta], grad)
    theta.requires_grad_()

    def torchs() -> Tensor:
        grid = F.affine_grid(theta, list(size), align_corners=False)
        return F.grid_sample(x, grid, padding_mode=shape.padding_mode, align_corners=False)

    return differentiated(torchs, [x, theta], grad)


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    limit = 2e-4 if exact(setting) else 3e-2
    require_agreement(shape, made, (OURS, TORCH), (OURS, "NCHW"), limit)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours = row[OURS][row["layout"]]
    same = f"{1 / row[TORCH][row['layout']]['ratio']:.1f}x" if TORCH in row else "-"
    return {
        "ms": f"{ours['ms']:.3f}",
        f"{TORCH} /": same,
        "in its best": times_ours(row, TORCH),
        "spread": f"{ours['spread']:.0%}",
    }
