"""Stated problems on which kernels are counted: what each launches, and what its warps issue and touch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cases
import emulation
import torch
from aiming import aim

from dcn_plugin.ops._operator import ORDERED, WANTED

from .counts import Counts
from .launch import Device

SINGLE, BRAIN = torch.float32, torch.bfloat16


class Job(NamedTuple):
    operator: str
    what: str
    make: Any
    units: int  # how many of what one kernel does over and over
    dtype: torch.dtype = SINGLE
    kernels: str = "portable"
    channels_last: bool = False
    multiprocessors: int = 1  # few: the widest tiles
    shared_bytes: int = 99 << 10  # that a block may have: what every processor from 8.0 on grants
    ordered: bool = False  # the backward as in torch's deterministic mode

    @property
    def source(self) -> str:
        folder = "roi_pool" if self.operator.endswith("roi_pool") else self.operator
        return f"csrc/ops/{folder}/{folder}.cu"


@dataclass
class Launches:
    """Of one kernel in one job."""

    counts: Counts = field(default_factory=Counts)
    threads: int = 0
    dynamic_shared: int = 0


MAP = (1, 64, 14, 14)
SAMPLES = 64 * 9 * 14 * 14
REGIONS, LEVELS = 24, ((25, 38), (13, 19), (7, 10))
_conv, _roi, _attend = cases.deform_conv2d_arguments, cases.deform_roi_pool_arguments, cases.ms_deform_attn_arguments
_attention = _attend((1, 8, 32), LEVELS, 64, 4, reference=2, softmax=True)
_gather = cases.deform_aggregate2d_arguments((1, 14, 14, 128), groups=8, softmax=True, official_order=True)
_POINTS, _TAPS = 64 * 8 * 3 * 4 * 32, 14 * 14 * 9 * 128
_C64 = "1x64x14x14 to 64, 3x3, modulated"
_one_level = _attend((1, 2, 32), ((25, 38),), 300, 6)


def _attend_at_one_place() -> dict[str, Any]:
    arguments = _one_level()
    return arguments | {"sampling_locations": torch.full_like(arguments["sampling_locations"], 0.4)}


JOBS = {
    "conv float32": Job("deform_conv2d", f"{_C64}, NCHW", _conv(MAP, 64), SAMPLES),
    "conv float32 channels_last": Job("deform_conv2d", _C64, _conv(MAP, 64), SAMPLES, channels_last=True),
    "conv bfloat16 channels_last": Job("deform_conv2d", _C64, _conv(MAP, 64), SAMPLES, BRAIN, channels_last=True),
    "conv float32 channels_last, one place": Job(
        "deform_conv2d", f"{_C64}, all samples at one place", lambda: aim(_conv(MAP, 64)(), [(6.25, 7.5)]), SAMPLES,
        channels_last=True,
    ),
    "conv depthwise float32": Job(
        "deform_conv2d", "1x64x14x14, 3x3, depthwise, 4 offset groups, NCHW",
        _conv(MAP, 64, groups=64, offset_groups=4), SAMPLES,
    ),
    "conv fused, widest tiles": Job(
        "deform_conv2d", "1x64x14x14 to 256, 3x3, modulated, channels_last, as on 9.0", _conv(MAP, 256), SAMPLES, BRAIN,
        "fused", True, shared_bytes=227 << 10,
    ),
    "conv fused, wide tiles": Job(
        "deform_conv2d", "1x64x14x14 to 256, 3x3, modulated, channels_last", _conv(MAP, 256), SAMPLES, BRAIN, "fused",
        channels_last=True,
    ),
    "conv fused, TF32": Job(
        "deform_conv2d", "1x64x14x14 to 256, 3x3, modulated, channels_last", _conv(MAP, 256), SAMPLES, SINGLE, "fused",
        channels_last=True,
    ),
    "conv fused, small tiles": Job(
        "deform_conv2d", f"{_C64}, channels_last", _conv(MAP, 64), SAMPLES, BRAIN, "fused", True, 1000
    ),
    "conv fused depthwise": Job(
        "deform_conv2d", "1x64x14x14, 3x3, depthwise, 4 offset groups, channels_last",
        _conv(MAP, 64, groups=64, offset_groups=4), SAMPLES, BRAIN, "fused", True,
    ),
    "roi_align float32": Job(
        "deform_roi_pool", f"{REGIONS} regions of 1x32x20x24, 7x7 bins of 2x2 samples, no offsets",
        _roi((1, 32, 20, 24), REGIONS, (7, 7), offset=False, mask=False), REGIONS * 32 * 49 * 4,
    ),
    "roi_align float32 channels_last": Job(
        "deform_roi_pool", f"{REGIONS} regions of 1x32x20x24, 7x7 bins of 2x2 samples, no offsets, channels_last",
        _roi((1, 32, 20, 24), REGIONS, (7, 7), offset=False, mask=False), REGIONS * 32 * 49 * 4, channels_last=True,
    ),
    "deform_roi_pool float32": Job(
        "deform_roi_pool", f"{REGIONS} regions of 1x32x20x24, 7x7 bins of 2x2 samples, modulated",
        _roi((1, 32, 20, 24), REGIONS, (7, 7)), REGIONS * 32 * 49 * 4,
    ),
    "deform_roi_pool bfloat16 channels_last": Job(
        "deform_roi_pool", f"{REGIONS} regions of 1x32x20x24, 7x7 bins of 2x2 samples, modulated, channels_last",
        _roi((1, 32, 20, 24), REGIONS, (7, 7)), REGIONS * 32 * 49 * 4, BRAIN, channels_last=True,
    ),
    "deform_ps_roi_pool float32": Job(
        "deform_ps_roi_pool", f"{REGIONS} regions of 1x196x20x24, 7x7 bins of 2x2 samples, 4 outputs, modulated",
        cases.deform_ps_roi_pool_arguments((1, 196, 20, 24), REGIONS, 4, 7, (7, 7)), REGIONS * 4 * 49 * 4,
    ),
    "ps_roi_pool float32": Job(
        "ps_roi_pool", f"{REGIONS} regions of 1x196x20x24, 7x7 bins, 4 outputs; the unit is a bin's output",
        cases.ps_roi_pool_arguments((1, 196, 20, 24), REGIONS, 4, 7, (7, 7)), REGIONS * 4 * 49,
    ),
    "attention float32": Job("ms_deform_attn", "64 queries, 8 heads of 32, 3 levels of 4 points", _attention, _POINTS),
    "attention fused float32": Job(
        "ms_deform_attn", "64 queries, 8 heads of 32, 3 levels of 4 points", _attention, _POINTS, kernels="fused"
    ),
    "attention fused bfloat16": Job(
        "ms_deform_attn", "64 queries, 8 heads of 32, 3 levels of 4 points", _attention, _POINTS, BRAIN, "fused"
    ),
    "attention float32 in order": Job(
        "ms_deform_attn", "300 queries, 2 heads of 32, a level of 6 points, deterministic", _one_level,
        300 * 2 * 6 * 32, ordered=True,
    ),
    "attention float32 in order, one place": Job(
        "ms_deform_attn", "300 queries, 2 heads of 32, a level of 6 points, deterministic, all samples at one place",
        _attend_at_one_place, 300 * 2 * 6 * 32, ordered=True,
    ),
    "aggregation float32": Job("deform_aggregate2d", "14x14, 8 groups of 16, 3x3, softmax", _gather, _TAPS),
    "aggregation fused float32": Job(
        "deform_aggregate2d", "14x14, 8 groups of 16, 3x3, softmax", _gather, _TAPS, kernels="fused"
    ),
    "aggregation fused bfloat16": Job(
        "deform_aggregate2d", "14x14, 8 groups of 16, 3x3, softmax", _gather, _TAPS, BRAIN, "fused"
    ),
}  # fmt: skip


class CountingDevice(Device):
    """Counts every launch, by kernel."""

    def __init__(self, texts: list[str]) -> None:
        self.found: dict[str, Launches] = {}
        super().__init__(texts, lambda name: self.found[name].counts)

    def launch(self, name: str, parameters: bytes, blocks: int, threads: int, shared: int) -> None:
        of = self.found.setdefault(name, Launches())
        of.threads, of.dynamic_shared = threads, shared
        super().launch(name, parameters, blocks, threads, shared)


def count(job: Job, text: str) -> dict[str, dict[str, Launches]]:
    """Run a job's forward and backward on the kernels of a PTX file; return what each launched."""
    case = cases.BY_NAME[job.operator]
    torch.manual_seed(0)
    arguments = {
        name: value.to(SINGLE if name in case.float32_beside_half else job.dtype) if torch.is_tensor(value) else value
        for name, value in job.make().items()
    }
    torch.manual_seed(1)
    grad = torch.randn(case.function(**arguments).shape).to(job.dtype)
    layout = torch.channels_last if job.channels_last else torch.contiguous_format
    arguments, grad = (
        {k: v.contiguous(memory_format=layout) if torch.is_tensor(v) and v.dim() == 4 else v for k, v in of.items()}
        for of in (arguments, {"grad": grad})
    )
    wanted = sum(WANTED[name] for name in cases.tensors(arguments) if name != "bias") | (ORDERED if job.ordered else 0)
    forward, backward = CountingDevice([text]), CountingDevice([text])
    before, tf32 = os.environ.get("DCN_PLUGIN_CUDA_KERNELS"), torch.backends.cudnn.allow_tf32
    os.environ["DCN_PLUGIN_CUDA_KERNELS"] = job.kernels
    torch.backends.cudnn.allow_tf32 = True
    try:
        emulation.load().set_schedule(0, False, False, job.multiprocessors, True, job.shared_bytes)
        forward.call(case.name, *case.to_op(**arguments).values())
        backward.call(f"{case.name}_backward", *case.to_backward(grad["grad"], wanted, **arguments).values())
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        if before is None:
            del os.environ["DCN_PLUGIN_CUDA_KERNELS"]
        else:
            os.environ["DCN_PLUGIN_CUDA_KERNELS"] = before
    return {"forward": forward.found, "backward": backward.found}
