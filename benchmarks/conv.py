"""deform_conv2d against the plain convolution and torchvision's operator."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from harness import Contestants, require_equal, tasks

from dcn_plugin.ops import deform_conv2d

NAME = "deform_conv2d"
ABOUT = "3x3, modulated, offsets N(0, 1)."
COLUMNS = """`/ conv2d` is our time over the plain convolution's
on the same tensors; `torchvision /` is torchvision's time (float32, NCHW) over ours."""


class Shape(NamedTuple):
    """A 3x3 layer: batch, channels, height, width, stride, groups, offset groups."""

    batch: int
    channels: int
    height: int
    width: int
    stride: int = 1
    groups: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        for name, value in (("stride", self.stride), ("groups", self.groups), ("offset groups", self.offset_groups)):
            text += f", {name} {value}" if value != 1 else ""
        return text


SHAPES = [
    *(Shape(n, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for n in (1, 8)),
    Shape(2, 128, 56, 56, stride=2),
    Shape(1, 256, 100, 152),
    Shape(2, 128, 28, 28, offset_groups=4),
    Shape(2, 128, 28, 28, groups=8, offset_groups=8),
    Shape(2, 128, 28, 28, groups=128),
]
QUICK = [Shape(2, 64, 56, 56), Shape(2, 256, 14, 14)]


def problem(shape: Shape, device: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    out = ((shape.height - 1) // shape.stride + 1, (shape.width - 1) // shape.stride + 1)
    values = {
        "input": torch.randn(shape.batch, shape.channels, shape.height, shape.width),
        "offset": torch.randn(shape.batch, 18 * shape.offset_groups, *out),
        "weight": torch.randn(shape.channels, shape.channels // shape.groups, 3, 3) / (9 * shape.channels) ** 0.5,
        "mask": torch.rand(shape.batch, 9 * shape.offset_groups, *out),
    }
    on = {k: v.to(device, dtype) for k, v in values.items()}
    for name in ("input", "weight"):
        on[name] = on[name].contiguous(memory_format=layout)
    return {k: v.requires_grad_() for k, v in on.items()}


def contestants(shape: Shape, t: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> Contestants:
    """Ours and the plain convolution on ``t``; torchvision on ``peer``, the type and layout it works in."""
    how = dict(stride=shape.stride, padding=1)
    return {
        "dcn_plugin": lambda: deform_conv2d(t["input"], t["offset"], t["weight"], mask=t["mask"], **how),
        "conv2d": lambda: F.conv2d(t["input"], t["weight"], groups=shape.groups, **how),
        "torchvision": lambda: torchvision.ops.deform_conv2d(
            peer["input"], peer["offset"], peer["weight"], mask=peer["mask"], **how
        ),
    }


def rows_for(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    rows = []
    for layout_name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        t = problem(shape, device, dtype, layout)
        peer = problem(shape, device, torch.float32, torch.contiguous_format)
        forward = contestants(shape, t, peer)
        require_equal(str(shape), forward["dcn_plugin"](), forward["torchvision"]())  # type: ignore[arg-type]
        tensors = {
            "dcn_plugin": list(t.values()), "conv2d": [t["input"], t["weight"]], "torchvision": list(peer.values()),
        }  # fmt: skip
        rows += [{"shape": str(shape), "layout": layout_name, **row} for row in tasks(forward, tensors, device, rounds)]
    return rows


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    return {
        "ms": f"{row['dcn_plugin']['ms']:.2f}",
        "/ conv2d": f"{row['conv2d']['ratio']:.2f}",
        "torchvision /": f"{1 / row['torchvision']['ratio']:.1f}x",
        "spread": f"{row['dcn_plugin']['spread']:.0%}",
    }
