"""What the families share: clocks, alternating rounds, agreement, the rows of a table, the description of the machine.

A family is a module (`conv.py` is the plainest one). It has contestants, each a name and a memory layout, and makes the
calls of each: task -> function that returns its results as a list of tensors.
"""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gpu
import memory
import torch
from torch import Tensor

import dcn_plugin

OURS = "dcn_plugin"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Which versions a result names, where they are installed.
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "transformers", "torch-ms-deform-attn", "deformops")
Call = Callable[[], list[Tensor]]
Contestant = tuple[str, str]
Times = dict[int, float]

# A slow contestant has at least so many rounds.
FEWEST = 3
# It keeps worker threads of its own, for which torch's workers, which spin for a while after a call, must make room.
OWN_THREADS, REST = "onnxruntime", 0.01


class Setting(NamedTuple):
    """What holds for all shapes of a run. A contestant has `rounds` in a task, or as many as fit into `seconds`."""

    device: str
    dtype: torch.dtype
    offset_std: float
    rounds: int
    seconds: float
    kernels: str = gpu.FUSED


def clock(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    if isinstance(call, gpu.Rotating):
        return call.clock()
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = now()
    call()
    return 1e3 * (now() - begin)


def measure(calls: dict[Contestant, Call], setting: Setting) -> dict[Contestant, Times]:
    """Milliseconds by round. All take turns; the slow ones have fewer rounds, spread over those of the fast ones."""
    times: dict[Contestant, Times] = {key: {} for key in calls}
    turns = {}
    for key, call in calls.items():
        fit = int(1e3 * setting.seconds / clock(call))
        turns[key] = max(FEWEST, min(setting.rounds, fit))
    most = max(turns.values())
    for number in range(most):
        for key, call in calls.items():
            if (number + 1) * turns[key] // most > number * turns[key] // most:
                if key[0] == OWN_THREADS and torch.get_num_threads() > 1:
                    time.sleep(REST)
                times[key][number] = clock(call)
    return times


def compared(times: dict[Contestant, Times], layout: str) -> dict[str, dict[str, dict[str, float]]]:
    """Name -> layout -> median, spread and our time in `layout` over this one's, the median of common rounds."""
    ours = times[OURS, layout]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, its_layout), its in times.items():
        low, middle, high = statistics.quantiles(its.values(), n=4, method="inclusive")
        found.setdefault(name, {})[its_layout] = {
            "ms": middle,
            "spread": (high - low) / middle,
            "rounds": len(its),
            "ratio": statistics.median(ours[number] / its[number] for number in ours.keys() & its.keys()),
        }
    return found


def kernels(family: ModuleType, setting: Setting, name: str) -> str:
    """Which CUDA kernels of ours a contestant takes."""
    return family.KERNELS.get(name, gpu.PORTABLE) if setting.kernels == gpu.FUSED else gpu.PORTABLE


def calls_of(family: ModuleType, shape: tuple, setting: Setting, key: Contestant) -> dict[str, Call]:
    """The calls of a contestant by task."""
    if setting.device != "cuda":
        return family.make(shape, setting, *key)
    make = partial(family.make, shape, setting, *key)
    return gpu.rotating(make, family.COPIES, kernels(family, setting, key[0]))


def rows_for(family: ModuleType, shape: tuple, setting: Setting) -> list[dict]:
    """Check the contestants of a family against one another on a shape, then time them: a row per task and layout."""
    made = {
        key: calls for key in family.CONTESTANTS[setting.device] if (calls := calls_of(family, shape, setting, key))
    }
    family.verify(shape, setting, made)
    rows = []
    layouts = [layout for name, layout in made if name == OURS]
    for task in made[OURS, layouts[0]]:
        times = measure({key: calls[task] for key, calls in made.items() if task in calls}, setting)
        for layout in layouts:
            row = {"shape": str(shape), "layout": layout, "task": task, **compared(times, layout)}
            call = made[OURS, layout][task]
            if isinstance(call, gpu.Rotating):
                work = family.work(shape, task, setting.dtype.itemsize)
                row["gpu"] = gpu.facts(work, row[OURS][layout]["ms"], gpu.ceilings(), call.host_ms())
                row["kernels"] = gpu.kernels_of(call, work.operator, task)
            rows.append({**row, **family.extras(shape, setting, call, layout, task)})
    return rows


