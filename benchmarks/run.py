"""Time deform_conv2d against its peers, interleaved in one process, and write medians and ratios.

    python benchmarks/run.py              # CPU, one thread and all threads
    python benchmarks/run.py --quick      # two shapes
    python benchmarks/run.py --device cuda

Each shape is checked against torchvision before it is timed. Rounds alternate between the contestants, so that a noisy
machine disturbs them alike; a ratio is the median over rounds. With one thread, CPU time of the thread is counted.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision

import dcn_plugin
from dcn_plugin.ops import deform_conv2d


class Shape(NamedTuple):
    """A 3x3 layer: batch, channels, height, width, stride, groups, offset groups."""

    batch: int
    channels: int
    height: int
    width: int
    stride: int = 1
    groups: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        for name, value in (("stride", self.stride), ("groups", self.groups), ("offset groups", self.offset_groups)):
            text += f", {name} {value}" if value != 1 else ""
        return text


RESNET50 = [Shape(n, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for n in (1, 8)]
OTHERS = [
    Shape(2, 128, 56, 56, stride=2),
    Shape(1, 256, 100, 152),
    Shape(2, 128, 28, 28, offset_groups=4),
    Shape(2, 128, 28, 28, groups=8, offset_groups=8),
    Shape(2, 128, 28, 28, groups=128),
]
QUICK = [Shape(2, 64, 56, 56), Shape(2, 256, 14, 14)]
Contestants = dict[str, Callable[[], object]]


def problem(shape: Shape, device: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    out = ((shape.height - 1) // shape.stride + 1, (shape.width - 1) // shape.stride + 1)
    values = {
        "input": torch.randn(shape.batch, shape.channels, shape.height, shape.width),
        "offset": torch.randn(shape.batch, 18 * shape.offset_groups, *out),
        "weight": torch.randn(shape.channels, shape.channels // shape.groups, 3, 3) / (9 * shape.channels) ** 0.5,
        "mask": torch.rand(shape.batch, 9 * shape.offset_groups, *out),
    }
    on = {k: v.to(device, dtype) for k, v in values.items()}
    for name in ("input", "weight"):
        on[name] = on[name].contiguous(memory_format=layout)
    return {k: v.requires_grad_() for k, v in on.items()}


def contestants(shape: Shape, t: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> Contestants:
    """Ours and the plain convolution on ``t``; torchvision on ``peer``, the type and layout it works in."""
    how = dict(stride=shape.stride, padding=1)
    return {
        "dcn_plugin": lambda: deform_conv2d(t["input"], t["offset"], t["weight"], mask=t["mask"], **how),
        "conv2d": lambda: F.conv2d(t["input"], t["weight"], groups=shape.groups, **how),
        "torchvision": lambda: torchvision.ops.deform_conv2d(
            peer["input"], peer["offset"], peer["weight"], mask=peer["mask"], **how
        ),
    }


def training(forward: Contestants, t: dict, peer: dict) -> Contestants:
    tensors = {"dcn_plugin": list(t.values()), "conv2d": [t["input"], t["weight"]], "torchvision": list(peer.values())}
    grad = torch.randn_like(forward["conv2d"]())

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out := forward[name](), tensors[name], grad.to(out))

    return {name: step(name) for name in forward}


def check(shape: Shape, t: dict, peer: dict) -> None:
    """Refuse to time what is wrong."""
    pair = contestants(shape, t, peer)
    ours, theirs = pair["dcn_plugin"]().float(), pair["torchvision"]().float()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    limit = 1e-5 if t["input"].dtype == torch.float32 and t["input"].device.type == "cpu" else 3e-2
    if error > limit:
        raise SystemExit(f"{shape}: differs from torchvision by {error:.2g} of the largest value")


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
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, device))
    ours = times["dcn_plugin"]
    return {
        name: {
            "ms": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "ratio": statistics.median(o / v for o, v in zip(ours, values, strict=True)),
        }
        for name, values in times.items()
    }


def rows_for(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    rows = []
    for layout_name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        t = problem(shape, device, dtype, layout)
        peer = problem(shape, device, torch.float32, torch.contiguous_format)
        check(shape, t, peer)
        forward = contestants(shape, t, peer)
        with torch.no_grad():
            inference = measure(forward, device, rounds)
        for task, result in (
            ("forward", inference),
            ("forward+backward", measure(training(forward, t, peer), device, max(3, rounds // 2))),
        ):
            rows.append({"shape": str(shape), "layout": layout_name, "task": task, **result})
    return rows


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


def markdown(result: dict) -> str:
    about = result["about"]
    lines = [
        f"# deform_conv2d on {about['device']}",
        "",
        f"`{result['command']}`, {about['date']}; torch {about['torch']}, torchvision {about['torchvision']}, "
        f"dcn_plugin {about['dcn_plugin']}; {result['dtype']}; 3x3, modulated, offsets N(0, 1).",
        "",
        "Milliseconds are medians over alternating rounds; `/ conv2d` is our time over the plain convolution's on the",
        "same tensors; `torchvision /` is torchvision's time (float32, NCHW) over ours.",
    ]
    for threads, rows in result["rows"].items():
        lines += ["", f"## {threads}", "", "| shape | layout | task | ms | / conv2d | torchvision / | spread |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            ours, conv, peer = row["dcn_plugin"], row["conv2d"], row["torchvision"]
            cells = (row["shape"], row["layout"], row["task"], f"{ours['ms']:.2f}", f"{conv['ratio']:.2f}")
            lines.append("| " + " | ".join((*cells, f"{1 / peer['ratio']:.1f}x", f"{ours['spread']:.0%}")) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, under a minute")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", help="CPU thread counts (default: 1 and all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and Markdown"
    )
    args = parser.parse_args()

    shapes = QUICK if args.quick else RESNET50 + OTHERS
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    threads = [1] if args.device == "cuda" else args.threads or sorted({1, torch.get_num_threads()})
    result = {
        "about": describe(args.device),
        "dtype": str(dtype).removeprefix("torch."),
        "command": "python benchmarks/run.py" + (f" --device {args.device}" if args.device != "cpu" else ""),
        "rows": {},
    }
    for count in threads:
        torch.set_num_threads(count)
        title = "GPU" if args.device == "cuda" else f"{count} thread{'s' * (count > 1)}"
        rows = result["rows"][title] = []
        for shape in shapes:
            rows += rows_for(shape, args.device, dtype, args.rounds)
            for row in rows[-4:]:
                ours, conv, peer = row["dcn_plugin"], row["conv2d"], row["torchvision"]
                print(f"{title:10} {row['shape']:32} {row['layout']:14} {row['task']:17} {ours['ms']:8.2f} ms", end="")
                print(f"  {conv['ratio']:5.2f} of conv2d  torchvision {1 / peer['ratio']:5.1f}x", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"deform_conv2d-{args.device}" + ("-quick" if args.quick else "")
    (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1))
    (args.out / f"{stem}.md").write_text(markdown(result))
    print(f"wrote {args.out / stem}.json and .md")


if __name__ == "__main__":
    main()
