"""RoI pooling against torchvision's roi_align and ps_roi_align, which pool without deformation."""

from typing import NamedTuple

import torch
import torchvision
from harness import Contestants, require_equal, tasks

from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_pool

NAME = "roi_pool"
ABOUT = "7x7 bins, stride 16, regions of 20 to 320 pixels, offsets N(0, 1)."
COLUMNS = """`ms` is ours with offsets, `plain ms` without;
`torchvision /` is the time of torchvision's operator without deformation (float32, NCHW; `roi_align`, for PS
`ps_roi_align`) over ours with offsets, and over ours without."""


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


SHAPES = [
    Shape(2, 256, 50, 68, 512),
    Shape(2, 256, 50, 68, 1000),
    Shape(2, 256, 50, 68, 512, samples=0),
    Shape(8, 64, 32, 32, 512),
    Shape(1, 21, 38, 50, 300, samples=4, position_sensitive=True),
]
QUICK = [Shape(2, 64, 32, 32, 128), Shape(1, 8, 38, 50, 100, samples=4, position_sensitive=True)]
SCALE, BINS = 1 / 16, 7


def problem(shape: Shape, device: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    channels = shape.channels * (BINS**2 if shape.position_sensitive else 1)
    corner = torch.rand(shape.regions, 2) * torch.tensor([shape.width / SCALE - 320, shape.height / SCALE - 320])
    size = 20 + 300 * torch.rand(shape.regions, 2)
    image = torch.randint(shape.batch, (shape.regions, 1)).float()
    values = {
        "input": torch.randn(shape.batch, channels, shape.height, shape.width).contiguous(memory_format=layout),
        "offset": torch.randn(shape.regions, 2, BINS, BINS),
    }
    on = {k: v.to(device, dtype).requires_grad_() for k, v in values.items()}
    return {**on, "rois": torch.cat([image, corner.clamp(min=0), corner.clamp(min=0) + size], 1).to(device)}


def contestants(shape: Shape, t: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> Contestants:
    if shape.position_sensitive:
        how = dict(output_dim=shape.channels, group_size=BINS, output_size=BINS, spatial_scale=SCALE)
        return {
            "dcn_plugin": lambda: deform_ps_roi_pool(
                t["input"], t["rois"], t["offset"], samples_per_part=shape.samples, **how
            ),
            "plain": lambda: deform_ps_roi_pool(t["input"], t["rois"], samples_per_part=shape.samples, **how),
            "torchvision": lambda: torchvision.ops.ps_roi_align(
                peer["input"], peer["rois"], BINS, SCALE, shape.samples
            ),
        }
    how = dict(output_size=BINS, spatial_scale=SCALE, sampling_ratio=shape.samples)
    return {
        "dcn_plugin": lambda: deform_roi_pool(t["input"], t["rois"], t["offset"], **how),
        "plain": lambda: deform_roi_pool(t["input"], t["rois"], **how),
        "torchvision": lambda: torchvision.ops.roi_align(
            peer["input"], peer["rois"], BINS, SCALE, shape.samples, aligned=True
        ),
    }


def rows_for(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    rows = []
    for layout_name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        t = problem(shape, device, dtype, layout)
        peer = problem(shape, device, torch.float32, torch.contiguous_format)
        forward = contestants(shape, t, peer)
        if not shape.position_sensitive:  # torchvision's position-sensitive operator puts its samples elsewhere
            require_equal(str(shape), forward["plain"](), forward["torchvision"]())  # type: ignore[arg-type]
        tensors = {"dcn_plugin": [t["input"], t["offset"]], "plain": [t["input"]], "torchvision": [peer["input"]]}
        rows += [{"shape": str(shape), "layout": layout_name, **row} for row in tasks(forward, tensors, device, rounds)]
    return rows


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours, plain, peer = row["dcn_plugin"], row["plain"], row["torchvision"]
    return {
        "ms": f"{ours['ms']:.2f}",
        "plain ms": f"{plain['ms']:.2f}",
        "torchvision /": f"{1 / peer['ratio']:.1f}x",
        "torchvision / plain": f"{peer['ms'] / plain['ms']:.1f}x",
        "spread": f"{ours['spread']:.0%}",
    }
