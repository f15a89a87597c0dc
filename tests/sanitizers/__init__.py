"""Calls that reach every parallel loop of the library, and what the sanitizers' build tells of those loops."""

import ctypes
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import (
    CASES,
    OpCase,
    convert,
    deform_conv2d_arguments,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    ps_roi_pool_arguments,
    run,
)
from conftest import PORTABLE, TUNED
from torch import Tensor

import dcn_plugin

ROOT = Path(__file__).resolve().parents[2]
THREADS = 4
CASE = {case.name: case for case in CASES}


class Problem(NamedTuple):
    """A call of an operator that is large enough for several threads."""

    case: OpCase
    arguments: dict[str, Any]
    path: int
    ordered: bool

    def run(self, threads: int = THREADS) -> dict[str, Tensor]:
        before = torch.ops.dcn_plugin._set_cpu_path(self.path), torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(self.ordered)
        try:
            return run(self.case.function, self.arguments)
        finally:
            torch.ops.dcn_plugin._set_cpu_path(before[0])
            torch.set_num_threads(before[1])
            torch.use_deterministic_algorithms(False)


def problems() -> dict[str, Problem]:
    conv, align = deform_conv2d_arguments, deform_roi_pool_arguments
    part, pixels = deform_ps_roi_pool_arguments, ps_roi_pool_arguments
    shapes: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "conv": ("deform_conv2d", conv((2, 20, 26, 24), out=24)),
        "conv_lanes": ("deform_conv2d", conv((1, 160, 14, 15), out=40)),
        "conv_images": ("deform_conv2d", conv((5, 70, 10, 9), out=18, mask=False)),
        "conv_groups": ("deform_conv2d", conv((3, 64, 12, 13), out=64, groups=4, offset_groups=2)),
        "conv_depthwise": ("deform_conv2d", conv((2, 96, 13, 12), out=96, groups=96, offset_groups=3)),
        "conv_few_pixels": ("deform_conv2d", conv((1, 200, 4, 3), out=70)),
        "align": ("deform_roi_pool", align((2, 40, 20, 18), regions=30)),
        "align_many": ("deform_roi_pool", align((2, 4, 9, 8), regions=1200, bins=(2, 1), sampling_ratio=1)),
        "part": ("deform_ps_roi_pool", part((2, 72, 17, 16), regions=40, output_dim=18, classes=2)),
        "pixels": ("ps_roi_pool", pixels((3, 72, 17, 16), regions=60, output_dim=18, bins=(4, 4))),
    }
    memory = [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
    ]
    found = {}
    for (name, (case, make)), (dtype, layout) in itertools.product(shapes.items(), memory):
        torch.manual_seed(0)
        arguments = convert(make(), dtype=dtype)
        arguments["input"] = arguments["input"].contiguous(memory_format=layout)
        how = f"{name}-{str(dtype).removeprefix('torch.')}-{str(layout).removeprefix('torch.')}"
        found[f"{how}-tuned"] = Problem(CASE[case], arguments, TUNED, False)
        found[f"{how}-portable"] = Problem(CASE[case], arguments, PORTABLE, False)
        if case != "deform_conv2d":
            found[f"{how}-ordered"] = Problem(CASE[case], arguments, PORTABLE, True)
    return found


def loops_of_sources() -> set[str]:
    """Each parallel loop of the CPU as "file:line"."""
    return {
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "csrc").rglob("*.h"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "stable::parallel_for(" in line
    }


def bodies_of_sources() -> set[str]:
    """The structs that the portable path hands to Cpu::for_each."""
    texts = [path.read_text() for path in (ROOT / "csrc" / "ops").rglob("*.h")]
    return {name for text in texts for name in re.findall(r"Device::for_each\((\w+)", text)}


class Loop(NamedTuple):
    name: str
    shared: bool  # several threads have worked in it

    @property
    def place(self) -> str:
        return os.path.normpath(self.name.split(" ")[0])

    @property
    def body(self) -> str | None:
        """Of Cpu::for_each: the struct that it was given."""
        given = re.search(r"Cpu::for_each<dcn::(\w+)", self.name)
        return given and given[1]


def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(Path(dcn_plugin.__file__).with_name("_C.so")))
    loaded.dcn_loops.restype = ctypes.c_char_p
    return loaded


def loops() -> Iterator[Loop]:
    """What has run so far."""
    for line in library().dcn_loops().decode().splitlines():
        yield Loop(line[1:], line[0] == "*")


def spoil(loop: Loop, fault: int) -> None:
    """Give the loop one of the faults of fork_join.h."""
    library().dcn_spoil(loop.name.encode(), fault)
