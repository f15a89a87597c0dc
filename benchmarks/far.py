"""deform_conv2d with far offsets against itself with near ones."""

import conv
from harness import LAYOUTS, OURS, Call, Contestant, Setting, exact, require_equal

NAME = "far_offsets"
COLUMNS = {
    "cpu": """`s = 8 /` and its like are the time with offsets of that
standard deviation over the time with `--offset-std`."""
}
FAR = {f"s = {s}": float(s) for s in (8, 16, 32)}
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(name, layout) for name in (OURS, *FAR) for layout in LAYOUTS]}
SHAPES = {"cpu": [conv.Shape(2, 64, 112, 112), conv.Shape(1, 256, 100, 100)]}
QUICK = SHAPES


def about(setting: Setting) -> str:
    return "our deform_conv2d; " + conv.about(setting)


def spread(setting: Setting, name: str) -> Setting:
    return setting._replace(offset_std=FAR.get(name, setting.offset_std))


def make(shape: conv.Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    return conv.make(shape, spread(setting, name), OURS, layout)


def verify(shape: conv.Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    for name in (OURS, *FAR):
        truth = conv.make(shape, spread(setting, name), *conv.TORCHVISION, through=setting.dtype)
        for layout in LAYOUTS:
            for task, call in truth.items():
                what = f"{shape}: {name} {layout}, {task}"
                require_equal(what, made[name, layout][task](), call(), 1e-5 if exact(setting) else 3e-2)


def extras(*_: object) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    here = {name: row[name][row["layout"]] for name in (OURS, *FAR)}
    return {
        "ms": f"{here[OURS]['ms']:.2f}",
        **{f"{name} /": f"{1 / here[name]['ratio']:.2f}" for name in FAR},
        "spread": f"{here[OURS]['spread']:.0%}",
    }
