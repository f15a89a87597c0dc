"""deform_conv2d against the plain convolution, torchvision's operator and onnxruntime's."""

from typing import NamedTuple

import onnx_peer
import torch
import torch.nn.functional as F
import torchvision
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
    times_ours,
)
from torch import Tensor

from dcn_plugin.ops import deform_conv2d

NAME = "deform_conv2d"
COLUMNS = """`/ conv2d` is our time over that of the plain convolution
with the same weights in the faster of the two layouts, `/ same layout` over that in our layout; `torchvision /` and
`onnxruntime /` are their times (float32, NCHW) over ours. `MiB` is the peak memory of a call above its arguments and
results."""
TORCHVISION: Contestant = ("torchvision", "NCHW")
CONTESTANTS: list[Contestant] = [
    *((name, layout) for name in (OURS, "conv2d") for layout in LAYOUTS),
    TORCHVISION,
    ("onnxruntime", "NCHW"),
]


class Shape(NamedTuple):
    """A layer: batch, channels, height, width, outputs (0: as many as channels), kernel, stride, groups, ..."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int = 0
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        text += f" -> {self.outputs}" if self.outputs else ""
        text += f", {self.kernel}x{self.kernel}" if self.kernel != 3 else ""
        for name, value in (("stride", self.stride), ("groups", self.groups), ("offset groups", self.offset_groups)):
            text += f", {name} {value}" if value != 1 else ""
        return text


SHAPES = [
    *(Shape(n, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for n in (1, 2, 8)),
    Shape(2, 128, 56, 56, stride=2),
    Shape(2, 512, 14, 14, stride=2),
    Shape(1, 256, 100, 152),
    *(Shape(2, c, s, s, offset_groups=4) for c, s in ((64, 56), (128, 28), (256, 14))),
    *(Shape(2, c, s, s, groups=c // 16, offset_groups=c // 16) for c, s in ((64, 56), (128, 28))),
    # As in DCNv3: a weight for each channel, offsets for each 16 of them.
    *(Shape(2, c, s, s, groups=c, offset_groups=c // 16) for c, s in ((64, 56), (128, 28), (256, 14))),
    Shape(2, 128, 28, 28, groups=128),
    Shape(2, 64, 28, 28, kernel=7),
    Shape(2, 3, 56, 56, outputs=64),
    Shape(2, 20, 56, 56),
]
QUICK = [Shape(2, 64, 56, 56), Shape(2, 256, 14, 14)]


def about(setting: Setting) -> str:
    return f"modulated, 3x3 where not said otherwise, offsets N(0, {setting.offset_std:g}^2)"


def problem(shape: Shape, setting: Setting, layout: str, through: torch.dtype) -> dict[str, Tensor]:
    """Arguments, and a gradient of the result, of the same values for all types that hold those of ``through``."""
    torch.manual_seed(0)
    taps, outputs = shape.kernel**2, shape.outputs or shape.channels
    out = ((shape.height - 1) // shape.stride + 1, (shape.width - 1) // shape.stride + 1)
    inputs = shape.channels // shape.groups
    values = {
        "input": torch.randn(shape.batch, shape.channels, shape.height, shape.width),
        "offset": torch.randn(shape.batch, 2 * taps * shape.offset_groups, *out) * setting.offset_std,
        "weight": torch.randn(outputs, inputs, shape.kernel, shape.kernel) / (taps * inputs) ** 0.5,
        "mask": torch.rand(shape.batch, taps * shape.offset_groups, *out),
        "grad": torch.randn(shape.batch, outputs, *out),
    }
    # Half types hold many whole offsets. There the derivative is one-sided, and at -1 torchvision takes another side.
    rounded = values["offset"].to(through)
    values["offset"] = rounded + 0.25 * (rounded == rounded.round())
    on = {name: value.to(through).to(setting.device, setting.dtype) for name, value in values.items()}
    for name in ("input", "weight", "grad"):
        on[name] = on[name].contiguous(memory_format=LAYOUTS[layout])
    return on


def make(shape: Shape, setting: Setting, name: str, layout: str, through: torch.dtype | None = None) -> dict[str, Call]:
    """The calls of a contestant; none where it is not installed. The peers' operators have float32."""
    dtype = setting.dtype if name in (OURS, "conv2d") else torch.float32
    t = problem(shape, setting._replace(dtype=dtype), layout, through or setting.dtype)
    how = dict(stride=shape.stride, padding=shape.kernel // 2)
    if name == "onnxruntime":
        call = onnx_peer.deform_conv(t, **how) if setting.device == "cpu" else None
        return {"forward": lambda: [call()]} if call else {}
    operator = deform_conv2d if name == OURS else torchvision.ops.deform_conv2d
    arguments = [t[of].requires_grad_() for of in ("input", "weight", "offset", "mask")]
    input, weight, offset, mask = arguments
    if name == "conv2d":
        return differentiated(lambda: F.conv2d(input, weight, groups=shape.groups, **how), [input, weight], t["grad"])
    return differentiated(lambda: operator(input, offset, weight, mask=mask, **how), arguments, t["grad"])


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    require_agreement(shape, made, (OURS, "onnxruntime"), TORCHVISION, 1e-5 if exact(setting) else 3e-2)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {"memory": peaks(__name__, Shape(1, 32, 16, 16), shape, setting, layout, task)}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = row[OURS][row["layout"]]
    return {
        "ms": f"{here['ms']:.2f}",
        "/ conv2d": f"{best(row, 'conv2d')['ratio']:.2f}",
        "/ same layout": f"{row['conv2d'][row['layout']]['ratio']:.2f}",
        "torchvision /": times_ours(row, "torchvision"),
        "onnxruntime /": times_ours(row, "onnxruntime"),
        "spread": f"{here['spread']:.0%}",
        "MiB": mib(row, OURS),
        "torchvision MiB": mib(row, "torchvision"),
    }
