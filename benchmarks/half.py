"""deform_conv2d in half types against itself in float32."""

import conv
import torch
from harness import LAYOUTS, OURS, Call, Contestant, Setting, require_agreement

NAME = "half_types"
# On a GPU all families run in half types, and --dtype chooses another.
COLUMNS = {
    "cpu": """`bfloat16 /` and `float16 /` are the time in that type (all
arguments in it) over the time in float32."""
}
TYPES = {OURS: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(name, layout) for name in TYPES for layout in LAYOUTS]}
SHAPES = {"cpu": [conv.Shape(2, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))]}
QUICK = {"cpu": SHAPES["cpu"][::2]}


def about(setting: Setting) -> str:
    return "our deform_conv2d; " + conv.about(setting)


def make(shape: conv.Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    return conv.make(shape, setting._replace(dtype=TYPES[name]), OURS, layout, through=torch.bfloat16)


def verify(shape: conv.Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    require_agreement(shape, made, ("bfloat16", "float16"), (OURS, "NCHW"), 3e-2)


def extras(*_: object) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = {name: row[name][row["layout"]] for name in TYPES}
    return {
        "float32 ms": f"{here[OURS]['ms']:.2f}",
        **{f"{name} /": f"{1 / here[name]['ratio']:.2f}" for name in TYPES if name != OURS},
        "spread": f"{here[OURS]['spread']:.0%}",
    }
