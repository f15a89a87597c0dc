"""What the families of operators share: clocks, alternating rounds, the description of the machine."""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torchvision

import dcn_plugin

OURS = "dcn_plugin"
Contestants = dict[str, Callable[[], object]]


def clock(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = now()
    call()
    return 1e3 * (now() - begin)


def measure(calls: Contestants, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median, spread and our time over each contestant's, over rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, device))
    ours = times[OURS]
    return {
        name: {
            "ms": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "ratio": statistics.median(o / v for o, v in zip(ours, values, strict=True)),
        }
        for name, values in times.items()
    }


def training(forward: Contestants, tensors: dict[str, list[torch.Tensor]]) -> Contestants:
    """Forward and backward of each contestant, by the tensors it is to be differentiated by."""
    grads = {name: torch.randn_like(call()) for name, call in forward.items()}  # type: ignore[arg-type]

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward[name](), tensors[name], grads[name])

    return {name: step(name) for name in forward}


def tasks(forward: Contestants, tensors: dict[str, list[torch.Tensor]], device: str, rounds: int) -> list[dict]:
    with torch.no_grad():
        inference = measure(forward, device, rounds)
    trained = measure(training(forward, tensors), device, max(3, rounds // 2))
    return [{"task": "forward", **inference}, {"task": "forward+backward", **trained}]


def require_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuse to time what is wrong."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    limit = 1e-5 if ours.dtype == torch.float32 and ours.device.type == "cpu" else 3e-2
    if error > limit:
        raise SystemExit(f"{what}: differs from torchvision by {error:.2g} of the largest value")


def describe(device: str) -> dict[str, str]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, dcn_plugin)}
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "date": str(date.today()),
        **versions,
    }
