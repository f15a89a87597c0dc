"""deform_aggregate2d against a depthwise convolution, against our deform_conv2d and against a plain fallback."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu import FUSED, Work
from harness import (
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
    times_ours,
)
from torch import Tensor

from dcn_plugin.ops import deform_aggregate2d, deform_conv2d

NAME = "deform_aggregate2d"
OPERATORS = (NAME,)
LAYOUT = "NHWC"
TAPS, GROUP = 9, 16
CONV, THROUGH, FALLBACK = "conv2d", "deform_conv2d", "grid_sample"
PACKED, SOFTMAX, HALF = "packed", "softmax", "bfloat16"
_COLUMNS = f"""`/ {CONV}` is our time over that of a depthwise convolution of the same shape, in the faster of two
layouts, and `/ {CONV} NCHW` in torch's own. `{THROUGH} /` is the time of our convolution with depthwise ones, offsets
permuted for it, over ours, `{FALLBACK} /` that of a fallback of the official kind on torch's sampler. `{PACKED} /` is
our time from one packed tensor over that from two, `{SOFTMAX} /` that with the softmax of the weights inside over that
without"""
COLUMNS = {
    "cpu": f"""{_COLUMNS}, `{HALF} /` that with values in bfloat16 and the rest in float32 over
that of float32. `MiB` is the peak memory of a call above its arguments and results.""",
    "cuda": f"""{_COLUMNS}. `MiB` is the
peak memory of a call above its arguments and results.""",
}
KERNELS = {OURS: FUSED, PACKED: FUSED, THROUGH: FUSED}
COPIES = 4
_ALL: list[Contestant] = [
    (OURS, LAYOUT), (PACKED, LAYOUT), (SOFTMAX, LAYOUT), (CONV, "NCHW"), (CONV, "channels_last"), (THROUGH, LAYOUT),
    (FALLBACK, LAYOUT),
]  # fmt: skip
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [*_ALL, (HALF, LAYOUT)], "cuda": _ALL}


class Shape(NamedTuple):
    """A layer of InternImage: 3 x 3 taps, groups of 16 channels."""

    batch: int
    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.side}x{self.side}x{self.channels}, {self.groups} groups"

    @property
    def groups(self) -> int:
        return self.channels // GROUP

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Of the operator's arguments, and of a gradient of the result."""
        pixels = (self.batch, self.side, self.side)
        return {
            "value": (*pixels, self.channels), "offset": (*pixels, self.groups, TAPS, 2),
            "weight": (*pixels, self.groups, TAPS), "grad": (*pixels, self.channels),
        }  # fmt: skip


_STAGES = ((64, 56), (128, 28), (256, 14))
SHAPES = {
    "cpu": [Shape(n, *stage) for n in (1, 8) for stage in _STAGES],
    "cuda": [Shape(64, *stage) for stage in _STAGES],
}
QUICK = {"cpu": [SHAPES["cpu"][0], SHAPES["cpu"][2]], "cuda": SHAPES["cuda"][:2]}


def about(setting: Setting) -> str:
    return f"3x3, groups of {GROUP} channels, offsets N(0, {setting.offset_std:g}^2), weights after their softmax"


def work(shape: Shape, task: str, itemsize: int) -> Work:
    """No product is counted; offsets and weights are float32."""
    bytes_of = {"offset": torch.float32.itemsize, "weight": torch.float32.itemsize}
    numbers = {name: bytes_of.get(name, itemsize) * math.prod(size) for name, size in shape.sizes().items()}
    result = numbers.pop("grad")
    forward = Work(NAME, traffic=sum(numbers.values()) + result)
    return forward if task == "forward" else forward.with_backward(sum(numbers.values()))


