"""RoI pooling against torchvision's roi_align and ps_roi_align, which pool without deformation."""

import math
from typing import NamedTuple

import torch
import torchvision
from gpu import FUSED, Work
from harness import (
    LAYOUTS,
    OURS,
    Call,
    Contestant,
    Setting,
    best,
    differentiated,
    exact,
    mib,
    peaks,
    require_agreement,
    require_equal,
    times_ours,
)
from torch import Tensor

from dcn_plugin import ops, reference

NAME = "roi_pool"
OPERATORS = ("deform_roi_pool", "deform_ps_roi_pool")
_COLUMNS = """`ms` is ours with offsets, `plain ms` without;
`torchvision /` is the time of torchvision's operator without deformation (float32, NCHW; `roi_align`, for PS
`ps_roi_align`) over ours with offsets, and over ours without. `MiB` is the peak memory of a call above its arguments
and results."""
COLUMNS = {"cpu": _COLUMNS, "cuda": _COLUMNS}
TORCHVISION: Contestant = ("torchvision", "NCHW")
KERNELS = {OURS: FUSED, "plain": FUSED}
COPIES = 4
_CONTESTANTS: list[Contestant] = [*((name, layout) for name in (OURS, "plain") for layout in LAYOUTS), TORCHVISION]
CONTESTANTS = {"cpu": _CONTESTANTS, "cuda": _CONTESTANTS}


class Shape(NamedTuple):
    """Batch, channels of the map (of the result for PS), height, width, regions, samples along each axis of a bin."""

    batch: int
    channels: int
    height: int
    width: int
    regions: int
    samples: int = 2
    position_sensitive: bool = False

    def __str__(self) -> str:
        kind = "PS, " if self.position_sensitive else ""
        grid = f"{self.samples}x{self.samples} samples" if self.samples else "adaptive samples"
        return f"{kind}{self.batch}x{self.channels}x{self.height}x{self.width}, {self.regions} regions, {grid}"


SHAPES = {
    "cpu": [
        Shape(2, 256, 50, 68, 512),
        Shape(2, 256, 50, 68, 1000),
        Shape(2, 256, 50, 68, 512, samples=0),
        Shape(8, 64, 32, 32, 512),
        Shape(1, 21, 38, 50, 300, samples=4, position_sensitive=True),
        Shape(1, 8, 38, 50, 100, samples=4, position_sensitive=True),
    ],
    "cuda": [
        Shape(16, 256, 50, 68, 8192),
        Shape(16, 256, 50, 68, 8192, samples=0),
        Shape(8, 21, 38, 50, 2400, samples=4, position_sensitive=True),
        Shape(2, 256, 50, 68, 1000),
    ],
}
QUICK = {
    "cpu": [Shape(2, 64, 32, 32, 128), Shape(1, 8, 38, 50, 100, samples=4, position_sensitive=True)],
    "cuda": SHAPES["cuda"][::2],
}
SCALE, BINS = 1 / 16, 7
# So many regions are compared with the reference.
CHECKED = 8


def about(setting: Setting) -> str:
    return f"7x7 bins, stride 16, regions of 20 to 320 pixels, offsets N(0, {setting.offset_std:g}^2)"


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of the arguments that have the type of the map, and of a gradient of the result."""
    channels = shape.channels * (BINS**2 if shape.position_sensitive else 1)
    return {
        "input": (shape.batch, channels, shape.height, shape.width),
        "offset": (shape.regions, 2, BINS, BINS),
        "grad": (shape.regions, shape.channels, BINS, BINS),
    }


def work(shape: Shape, task: str, itemsize: int) -> Work:
    """The whole map counts as read, and its gradient as written, whichever part the regions cover."""
    numbers = {name: itemsize * math.prod(size) for name, size in sizes(shape).items()}
    result, gradients = numbers.pop("grad"), sum(numbers.values())
    forward = Work(
        OPERATORS[shape.position_sensitive], traffic=gradients + shape.regions * 5 * torch.float32.itemsize + result
    )
    return forward if task == "forward" else forward.with_backward(gradients)


def problem(shape: Shape, setting: Setting, layout: str, through: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    count, on = sizes(shape), dict(device=setting.device)
    farthest = torch.tensor([shape.width / SCALE - 320, shape.height / SCALE - 320], **on)
    corner = torch.rand(shape.regions, 2, **on) * farthest
    size = 20 + 300 * torch.rand(shape.regions, 2, **on)
    image = torch.randint(shape.batch, (shape.regions, 1), **on).float()
    values = {
        "input": torch.randn(count["input"], **on),
        "offset": torch.randn(count["offset"], **on) * setting.offset_std,
        "grad": torch.randn(count["grad"], **on),
    }
    values = {name: value.to(through).to(setting.dtype) for name, value in values.items()}
    for name in ("input", "grad"):
        values[name] = values[name].contiguous(memory_format=LAYOUTS[layout])
    return {**values, "rois": torch.cat([image, corner.clamp(min=0), corner.clamp(min=0) + size], 1)}


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    """The calls of a contestant. torchvision's operators work in float32; the reference does a few of the regions."""
    dtype = setting.dtype if name in (OURS, "plain") else torch.float32
    t = problem(shape, setting._replace(dtype=dtype), layout, setting.dtype)
    input, offset, rois = t["input"].requires_grad_(), t["offset"].requires_grad_(), t["rois"]
    how = dict(output_size=BINS, spatial_scale=SCALE)
    if name == "torchvision" and shape.position_sensitive:
        how |= dict(sampling_ratio=shape.samples)
        return differentiated(lambda: torchvision.ops.ps_roi_align(input, rois, **how), [input], t["grad"])
    if name == "torchvision":
        how |= dict(sampling_ratio=shape.samples, aligned=True)
        return differentiated(lambda: torchvision.ops.roi_align(input, rois, **how), [input], t["grad"])
    operator = getattr(ops if name != "reference" else reference, OPERATORS[shape.position_sensitive])
    if shape.position_sensitive:
        how |= dict(output_dim=shape.channels, group_size=BINS, samples_per_part=shape.samples)
    else:
        how |= dict(sampling_ratio=shape.samples)
    if name == "plain":
        return differentiated(lambda: operator(input, rois, **how), [input], t["grad"])
    if name == "reference":
        rois, offset = rois[:CHECKED], offset[:CHECKED]
    return differentiated(lambda: operator(input, rois, offset, **how), [input, offset], t["grad"])


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    limit = 1e-5 if exact(setting) else 3e-2
    if not shape.position_sensitive:  # torchvision's position-sensitive operator puts its samples elsewhere
        require_agreement(shape, made, ("plain",), TORCHVISION, limit)
    few = make(shape, setting, "reference", "NCHW")["forward"]()
    for layout in LAYOUTS:
        out = made[OURS, layout]["forward"]()[0]
        require_equal(f"{shape}: {layout}, the first regions, reference", [out[:CHECKED]], few, limit)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {
        "memory": peaks(
            __name__, shape._replace(channels=8, regions=8), shape, setting, ((OURS, layout), TORCHVISION), task
        )
    }


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours, plain = row[OURS][row["layout"]], row["plain"][row["layout"]]
    return {
        "ms": f"{ours['ms']:.2f}",
        "plain ms": f"{plain['ms']:.2f}",
        "torchvision /": times_ours(row, "torchvision"),
        "torchvision / plain": f"{best(row, 'torchvision')['ms'] / plain['ms']:.1f}x",
        "spread": f"{ours['spread']:.0%}",
        "MiB": mib(row, OURS),
        "torchvision MiB": mib(row, "torchvision"),
    }
