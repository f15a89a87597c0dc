"""deform_conv2d in half types against itself in float32, and against the plain convolution of the same type."""

import conv
import torch
from harness import LAYOUTS, OURS, Call, Contestant, Setting, best, require_agreement

NAME = "half_types"
# On a GPU all families run in half types, and --dtype chooses another.
COLUMNS = {
    "cpu": """`bfloat16 /` and `float16 /` are the time in that type (all
arguments in it) over the time in float32, `pairs /` that of products of pairs of bfloat16, whether or not the processor
takes them by itself; `/ conv2d bfloat16` is our time in bfloat16 over that of the plain convolution in it, in the
faster of the two layouts."""
}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PAIRS, CONV2D = "pairs", "conv2d bfloat16"  # torch's convolution of float16 trains a hundred times slower than this one
TYPES = {OURS: torch.float32, **HALVES, PAIRS: torch.bfloat16, CONV2D: torch.bfloat16}
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(name, layout) for name in TYPES for layout in LAYOUTS]}
SHAPES = {"cpu": [conv.Shape(8, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))]}
QUICK = {"cpu": SHAPES["cpu"][::2]}


def about(setting: Setting) -> str:
    return "our deform_conv2d; " + conv.about(setting)


def make(shape: conv.Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    peer = "conv2d" if name == CONV2D else OURS
    calls = conv.make(shape, setting._replace(dtype=TYPES[name]), peer, layout, through=torch.bfloat16)
    return {task: with_pairs(call) for task, call in calls.items()} if name == PAIRS else calls


def with_pairs(call: Call) -> Call:
    choose = torch.ops.dcn_plugin._choose_cpu_kernels

    def chosen() -> list[torch.Tensor]:
        before = choose("tuned bfloat16")
        try:
            return call()
        finally:
            choose(before)

    return chosen


def verify(shape: conv.Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    require_agreement(shape, made, (*HALVES, PAIRS), (OURS, "NCHW"), 3e-2)


def extras(*_: object) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = {name: row[name][row["layout"]] for name in TYPES}
    return {
        "float32 ms": f"{here[OURS]['ms']:.2f}",
        **{f"{name} /": f"{1 / here[name]['ratio']:.2f}" for name in (*HALVES, PAIRS)},
        f"/ {CONV2D}": f"{best(row, CONV2D)['ratio'] / here['bfloat16']['ratio']:.2f}",
        "spread": f"{here[OURS]['spread']:.0%}",
    }