def differentiated(forward: Callable[[], Tensor], tensors: list[Tensor], grad: Tensor) -> dict[str, Call]:
    """The tasks of an operator: alone, and with the gradients of `tensors`."""

    def both() -> list[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, tensors, grad)]

    @torch.no_grad()
    def alone() -> list[Tensor]:
        return [forward()]

    return {"forward": alone, "forward+backward": both}


def require_equal(what: str, ours: Iterable[Tensor], theirs: Iterable[Tensor], limit: float) -> None:
    """Refuse to time what is wrong."""
    for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        mine, its = mine.detach().float(), its.detach().float()
        error = ((mine - its).abs().max() / its.abs().max()).item()
        if not error <= limit:
            raise SystemExit(f"{what}: result {i} differs from the other's by {error:.2g} of the largest value")


def require_agreement(
    shape: tuple, made: dict[Contestant, dict[str, Call]], names: Iterable[str], truth: Contestant, limit: float
) -> None:
    """Compare the results of all tasks of the contestants called `names` with those of `truth`."""
    for task, call in made[truth].items():
        theirs = call()
        for key, calls in made.items():
            if key[0] in names and key != truth and task in calls:
                require_equal(f"{shape}: {' '.join(key)}, {task}, {' '.join(truth)}", calls[task](), theirs, limit)


def exact(setting: Setting) -> bool:
    """Whether rounding of half types, and of tensor cores, stays away."""
    return setting.device == "cpu" and setting.dtype == torch.float32


def call_of(family: str, shape: tuple, setting: Setting, key: Contestant, task: str) -> Call:
    module = importlib.import_module(family)
    if setting.device == "cuda":
        gpu.choose(kernels(module, setting, key[0]))
    return module.make(shape, setting, *key)[task]


@cache
def _peak(
    family: str, small: tuple, shape: tuple, setting: Setting, key: Contestant, task: str, threads: int
) -> float | None:
    return memory.peak_mib(call_of, *((family, s, setting, key, task) for s in (small, shape)), setting.device)


def peaks(
    family: str, small: tuple, shape: tuple, setting: Setting, contestants: Iterable[Contestant], task: str
) -> dict[str, float | None]:
    """MiB that these contestants need above their results, by name; `small` is a shape to warm up with."""
    threads = torch.get_num_threads()
    return {key[0]: _peak(family, small, shape, setting, key, task, threads) for key in contestants}


def best(row: dict, name: str) -> dict[str, float]:
    """The figures of a contestant in its faster layout."""
    return min(row[name].values(), key=lambda figures: figures["ms"])


def times_ours(row: dict, name: str) -> str:
    """The time of a contestant over ours, or that it did not run."""
    return f"{1 / best(row, name)['ratio']:.1f}x" if name in row else "-"


def mib(row: dict, name: str) -> str:
    peak = row["memory"].get(name)
    return "-" if peak is None else f"{round(peak, 1) + 0.0:.1f}"  # noise below zero is no "-0.0"


def _describe_cpu() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": name,
        "cores": str(os.cpu_count()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def describe(device: str) -> dict[str, str]:
    installed = {dist.name for dist in metadata.distributions()}
    packages = [p for p in PACKAGES if p in installed]
    return {
        **(gpu.describe() if device == "cuda" else _describe_cpu()),
        "date": str(date.today()),
        **{package: metadata.version(package) for package in packages},
        OURS: dcn_plugin.__version__,
    }
