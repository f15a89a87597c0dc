"""Time the operators, and models with them, against their peers, interleaved in one process.

    python benchmarks/run.py              # CPU, one thread and all threads
    python benchmarks/run.py --quick      # two shapes of each family, one thread, under a minute
    python benchmarks/run.py --family deform_conv2d --shape "offset groups" --threads 1
    python benchmarks/run.py --dtype bfloat16 --offset-std 2
    python benchmarks/run.py --family deform_conv2d --threads 1 --instructions avx2
    python benchmarks/run.py --device cuda

Families: deform_conv2d (against conv2d, torchvision and, where it is installed, onnxruntime), half_types (bfloat16 and
float16 against float32, on the CPU), far_offsets (deform_conv2d against itself with near ones, on the CPU), roi_pool
(against torchvision), ms_deform_attn (against what transformers falls back to, torch-ms-deform-attn and deformops,
where they are installed), deform_aggregate2d (against a depthwise convolution, deform_conv2d and a plain fallback),
spatial_transformer (against torch's affine_grid and grid_sample, on the CPU), programs (blocks that call torchvision's
operator, before and after `accelerate()`, on the CPU), models (resnet50_dcn against resnet50, and against itself on
torchvision's operator; needs timm), backbones (InternImage, FlashInternImage and DAT, the tiny ones against a plain
fallback, convnext_tiny and resnet50_dcn, on the CPU; needs timm) and detectors (transformers' models, before and after
`accelerate(model)`, on the CPU; needs transformers). `pip install '.[benchmark]'` brings the peers, but for the two
that docs/performance.md tells.

Results are compared before anything is timed. Rounds alternate between the contestants, so that a noisy machine
disturbs them alike; slow ones have fewer rounds, at least three. A time is the median over rounds, a ratio the median
of the rounds' ratios, the spread the distance of the quartiles over the median. With one thread, CPU time of the thread
is counted. A GPU is timed by its own clock, and compared with a copy and a matrix product. Prints as it goes; writes
JSON (everything) and Markdown (the table) to benchmarks/results/, or to --out, after each shape. A shape that fails is
left out, and the end tells: the exit status is 1, or 70 if the GPU does not work for the process any more.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import aggregation
import attention
import conv
import far
import gpu
import half
import programs
import roi
import spatial
import torch
from harness import OURS, Setting, describe, rows_for

FAMILIES = {module.NAME: module for module in (conv, half, far, roi, attention, aggregation, spatial, programs)}
# Families of whole models -> the package they come from.
NEEDS = {"models": "timm", "backbones": "timm", "detectors": "transformers"}
FAMILIES |= {name: importlib.import_module(name) for name, package in NEEDS.items() if find_spec(package)}
# Those that are in types of their own, or in float32 whatever the types of the others.
OWN_TYPES = ("half_types", "programs", "detectors")
# Operators that no family times (its OPERATORS) -> why.
NOT_TIMED = {"ps_roi_pool": "torchvision's rounds otherwise, so results could not be compared before they are timed"}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# Results of runs with other options than these go to files of their own, beside the full table.
SAME_TABLE = ("family", "device", "rounds")
BROKEN_DEVICE = 70


def columns(family: ModuleType, row: dict) -> dict[str, str]:
    """The cells of a row after shape, layout and task."""
    found = family.figures(row)
    return {**found, **gpu.figures(row, row[OURS][row["layout"]]["ms"])} if "gpu" in row else found


def markdown(result: dict, family: ModuleType) -> str:
    about, tops = dict(result["about"]), result.get("ceilings")
    device, day = about.pop("device"), about.pop("date")
    if tops:
        machine = f"{about.pop('multiprocessors')} multiprocessors, {about.pop('memory')}"
    else:
        machine = f"{about.pop('cores')} cores, {about.pop('instructions')}"
    versions = ", ".join(f"{package} {version}" for package, version in about.items())
    lines = [
        f"# {family.NAME} on {device}",
        "",
        f"`{result['command']}`, {day}; {machine}; {versions}.",
        f"{result['dtype']}; {result['what']}.",
        "",
        f"Milliseconds are medians over alternating rounds; {family.COLUMNS['cuda' if tops else 'cpu']}",
        "`spread` is the distance of the quartiles of our time over its median.",
    ]
    if tops:
        lines += [
            gpu.COLUMNS,
            "",
            f"Ceilings: a copy moves {tops['gb_s']:.0f} GB/s (read and written), a bfloat16 product of matrices of "
            f"side 8192 does {tops['tflop_s']:.0f} TFLOP/s.",
        ]
    for threads, rows in result["rows"].items():
        head = ["shape", "layout", "task", *columns(family, rows[0])]
        lines += ["", f"## {threads}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in rows:
            cells = [row["shape"], row["layout"], row["task"], *columns(family, row).values()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The options that were given, but for where the results go, with their values."""
    found = {name: value for name, value in vars(args).items() if name != "out" and value != parser.get_default(name)}
    values = {name: [] if v is True else v if isinstance(v, list) else [v] for name, v in found.items()}
    return {name.replace("_", "-"): [str(v) for v in of] for name, of in values.items()}


