"""What timing on a GPU needs: arguments that are not in the cache, queues that are full, ceilings to compare with."""

import math
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import collect_env

from dcn_plugin import ops

Call = Callable[[], list[Tensor]]

# Our kernels: the portable ones, or the fused ones where they exist.
PORTABLE, FUSED = "portable", "fused"
# The copies of the arguments together are at least so large, twice the L2 cache of the largest GPUs; not that of a
# layer that fits many times over, which is bound by its launches anyway.
COLD, MOST_COPIES = 128 * 2**20, 64
# A timing is to last so long, in milliseconds, and has at most so many calls.
LONG, MOST_CALLS = 2.0, 50
# The GPU is kept busy while the host queues the calls of a timing, if that takes it no longer than this (seconds):
# what has more launches than a queue holds runs at the host's pace in any case.
QUEUED, CYCLES_PER_SECOND = 0.01, 2e9
COLUMNS = """`ms` is the GPU's time for a call, with arguments
that are not in its cache and launches queued beforehand (but for what takes the host long: whole models, portable
kernels of many groups); `host ms` is how long the host takes to launch it. TFLOP/s count the products with the weights,
GB/s each argument and result of the forward and of the backward once; the shares are those of the two ceilings,
measured in the same run."""


class Work(NamedTuple):
    """What a call of an operator cannot do without: operations of products with weights, bytes (0: does not apply)."""

    operator: str
    operations: int = 0
    traffic: int = 0
    images: int = 0

    def with_backward(self, gradients: int) -> "Work":
        """The backward makes two products for one, reads what the forward touched and writes `gradients` bytes."""
        return self._replace(operations=3 * self.operations, traffic=2 * self.traffic + gradients)


def choose(kernels: str) -> None:
    """Our operators look at the variable in every call."""
    os.environ["DCN_PLUGIN_CUDA_KERNELS"] = kernels


class Rotating:
    """A task of a contestant; each call takes the next copy of the arguments, and the contestant's kernels."""

    def __init__(self, calls: list[Call], kernels: str = PORTABLE) -> None:
        self._next, self._kernels = cycle(calls), kernels
        self._calls, self._sleep = 0, 0

    def __call__(self) -> list[Tensor]:
        choose(self._kernels)
        return next(self._next)()

    def clock(self) -> float:
        """Milliseconds of one call."""
        if not self._calls:
            self._prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._sleep:
            torch.cuda._sleep(self._sleep)
        start.record()
        for _ in range(self._calls):
            self()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self._calls

    def _prepare(self) -> None:
        for _ in range(2):  # libraries choose their algorithms at the first call
            self()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self()
        torch.cuda.synchronize()
        self._calls = max(1, min(MOST_CALLS, math.ceil(LONG / 1e3 / (time.perf_counter() - begin))))
        queueing = 1.2 * self._calls * self.host_ms() / 1e3
        self._sleep = int(queueing * CYCLES_PER_SECOND) if queueing < QUEUED else 0

    def host_ms(self) -> float:
        """Milliseconds that the host takes to launch a call, whether or not the GPU keeps up."""
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self()
            times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        return 1e3 * statistics.median(times)


def rotating(make: Callable[[], dict[str, Call]], least: int, kernels: str) -> dict[str, Rotating]:
    """The tasks that `make` makes, each on at least so many copies of their arguments."""
    choose(kernels)
    before = torch.cuda.memory_allocated()
    made = [make()]
    size = max(1, torch.cuda.memory_allocated() - before)
    copies = max(least, min(MOST_COPIES, math.ceil(COLD / size)))
    made += [make() for _ in range(copies - 1)]
    return {task: Rotating([calls[task] for calls in made], kernels) for task in made[0]}


@cache
def ceilings(size: int = 8192, bytes_copied: int = 2**30) -> dict[str, float]:
    """What the GPU does at most: bytes read and written by a copy, operations of a bfloat16 matrix product."""
    source, target = (torch.empty(bytes_copied, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    copy, product = Rotating([lambda: [target.copy_(source)]]), Rotating([lambda: [a @ b]])
    copy_ms, product_ms = (statistics.median(task.clock() for _ in range(10)) for task in (copy, product))
    return {"gb_s": 2 * bytes_copied / copy_ms / 1e6, "tflop_s": 2 * size**3 / product_ms / 1e9}


def facts(work: Work, ms: float, tops: dict[str, float], host_ms: float) -> dict[str, float]:
    """What a row says of ours beside its time."""
    found = {"host_ms": host_ms}
    if work.operations:
        found["tflop_s"] = work.operations / ms / 1e9
        found["of_product"] = found["tflop_s"] / tops["tflop_s"]
    if work.traffic:
        found["gb_s"] = work.traffic / ms / 1e6
        found["of_copy"] = found["gb_s"] / tops["gb_s"]
    if work.images:
        found["images_s"] = 1e3 * work.images / ms
    return found


def kernels_of(call: Rotating, operator: str, task: str) -> dict[str, str]:
    """Which kernels a call has run, and why no faster ones: name of the operator -> the kernel."""
    call()
    names = (operator,) if task in ("forward", "inference") else (operator, f"{operator}_backward")
    return {name: kernel for name, kernel in ops.kernels_used("cuda", reasons=True).items() if name in names}


def figures(row: dict, ms: float) -> dict[str, str]:
    """What the table shows of a row on a GPU beside its family's figures."""
    of: dict[str, Any] = row["gpu"]
    formats = {
        "tflop_s": ("TFLOP/s", "{:.1f}"),
        "of_product": ("of product", "{:.0%}"),
        "gb_s": ("GB/s", "{:.0f}"),
        "of_copy": ("of copy", "{:.0%}"),
        "images_s": ("images/s", "{:.0f}"),
        "host_ms": ("host ms", "{:.3f}"),
    }
    shown = {title: how.format(of[name]) for name, (title, how) in formats.items() if name in of}
    return {"ms": f"{ms:.3f}", **shown, "kernels": ", ".join(row["kernels"].values()) or "-"}


def describe() -> dict[str, str]:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": device.name,
        "multiprocessors": str(device.multi_processor_count),
        "memory": f"{device.total_memory / 2**30:.0f} GiB",
        "capability": f"{device.major}.{device.minor}",
        "driver": str(collect_env.get_nvidia_driver_version(collect_env.run)),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def is_alive() -> bool:
    """Whether the device still works for this process: an access out of bounds ends that."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
