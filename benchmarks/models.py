"""Whole models: timm's resnet50, resnet50_dcn, and resnet50_dcn on torchvision's operator."""

import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import timm
import torch
import torchvision
from gpu import FUSED, PORTABLE, Work
from harness import FEWEST, LAYOUTS, OURS, Call, Contestant, Setting, best, exact, require_agreement, times_ours
from torch import Tensor, nn
from torch.autograd import DeviceType

import dcn_plugin.layers.conv
from dcn_plugin.layers import OffsetPredictor, offset_parameters

# The profiler's library else reports each of its starts on the standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

NAME = "models"
_SHARE = """`operators` is the share of our operators and their backward
in the profiler's time, `offset` the mean absolute offset in pixels. A training step is forward, backward and SGD with
momentum."""
COLUMNS = {
    "cpu": f"""`/ resnet50` is the time of resnet50_dcn over that
of resnet50 in the faster of the two layouts, `/ same layout` over that in our layout; `torchvision /` is the time of
resnet50_dcn with torchvision's operator (NCHW) over ours. {_SHARE}""",
    "cuda": f"""half types by autocast; `/ resnet50` is the time of
resnet50_dcn over that of resnet50, `resnet50 images/s` what that does; `torchvision /` is the time of resnet50_dcn with
torchvision's operator (in float32) over ours, `portable /` that with our portable kernels. {_SHARE}""",
}
BASE = "resnet50"
KERNELS = {OURS: FUSED, "portable": PORTABLE}
# A model reads more than a cache holds by itself.
COPIES = 1
CONTESTANTS: dict[str, list[Contestant]] = {
    "cpu": [*((name, layout) for name in (OURS, BASE) for layout in LAYOUTS), ("torchvision", "NCHW")],
    "cuda": [(name, "channels_last") for name in (OURS, "portable", BASE, "torchvision")],
}
OFFSET_WEIGHT_STD = 0.01


class Shape(NamedTuple):
    batch: int
    size: int

    def __str__(self) -> str:
        return f"batch {self.batch} at {self.size}x{self.size}"


SHAPES = {"cpu": [Shape(4, 224)], "cuda": [Shape(64, 224)]}
QUICK = {"cpu": [Shape(1, 128), Shape(2, 128)], "cuda": [Shape(16, 128)]}


def about(setting: Setting) -> str:
    return f"random weights, those that predict offsets and masks N(0, {OFFSET_WEIGHT_STD:g}^2), biases 0"


def build(name: str) -> nn.Module:
    # Fresh last normalisations are 0, and with them what a block adds: nothing would depend on its convolutions.
    model = timm.create_model(BASE if name == BASE else f"{BASE}_dcn", zero_init_last=False)
    for name in offset_parameters(model):
        if name.endswith("weight"):
            nn.init.normal_(model.get_parameter(name), std=OFFSET_WEIGHT_STD)
    return model


def settle(model: nn.Module, images: Tensor) -> None:
    """Take the running statistics from these images: without, values and offsets grow from block to block."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def theirs(input, offset, weight, bias, stride, padding, dilation, mask):
    """torchvision's operator in place of ours: float32, one padding for both sides."""
    tensors = [t if t is None else t.float() for t in (input, offset, weight, bias)]
    return torchvision.ops.deform_conv2d(*tensors, stride, padding[:2], dilation, mask.float()).to(input.dtype)


def tasks(
    model: nn.Module, images: Tensor, setting: Setting, operator: tuple[ModuleType, str, Callable]
) -> dict[str, Call]:
    """A model's inference and its training step, with an operator under this name in this module."""
    target = torch.randint(1000, (len(images),)).to(setting.device)
    # So small that the model stays what it is: every round, and inference, has the same offsets.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def forward() -> Tensor:
        half = torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32)
        with half, patch.object(*operator):
            return model(images)

    @torch.no_grad()
    def infer() -> list[Tensor]:
        model.eval()
        return [forward()]

    def train() -> list[Tensor]:
        model.train()
        optimizer.zero_grad()
        out = forward()
        nn.functional.cross_entropy(out.float(), target).backward()
        optimizer.step()
        return [out]

    return {"inference": infer, "training step": train}


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    torch.manual_seed(0)
    images = torch.randn(shape.batch, 3, shape.size, shape.size)
    model = build(name).to(setting.device, memory_format=LAYOUTS[layout])
    images = images.to(setting.device, memory_format=LAYOUTS[layout])
    settle(model, images)
    operator = theirs if name == "torchvision" else dcn_plugin.ops.deform_conv2d
    return tasks(model, images, setting, (dcn_plugin.layers.conv, "deform_conv2d", operator))


def work(shape: Shape, task: str, itemsize: int) -> Work:
    return Work("deform_conv2d", images=shape.batch)


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    # Through fifty layers rounding grows a thousandfold, which leaves half types nothing to compare.
    if setting.dtype != torch.float32:
        setting, few = setting._replace(dtype=torch.float32), shape._replace(batch=min(8, shape.batch))
        made = {key: make(few, setting, *key) for key in made if key[0] in (OURS, "torchvision")}
    truth = next(key for key in made if key[0] == "torchvision")
    require_agreement(shape, made, (OURS,), truth, 2e-3 if exact(setting) else 5e-2)


def share(profile: torch.profiler.profile, device: str) -> float | None:
    """Of our operators in the time of the device; None where the profiler saw nothing of it."""
    if device != "cuda":
        times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        return sum(time for key, time in times.items() if key.startswith("dcn_plugin::")) / sum(times.values())
    # Kernels appear below what launched them. Ours launch torch's too, and under autocast call themselves.
    events = [event for event in profile.events() if event.device_type == DeviceType.CPU]
    everything = sum(event.self_device_time_total for event in events)
    found = sum(event.device_time_total for event in events if is_ours(event) and not within_ours(event))
    return found / everything if everything else None


def is_ours(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    return event.name.startswith("dcn_plugin::")


def within_ours(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if is_ours(event):
            return True
    return False


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    """The share of our operators in the profiler's time, and how large the offsets are."""
    offsets: list[float] = []

    def note(module: nn.Module, _: tuple, raw: Tensor) -> None:
        if isinstance(module, OffsetPredictor):
            offsets.append(raw[:, : raw.shape[1] // 3 * 2].abs().mean().item())

    with nn.modules.module.register_module_forward_hook(note):
        call()
    with torch.profiler.profile() as profile:
        for _ in range(FEWEST):
            call()
    return {"operators": share(profile, setting.device), "offset": sum(offsets) / len(offsets)}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = row[OURS][row["layout"]]
    if "gpu" in row:
        base = row["gpu"]["images_s"] * best(row, BASE)["ratio"]
        peers = {f"{BASE} images/s": f"{base:.0f}", "portable /": times_ours(row, "portable")}
    else:
        peers = {"/ same layout": f"{row[BASE][row['layout']]['ratio']:.2f}"}
    return {
        "ms": f"{here['ms']:.1f}",
        f"/ {BASE}": f"{best(row, BASE)['ratio']:.2f}",
        **peers,
        "torchvision /": times_ours(row, "torchvision"),
        "spread": f"{here['spread']:.0%}",
        "operators": "-" if row["operators"] is None else f"{row['operators']:.0%}",
        "offset": f"{row['offset']:.2f}",
    }