def problem(shape: Shape, setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments, and a gradient of the result; values go through bfloat16, which all types of the run hold."""
    torch.manual_seed(0)
    drawn = {name: torch.randn(size) for name, size in shape.sizes().items()}
    offset = drawn["offset"] * setting.offset_std
    # Not at whole pixels, where the derivative is one-sided and rounding, which differs, chooses the side.
    drawn["offset"] = offset.floor() + 0.05 + 0.9 * (offset - offset.floor())
    drawn["weight"] = drawn["weight"].softmax(-1)
    halves = {name: drawn[name].bfloat16().to(dtype) for name in ("value", "grad")}
    return {name: t.to(setting.device) for name, t in (drawn | halves).items()}


def through_convolution(value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The same by `deform_conv2d`, whose offsets and masks are planes."""
    n, height, width, channels = value.shape
    planes = offset.permute(0, 3, 4, 5, 1, 2).reshape(n, -1, height, width)
    mask = weight.permute(0, 3, 4, 1, 2).reshape(n, -1, height, width)
    out = deform_conv2d(value.permute(0, 3, 1, 2), planes, value.new_ones(channels, 1, 3, 3), padding=1, mask=mask)
    return out.permute(0, 2, 3, 1)


def fallback(value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Plain PyTorch, as where nothing is compiled."""
    taps = torch.arange(3, device=value.device, dtype=torch.float32) - 1
    return sampled_sum(value, offset[..., 0] + taps.repeat_interleave(3), offset[..., 1] + taps.repeat(3), weight)


def sampled_sum(value: Tensor, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """All samples at once by torch's sampler, (y, x) from their pixel, then a weighted sum; [N, H, W, G, K] each."""
    n, height, width, channels = value.shape
    groups, taps = y.shape[3:]
    rows, columns = (torch.arange(size, device=value.device, dtype=torch.float32) for size in (height, width))
    y, x = y + rows[:, None, None, None], x + columns[:, None, None]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * groups, height * width, taps, 2)
    maps = value.permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height, width)
    sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
    each = weight.permute(0, 3, 1, 2, 4).reshape(n * groups, 1, height * width, taps)
    return (sampled * each).sum(-1).view(n, channels, height, width).permute(0, 2, 3, 1).contiguous()


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    if name == HALF and setting.dtype == torch.bfloat16:
        return {}
    # Positions are float32 whatever the type of the run; torch's sampler computes them in the type of its values.
    dtype = {HALF: torch.bfloat16, FALLBACK: torch.float32}.get(name, setting.dtype)
    t = problem(shape, setting, dtype)
    value, offset, weight = (t[of].requires_grad_() for of in ("value", "offset", "weight"))
    if name == CONV:
        formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
        image, grad = (
            t[of].detach().permute(0, 3, 1, 2).contiguous(memory_format=formats[layout]) for of in ("value", "grad")
        )
        kernel = torch.randn(shape.channels, 1, 3, 3).to(image).requires_grad_()
        image.requires_grad_()
        return differentiated(lambda: F.conv2d(image, kernel, padding=1, groups=shape.channels), [image, kernel], grad)
    if name == PACKED:
        packed = torch.cat([t["offset"].flatten(4), t["weight"]], -1).detach().requires_grad_()
        return differentiated(lambda: deform_aggregate2d(value, packed), [value, packed], t["grad"])
    if name == SOFTMAX:
        logits = t["weight"].detach().log().requires_grad_()
        arguments = [value, offset, logits]
        return differentiated(lambda: deform_aggregate2d(*arguments, softmax=True), arguments, t["grad"])
    operator = {THROUGH: through_convolution, FALLBACK: fallback}.get(name, deform_aggregate2d)
    return differentiated(lambda: operator(value, offset, weight), [value, offset, weight], t["grad"])


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    ours, limit = (OURS, LAYOUT), 2e-5 if exact(setting) else 3e-2
    require_agreement(shape, made, (THROUGH, FALLBACK), ours, limit)
    require_agreement(shape, made, (HALF,), ours, 3e-2)
    alone = {key: {"forward": calls["forward"]} for key, calls in made.items()}
    require_agreement(shape, alone, (PACKED, SOFTMAX), ours, limit)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    small = Shape(1, 32, 8)
    return {"memory": peaks(__name__, small, shape, setting, ((OURS, LAYOUT), (FALLBACK, LAYOUT)), task)}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours = row[OURS][LAYOUT]
    half = {} if "gpu" in row else {f"{HALF} /": f"{1 / best(row, HALF)['ratio']:.2f}" if HALF in row else "-"}
    return {
        "ms": f"{ours['ms']:.2f}",
        f"/ {CONV}": f"{best(row, CONV)['ratio']:.2f}",
        f"/ {CONV} NCHW": f"{row[CONV]['NCHW']['ratio']:.2f}",
        f"{THROUGH} /": times_ours(row, THROUGH),
        f"{FALLBACK} /": times_ours(row, FALLBACK),
        f"{PACKED} /": f"{1 / best(row, PACKED)['ratio']:.2f}",
        f"{SOFTMAX} /": f"{1 / best(row, SOFTMAX)['ratio']:.2f}",
        **half,
        "spread": f"{ours['spread']:.0%}",
        "MiB": mib(row, OURS),
        f"{FALLBACK} MiB": mib(row, FALLBACK),
    }