def run(
    family: ModuleType,
    shapes: list,
    args: argparse.Namespace,
    setting: Setting,
    line: str,
    counts: list[int],
    path: Path,
) -> int:
    """Measure a family, writing what there is after each shape; return the exit status that this asks for."""
    result = {
        "about": describe(args.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "command": line,
        "what": family.about(setting),
        **({"ceilings": gpu.ceilings()} if args.device == "cuda" else {}),
        "rows": {},
    }
    print(f"{family.NAME}: {result['what']}", flush=True)
    status = 0
    for count in counts:
        torch.set_num_threads(count)
        title = "GPU" if args.device == "cuda" else f"{count} thread{'s' * (count > 1)}"
        for shape in shapes:
            try:
                found = rows_for(family, shape, setting)
            except (SystemExit, RuntimeError) as error:
                traceback.print_exc()
                print(f"left out: {shape}: {error}", flush=True)
                found, status = [], 1
            if args.device == "cuda" and not gpu.is_alive():
                status = BROKEN_DEVICE
                break
            if not found:
                continue
            result["rows"].setdefault(title, []).extend(found)
            for row in found:
                shown = "  ".join(f"{name} {value}" for name, value in columns(family, row).items())
                print(f"{title:10} {row['shape']:46} {row['layout']:14} {row['task']:17} {shown}", flush=True)
            path.with_name(path.name + ".json").write_text(json.dumps(result, indent=1))
            path.with_name(path.name + ".md").write_text(markdown(result, family))
    if result["rows"]:
        print(f"wrote {path}.json and .md")
    return status


def main() -> int:
    absent = {name: f"{package} is not installed" for name, package in NEEDS.items() if name not in FAMILIES}
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Not timed: " + "; ".join(f"{name} ({reason})" for name, reason in (NOT_TIMED | absent).items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=FAMILIES, help="one family (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of our operators and conv2d (default: cpu float32, cuda bfloat16)"
    )
    parser.add_argument("--offset-std", type=float, default=1.0, help="standard deviation of the offsets in pixels")
    parser.add_argument(
        "--instructions",
        choices=["avx2"],
        help="what our operators and torch may use at most (onnxruntime does not ask)",
    )
    parser.add_argument(
        "--kernels",
        choices=[gpu.PORTABLE, gpu.FUSED],
        default=gpu.FUSED,
        help="ours on cuda (default: fused where they exist)",
    )
    parser.add_argument("--shape", default="", help="only shapes with this text in their name")
    parser.add_argument("--quick", action="store_true", help="two shapes of each family, one thread, under a minute")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many rounds")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU thread counts (default: 1 and all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and Markdown"
    )
    args = parser.parse_args()
    if args.instructions:
        limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
        if not limits.items() <= os.environ.items():
            # Libraries look at these when they are loaded.
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **limits})
        torch.ops.dcn_plugin._choose_cpu_kernels("tuned x86-64-v3")
    cuda = args.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
        # Float32 is float32 for all.
        torch.backends.cudnn.allow_tf32 = False
    dtype = DTYPES[args.dtype or ("bfloat16" if cuda else "float32")]
    setting = Setting(args.device, dtype, args.offset_std, args.rounds, 0.2 if args.quick else 1.5, args.kernels)
    counts = args.threads or sorted({1} if cuda or args.quick else {1, torch.get_num_threads()})
    options = given(args, parser)
    line = shlex.join(["python", "benchmarks/run.py", *(w for k, of in options.items() for w in ("--" + k, *of))])
    special = [re.sub(r"[^\w.]+", "-", w) for k, of in options.items() if k not in SAME_TABLE for w in (k, *of)]
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name, family in FAMILIES.items():
        if args.family not in (None, name) or (name in OWN_TYPES and args.dtype and not args.family):
            continue
        listed = (family.QUICK if args.quick else family.SHAPES).get(args.device, [])
        shapes = [shape for shape in listed if args.shape in str(shape)]
        if shapes:
            path = args.out / "-".join([name, args.device, *special])
            status = max(status, run(family, shapes, args, setting, line, counts, path))
        if status == BROKEN_DEVICE:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
