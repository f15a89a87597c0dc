"""Calls that reach every parallel loop of the library, and what the sanitizers' build tells of those loops."""

import ctypes
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CASES, OpCase, convert, run
from conftest import PORTABLE, TUNED, cpu_kernels
from torch import Tensor

import dcn_plugin

ROOT = Path(__file__).resolve().parents[2]
THREADS = 4


class Problem(NamedTuple):
    """A call of an operator that is large enough for several threads."""

    case: OpCase
    arguments: dict[str, Any]
    kernels: str
    ordered: bool

    def run(self, threads: int = THREADS) -> dict[str, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(self.ordered)
        try:
            with cpu_kernels(self.kernels):
                return run(self.case.function, self.arguments)
        finally:
            torch.set_num_threads(before)
            torch.use_deterministic_algorithms(False)


def problems() -> dict[str, Problem]:
    memory = [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
    ]
    found = {}
    threaded = [(case, *named) for case in CASES for named in case.threaded.items()]
    for (case, name, make), (dtype, layout) in itertools.product(threaded, memory):
        torch.manual_seed(0)
        arguments = convert(make(), dtype=dtype)
        arguments[case.image] = arguments[case.image].contiguous(memory_format=layout)
        how = f"{name}-{str(dtype).removeprefix('torch.')}-{str(layout).removeprefix('torch.')}"
        found[f"{how}-tuned"] = Problem(case, arguments, TUNED, False)
        found[f"{how}-portable"] = Problem(case, arguments, PORTABLE, False)
        if case.adds_atomically:
            found[f"{how}-ordered"] = Problem(case, arguments, PORTABLE, True)
    return found


def loops_of_sources() -> set[str]:
    """Each parallel loop of the CPU as "file:line"."""
    return {
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "csrc").rglob("*.h"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "stable::parallel_for(" in line
    }


# The CPU's products are in the type that sums are in, and are added by the product itself.
NOT_ON_THE_CPU = {"AddWeightGradient"}


def bodies_of_sources() -> set[str]:
    """The structs that the portable path hands to Cpu::for_each."""
    texts = [path.read_text() for path in (ROOT / "csrc").rglob("*.h") if path.parent.name != "cuda"]
    return {name for text in texts for name in re.findall(r"Device::for_each\(\s*(\w+)", text)} - NOT_ON_THE_CPU


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
