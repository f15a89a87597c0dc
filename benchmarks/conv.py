"""deform_conv2d against the plain convolution, torchvision's operator and onnxruntime's."""

import math
from typing import NamedTuple

import onnx_peer
import torch
import torch.nn.functional as F
import torchvision
from gpu import FUSED, PORTABLE, Work
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

from dcn_plugin import DeformConv2d, prepare_for_inference
from dcn_plugin.ops import deform_conv2d

NAME = "deform_conv2d"
OPERATORS = (NAME,)
_CONV2D = """`/ conv2d` is our time over that of the plain convolution
with the same weights in"""
_MEMORY = "`MiB` is the peak memory of a call above its arguments and"
COLUMNS = {
    "cpu": f"""{_CONV2D} the faster of the two layouts, `/ same layout` over that in our layout; `torchvision /` and
`onnxruntime /` are their times (float32, NCHW) over ours. `/ prepared` is our time over our own after
`prepare_for_inference`, `onnxruntime / prepared` onnxruntime's over that. {_MEMORY}
results.""",
    "cuda": f"""{_CONV2D} channels_last (cuDNN's choice of several algorithms); `torchvision /`
and `torchvision float16 /` are its times (NCHW; float32, and float16 whose positions are rounded to half) over ours,
`portable /` that of our portable kernels. {_MEMORY} results.""",
}
PREPARED = "prepared"
TORCHVISION: Contestant = ("torchvision", "NCHW")
# What does not follow the type of the run: onnxruntime and torchvision have no bfloat16.
TYPES = {"torchvision": torch.float32, "onnxruntime": torch.float32, "torchvision float16": torch.float16}
KERNELS = {OURS: FUSED, "portable": PORTABLE}
COPIES = 4
CONTESTANTS: dict[str, list[Contestant]] = {
    "cpu": [
        *((name, layout) for name in (OURS, PREPARED, "conv2d") for layout in LAYOUTS),
        TORCHVISION,
        ("onnxruntime", "NCHW"),
    ],
    "cuda": [
        *((name, layout) for name in (OURS, "portable") for layout in LAYOUTS),
        ("conv2d", "channels_last"),
        TORCHVISION,
        ("torchvision float16", "NCHW"),
    ],
}


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


