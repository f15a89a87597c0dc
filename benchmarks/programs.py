"""Blocks of programs that call torchvision's operators, as they are, before and after `accelerate()`.

Written here after what published models do: parallel deformable convolutions of several sizes (BiRefNet's ASPP),
alignment of two earlier frames along optical flow (BasicVSR++), up-sampling with modulated convolutions (CenterNet's
ResNet), and the pooling of a detector's regions from two maps (torchvision's MultiScaleRoIAlign).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from harness import OURS, Call, Contestant, Setting, exact, require_agreement, times_ours
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, MultiScaleRoIAlign, deform_conv2d

from dcn_plugin.integrations.torchvision import accelerate

NAME = "programs"
COLUMNS = {
    "cpu": """`before ms` is the program as it is,
`ms` the same program in `accelerate()`, switched on and off within the time; `before / after` is their ratio. A
training step is forward, backward and SGD."""
}
TORCHVISION: Contestant = ("torchvision", "NCHW")
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(OURS, "NCHW"), TORCHVISION]}


class Deformable(nn.Module):
    """Offsets and masks from the input, each by a convolution of the kernel's size, then torchvision's function."""

    def __init__(self, channels: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.offset = nn.Conv2d(channels, 2 * kernel**2, kernel, padding=self.padding)
        self.mask = nn.Conv2d(channels, kernel**2, kernel, padding=self.padding)
        self.weight = nn.Conv2d(channels, outputs, kernel, padding=self.padding, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        mask = 2 * self.mask(x).sigmoid()
        return deform_conv2d(x, self.offset(x), self.weight, padding=(self.padding, self.padding), mask=mask)


def normed(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


class Pyramid(nn.Module):
    """BiRefNet-like: deformable convolutions of 1, 3 and 7 pixels and the map's average beside each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parallel = nn.ModuleList(normed(Deformable(channels, channels, k), channels) for k in (1, 1, 3, 7))
        self.average = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.ReLU())
        self.fuse = normed(nn.Conv2d(5 * channels, channels, 1, bias=False), channels)

    def forward(self, x: Tensor) -> Tensor:
        found = [branch(x) for branch in self.parallel]
        return self.fuse(torch.cat([*found, self.average(x).expand_as(x)], 1))


class Alignment(nn.Module):
    """BasicVSR++-like: features of the two frames before are sampled along flow, refined, 16 offset groups."""

    def __init__(self, channels: int, groups: int = 16, reach: float = 10.0) -> None:
        super().__init__()
        self.groups, self.reach = groups, reach
        self.predict = nn.Sequential(
            nn.Conv2d(3 * channels + 4, channels, 3, padding=1), nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.1),
            nn.Conv2d(channels, 27 * groups, 3, padding=1),
        )  # fmt: skip
        self.align = DeformConv2d(2 * channels, channels, 3, padding=1)
        self.flow = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), nn.LeakyReLU(0.1))

    def forward(self, frames: Tensor) -> Tensor:
        first, second = frames.new_zeros(frames[:, 0].shape), frames.new_zeros(frames[:, 0].shape)
        for now in frames.unbind(1):
            flows = [self.flow(torch.cat([now, then], 1)) for then in (first, second)]
            offset, mask = self.predict(torch.cat([now, first, second, *flows], 1)).split(
                (18 * self.groups, 9 * self.groups), 1
            )
            offset = self.reach * offset.tanh()
            along = [flow.flip(1).repeat(1, 9 * self.groups // 2, 1, 1) for flow in flows]
            offset = offset + torch.cat(along, 1)
            aligned = self.align(torch.cat([first, second], 1), offset, mask.sigmoid())
            first, second = self.body(torch.cat([now, aligned], 1)), first
        return first


class Upsampling(nn.Module):
    """CenterNet-like: modulated convolutions and transposed ones in turn, from a small map to a large one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for outputs in (channels // 2, channels // 4, channels // 4):
            steps.append(normed(Deformable(channels, outputs, 3), outputs))
            steps.append(normed(nn.ConvTranspose2d(outputs, outputs, 4, 2, 1, bias=False), outputs))
            channels = outputs
        self.steps = nn.Sequential(*steps, nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(channels, 84, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x))


class Pooling(nn.Module):
    """As in torchvision's detectors: regions are pooled from the map of their size, then go through a linear layer."""

    def __init__(self, channels: int, count: int = 128, stride: int = 8) -> None:
        super().__init__()
        self.count, self.stride = count, stride
        self.smaller = nn.Conv2d(channels, channels, 3, 2, 1)
        self.pool = MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2)
        self.head = nn.Linear(49 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        sides = [self.stride * side for side in x.shape[2:]]
        spread = torch.linspace(0, 1, self.count)
        corner = torch.stack([spread, spread.flip(0)], 1) * 0.5 * min(sides)
        boxes = torch.cat([corner, corner + 20 + 0.4 * min(sides) * spread[:, None]], 1)
        maps = {"0": x, "1": self.smaller(x)}
        return self.head(self.pool(maps, [boxes] * len(x), [(sides[0], sides[1])] * len(x)).flatten(1))


class Shape(NamedTuple):
    name: str
    program: Callable[[int], nn.Module]
    channels: int
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}, {'x'.join(map(str, self.size))}"


SHAPES = {
    "cpu": [
        Shape("BiRefNet-like", Pyramid, 64, (2, 64, 24, 24)),
        Shape("BasicVSR++-like", Alignment, 64, (1, 4, 64, 32, 32)),
        Shape("CenterNet-like", Upsampling, 256, (2, 256, 12, 12)),
        Shape("pooling of a detector", Pooling, 64, (2, 64, 64, 64)),
    ]
}
QUICK = {
    "cpu": [
        Shape("BiRefNet-like", Pyramid, 16, (2, 16, 12, 12)),
        Shape("CenterNet-like", Upsampling, 32, (1, 32, 4, 4)),
    ]
}


def about(setting: Setting) -> str:
    return "torchvision's operators, random weights, offsets as they predict them"


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    torch.manual_seed(0)
    program, x = shape.program(shape.channels), torch.randn(shape.size)
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-6)  # so small that every round has the same offsets

    def switch():
        return accelerate() if name == OURS else nullcontext()

    @torch.no_grad()
    def infer() -> list[Tensor]:
        program.eval()
        with switch():
            return [program(x)]

    def train() -> list[Tensor]:
        program.train()
        optimizer.zero_grad()
        with switch():
            out = program(x)
            out.square().mean().backward()
        optimizer.step()
        return [out, *(p.grad for p in program.parameters() if p.dim() == 4)]

    train()  # running statistics
    return {"inference": infer, "training step": train}


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    require_agreement(shape, made, (OURS,), TORCHVISION, 1e-3 if exact(setting) else 5e-2)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours, before = row[OURS][row["layout"]], row["torchvision"][row["layout"]]
    return {
        "before ms": f"{before['ms']:.1f}",
        "ms": f"{ours['ms']:.1f}",
        "before / after": times_ours(row, "torchvision"),
        "spread": f"{ours['spread']:.0%}",
    }
