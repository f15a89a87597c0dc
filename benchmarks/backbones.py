"""Backbones that sample: InternImage, FlashInternImage, DAT, against a plain fallback, convnext_tiny, resnet50_dcn."""

from typing import Any, NamedTuple

import models
import timm
import torch
from aggregation import sampled_sum
from harness import OURS, Call, Contestant, Setting, best, exact, require_agreement, times_ours
from torch import Tensor, nn

import dcn_plugin
import dcn_plugin.layers._aggregation

NAME = "backbones"
FALLBACK, PEERS = "grid_sample", ("convnext_tiny", "resnet50_dcn")
LAYOUT = "channels_last"
COLUMNS = {
    "cpu": """`images/s` is ours. The tiny models are timed in training, too, and beside others: `grid_sample /` is the
time of the same model with a fallback of the official kind on torch's sampler over ours; `/ convnext_tiny` and
`/ resnet50_dcn` are our time over theirs, for the same images; theirs in images a second stands behind. A training step
is forward, backward and SGD with momentum."""
}
CONTESTANTS: dict[str, list[Contestant]] = {
    "cpu": [(name, LAYOUT) for name in (OURS, FALLBACK, *PEERS)],
}
OFFSET_WEIGHT_STD = 0.01


class Shape(NamedTuple):
    model: str
    batch: int
    size: int

    @property
    def is_tiny(self) -> bool:
        """Whether it is timed in training and beside others too; for larger models that takes minutes."""
        return self.model.endswith("tiny")

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch} at {self.size}x{self.size}"


# Of one image, of the size of the model's weights; the huge one's are for 384 before they are for 640.
SIZES = {"internimage_large": 384, "internimage_xlarge": 384, "internimage_huge": 384, "flash_internimage_large": 384}
_NAMES = (
    *(f"internimage_{size}" for size in ("tiny", "small", "base", "large", "xlarge", "huge")),
    *(f"flash_internimage_{size}" for size in ("tiny", "small", "base", "large")),
    *(f"dat_{size}" for size in ("tiny", "small", "base", "plus_tiny", "plus_small", "plus_base")),
)
SHAPES = {"cpu": [Shape(name, 1, SIZES.get(name, 224)) for name in _NAMES]}
QUICK = {"cpu": [Shape(name, 1, 64) for name in ("internimage_tiny", "flash_internimage_tiny")]}


def about(setting: Setting) -> str:
    return f"random weights, those that predict offsets N(0, {OFFSET_WEIGHT_STD:g}^2)"


def build(name: str) -> nn.Module:
    if name == "resnet50_dcn":
        return models.build(name)
    model = timm.create_model(name)
    # At 0, as a fresh model has them, all samples lie on pixels.
    for name in dcn_plugin.layers.offset_parameters(model):
        if name.endswith("weight"):
            nn.init.normal_(model.get_parameter(name), std=OFFSET_WEIGHT_STD)
    return model


def plain(
    value: Tensor, offset: Tensor, weight: Tensor | None, kernel_size: int, stride: int, padding: int, dilation: int,
    *, offset_scale: float, softmax: bool, **_: Any,
) -> Tensor:  # fmt: skip
    """The operator as InternImages of the official sizes call it, in the official order, in plain PyTorch."""
    assert (kernel_size, stride, padding, dilation) == (3, 1, 1, 1)
    if weight is None:
        offset, weight = offset[..., :18].unflatten(-1, (9, 2)), offset[..., 18:]
    taps = torch.arange(3, dtype=torch.float32) - 1
    x, y = offset_scale * (offset[..., 0] + taps.repeat_interleave(3)), offset_scale * (offset[..., 1] + taps.repeat(3))
    return sampled_sum(value, y, x, weight.softmax(-1) if softmax else weight)


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    if name != OURS and not shape.is_tiny or name == FALLBACK and "internimage" not in shape.model:
        return {}
    torch.manual_seed(0)
    images = torch.randn(shape.batch, 3, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
    model = build(name if name in PEERS else shape.model).to(memory_format=torch.channels_last)
    if name == "resnet50_dcn":  # the others have norms whose results do not grow
        models.settle(model, images)
    operator = plain if name == FALLBACK else dcn_plugin.ops.deform_aggregate2d
    tasks = models.tasks(model, images, setting, (dcn_plugin.layers._aggregation, "deform_aggregate2d", operator))
    return tasks if shape.is_tiny else {"inference": tasks["inference"]}


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    if (FALLBACK, LAYOUT) in made:
        inferred = {key: {"inference": calls["inference"]} for key, calls in made.items()}
        require_agreement(shape, inferred, (FALLBACK,), (OURS, LAYOUT), 1e-3 if exact(setting) else 5e-2)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {"batch": shape.batch}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours = row[OURS][LAYOUT]
    beside = [peer for peer in PEERS if peer in row]
    return {
        "ms": f"{ours['ms']:.0f}",
        "images/s": f"{1e3 * row['batch'] / ours['ms']:.2f}",
        f"{FALLBACK} /": times_ours(row, FALLBACK),
        **{f"/ {peer}": f"{best(row, peer)['ratio']:.2f}" if peer in beside else "-" for peer in PEERS},
        **{
            f"{peer} images/s": f"{1e3 * row['batch'] / best(row, peer)['ms']:.2f}" if peer in beside else "-"
            for peer in PEERS
        },
        "spread": f"{ours['spread']:.0%}",
    }