_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
SHAPES = {
    "cpu": [
        *(Shape(n, c, s, s) for c, s in _STAGES for n in (1, 2, 8)),
        Shape(2, 128, 56, 56, stride=2),
        Shape(2, 512, 14, 14, stride=2),
        Shape(1, 256, 100, 152),
        *(Shape(2, c, s, s, offset_groups=4) for c, s in _STAGES[:3]),
        *(Shape(2, c, s, s, groups=c // 16, offset_groups=c // 16) for c, s in _STAGES[:2]),
        # As in ResNeXt.
        *(Shape(2, 2 * c, s, s, groups=32) for c, s in _STAGES[:3]),
        # As in DCNv3: a weight for each channel, offsets for each 16 of them.
        *(Shape(2, c, s, s, groups=c, offset_groups=c // 16) for c, s in _STAGES[:3]),
        Shape(2, 128, 28, 28, groups=128),
        Shape(2, 64, 28, 28, kernel=7),
        Shape(2, 3, 56, 56, outputs=64),
        Shape(2, 20, 56, 56),
    ],
    # What matters most comes first: a run may be stopped.
    "cuda": [
        *(Shape(64, c, s, s) for c, s in _STAGES),
        Shape(16, 256, 100, 152),
        *(Shape(32, c, s, s, offset_groups=4) for c, s in _STAGES[1:3]),
        Shape(32, 128, 28, 28, groups=128, offset_groups=8),
        *(Shape(32, c, s, s) for c, s in _STAGES),
        *(Shape(1, c, s, s) for c, s in _STAGES[::2]),
        Shape(1, 256, 100, 152),
        Shape(32, 128, 56, 56, stride=2),
        Shape(32, 64, 56, 56, groups=64, offset_groups=4),
        Shape(256, 256, 14, 14),
    ],
}
QUICK = {"cpu": [Shape(2, 64, 56, 56), Shape(2, 256, 14, 14)], "cuda": SHAPES["cuda"][:4:2]}


def about(setting: Setting) -> str:
    return f"modulated, 3x3 where not said otherwise, offsets N(0, {setting.offset_std:g}^2)"


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of the arguments, and of a gradient of the result."""
    taps, outputs = shape.kernel**2, shape.outputs or shape.channels
    out = ((shape.height - 1) // shape.stride + 1, (shape.width - 1) // shape.stride + 1)
    return {
        "input": (shape.batch, shape.channels, shape.height, shape.width),
        "offset": (shape.batch, 2 * taps * shape.offset_groups, *out),
        "weight": (outputs, shape.channels // shape.groups, shape.kernel, shape.kernel),
        "mask": (shape.batch, taps * shape.offset_groups, *out),
        "grad": (shape.batch, outputs, *out),
    }


def work(shape: Shape, task: str, itemsize: int) -> Work:
    """Two operations for each weight and output pixel; the backward makes two such products."""
    size = sizes(shape)
    numbers = {name: math.prod(of) for name, of in size.items()}
    result = numbers.pop("grad")
    arguments = sum(numbers.values())
    forward = Work(NAME, 2 * result * math.prod(size["weight"][1:]), itemsize * (arguments + result))
    return forward if task == "forward" else forward.with_backward(itemsize * arguments)


def problem(shape: Shape, setting: Setting, layout: str, through: torch.dtype) -> dict[str, Tensor]:
    """Arguments, and a gradient of the result, of the same values for all types that hold those of `through`."""
    torch.manual_seed(0)
    size, on = sizes(shape), dict(device=setting.device)
    values = {
        "input": torch.randn(size["input"], **on),
        "offset": torch.randn(size["offset"], **on) * setting.offset_std,
        "weight": torch.randn(size["weight"], **on) / math.prod(size["weight"][1:]) ** 0.5,
        "mask": torch.rand(size["mask"], **on),
        "grad": torch.randn(size["grad"], **on),
    }
    # Half types hold many whole offsets. There the derivative is one-sided, and at -1 torchvision takes another side.
    rounded = values["offset"].to(through)
    values["offset"] = rounded + 0.25 * (rounded == rounded.round())
    values = {name: value.to(through).to(setting.dtype) for name, value in values.items()}
    for name in ("input", "weight", "grad"):
        values[name] = values[name].contiguous(memory_format=LAYOUTS[layout])
    return values


def make(shape: Shape, setting: Setting, name: str, layout: str, through: torch.dtype | None = None) -> dict[str, Call]:
    """The calls of a contestant; none where it is not installed."""
    t = problem(shape, setting._replace(dtype=TYPES.get(name, setting.dtype)), layout, through or setting.dtype)
    how = dict(stride=shape.stride, padding=shape.kernel // 2)
    if name == "onnxruntime":
        call = onnx_peer.deform_conv(t, **how) if setting.device == "cpu" else None
        return {"forward": lambda: [call()]} if call else {}
    if name == PREPARED:
        layer = DeformConv2d(t["input"].shape[1], len(t["weight"]), shape.kernel, groups=shape.groups)
        layer.weight = torch.nn.Parameter(t["weight"])
        # Depthwise weights have nothing to prepare.
        weight = prepare_for_inference(layer).weight if layer.weight.shape[1] > 1 else layer.weight
        call = torch.no_grad()(lambda: [deform_conv2d(t["input"], t["offset"], weight, mask=t["mask"], **how)])
        return {"forward": call}
    operator = torchvision.ops.deform_conv2d if name.startswith("torchvision") else deform_conv2d
    arguments = [t[of].requires_grad_() for of in ("input", "weight", "offset", "mask")]
    input, weight, offset, mask = arguments
    if name == "conv2d":
        return differentiated(lambda: F.conv2d(input, weight, groups=shape.groups, **how), [input, weight], t["grad"])
    return differentiated(lambda: operator(input, offset, weight, mask=mask, **how), arguments, t["grad"])


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    # Not torchvision's float16: it rounds the positions themselves to half, and so takes other pixels.
    require_agreement(
        shape, made, (OURS, PREPARED, "portable", "onnxruntime"), TORCHVISION, 1e-5 if exact(setting) else 3e-2
    )


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {"memory": peaks(__name__, Shape(1, 32, 16, 16), shape, setting, ((OURS, layout), TORCHVISION), task)}


def prepared(row: dict) -> dict[str, str]:
    """What a row shows of prepared weights; its times are of the same layout."""
    found = dict.fromkeys(("/ prepared", "onnxruntime / prepared"), "-")
    if PREPARED in row:
        its = row[PREPARED][row["layout"]]
        found["/ prepared"] = f"{its['ratio']:.2f}"
        if "onnxruntime" in row:
            found["onnxruntime / prepared"] = f"{best(row, 'onnxruntime')['ms'] / its['ms']:.2f}"
    return found


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = row[OURS][row["layout"]]
    peers = ("torchvision", "torchvision float16", "portable") if "gpu" in row else ("torchvision", "onnxruntime")
    same = {} if "gpu" in row else {"/ same layout": f"{row['conv2d'][row['layout']]['ratio']:.2f}"}
    return {
        "ms": f"{here['ms']:.2f}",
        "/ conv2d": f"{best(row, 'conv2d')['ratio']:.2f}",
        **same,
        **{f"{name} /": times_ours(row, name) for name in peers},
        **({} if "gpu" in row else prepared(row)),
        "spread": f"{here['spread']:.0%}",
        "MiB": mib(row, OURS),
        "torchvision MiB": mib(row, "torchvision"),
    }
