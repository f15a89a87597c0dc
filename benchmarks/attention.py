"""Multi-scale deformable attention against what transformers falls back to and two packages; a layer and its parts."""

import math
from typing import NamedTuple

import attention_peers as peers
import torch
from attention_layers import PARTS, layer_calls
from gpu import FUSED, Work
from harness import (
    OURS,
    Call,
    Contestant,
    Setting,
    differentiated,
    exact,
    mib,
    peaks,
    require_agreement,
    require_equal,
    times_ours,
)
from torch import Tensor

from dcn_plugin import reference
from dcn_plugin.ops import ms_deform_attn

NAME = "ms_deform_attn"
OPERATORS = (NAME,)
# Nothing here has another layout than that of the field.
LAYOUT = "NSMD"
HALF, ONE = "bfloat16", "one thread"
_COLUMNS = f"""`{peers.FALLBACK} /`, `{peers.COMPILED} /` and
`{peers.EAGER} /` are the times (float32) of transformers' plain PyTorch and of two packages over ours."""
COLUMNS = {
    "cpu": f"""{_COLUMNS}
`{HALF} /` is our time with values and weights in bfloat16 and positions in float32 over that of float32; `{ONE} /` that
of one thread over that of all. Rows of a layer: `ms` is all of it, from a query to its result, `/ parts` that over the
operator with locations and weights made beforehand and the four linear layers; the fallback is transformers' layer.
`MiB` is the peak memory of a call above its arguments and results.""",
    "cuda": f"""{_COLUMNS}
`portable /` is the time of our portable kernels over ours, `MiB` the peak memory of a call above its arguments and
results.""",
}
KERNELS = {OURS: FUSED}
COPIES = 4
CONTESTANTS: dict[str, list[Contestant]] = {
    "cpu": [(name, LAYOUT) for name in (OURS, ONE, HALF, PARTS, *peers.PACKAGES)],
    "cuda": [(name, LAYOUT) for name in (OURS, "portable", *peers.PACKAGES)],
}
# Functions of ours by contestant; the reference is no contestant, and only compared.
OWN = {name: ms_deform_attn for name in (OURS, "portable", HALF)} | {"reference": reference.ms_deform_attn}
TYPES = {HALF: torch.bfloat16, "reference": torch.float32}
# Whose memory is measured, beside ours.
WEIGHED = (peers.FALLBACK, peers.COMPILED)
HEADS, CHANNELS, LEVELS, POINTS = 8, 32, 4, 4
# So many queries are compared with the reference.
CHECKED = 64


class Shape(NamedTuple):
    """Images, height and width of the largest of four maps, queries (0: one for each pixel), and whether of a layer."""

    batch: int
    height: int
    width: int
    queries: int = 0
    layer: bool = False

    def __str__(self) -> str:
        kind = f"decoder, {self.queries} queries" if self.queries else "encoder"
        return f"{'layer, ' * self.layer}{kind}, {self.batch}x{self.height}x{self.width}"

    def levels(self) -> list[tuple[int, int]]:
        return [(-(-self.height // 2**i), -(-self.width // 2**i)) for i in range(LEVELS)]

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Of the operator's arguments, and of a gradient of the result."""
        rows = sum(h * w for h, w in self.levels())
        queries = self.queries or rows
        return {
            "value": (self.batch, rows, HEADS, CHANNELS),
            "locations": (self.batch, queries, HEADS, LEVELS, POINTS, 2),
            "weights": (self.batch, queries, HEADS, LEVELS, POINTS),
            "grad": (self.batch, queries, HEADS * CHANNELS),
        }


ENCODERS = [Shape(1, 100, 152), Shape(1, 50, 76)]
DECODERS = [Shape(1, 100, 152, 300), Shape(8, 50, 76, 300)]
SHAPES = {
    "cpu": [*ENCODERS, *DECODERS, *(shape._replace(layer=True) for shape in (*ENCODERS, DECODERS[0]))],
    "cuda": [Shape(4, 100, 152), Shape(16, 50, 76), Shape(16, 100, 152, 300), Shape(1, 100, 152, 300)],
}
QUICK = {"cpu": [Shape(1, 25, 38), Shape(1, 25, 38, 300)], "cuda": SHAPES["cuda"][1:3]}


def about(setting: Setting) -> str:
    absent = f"; not installed: {', '.join(peers.missing())}" if peers.missing() else ""
    return (
        f"{HEADS} heads of {CHANNELS} channels, {LEVELS} levels of {POINTS} points, from a layer's first offsets and "
        f"N(0, {setting.offset_std:g}^2) pixels{absent}"
    )


def work(shape: Shape, task: str, itemsize: int) -> Work:
    """Positions are float32; no product is counted."""
    numbers = {name: math.prod(size) for name, size in shape.sizes().items()}
    gradients = itemsize * (numbers["value"] + numbers["weights"]) + torch.float32.itemsize * numbers["locations"]
    forward = Work(NAME, traffic=gradients + itemsize * numbers["grad"])
    return forward if task == "forward" else forward.with_backward(gradients)


def first_offsets() -> Tensor:
    """[M, 1, P, 2]: as a new layer has them, point p of head m p + 1 pixels away in the head's direction."""
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None, None] * torch.arange(1, POINTS + 1)[:, None]


def references(shape: Shape) -> Tensor:
    """[N, Q, 1, 2]: the centres of all pixels of all levels, or anywhere."""
    if shape.queries:
        return torch.rand(shape.batch, shape.queries, 1, 2)
    centres = []
    for height, width in shape.levels():
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)[None, :, None].repeat(shape.batch, 1, 1, 1)


def problem(shape: Shape, setting: Setting, through: torch.dtype) -> dict[str, Tensor]:
    """The operator's arguments, and a gradient of its result; positions are float32 whatever the type of the run."""
    torch.manual_seed(0)
    sizes, (width, height) = shape.sizes(), torch.tensor(shape.levels()).float().flip(1).unbind(1)
    size = torch.stack([width, height], -1)[:, None]
    offsets = first_offsets() + setting.offset_std * torch.randn(sizes["locations"])
    pixels = references(shape)[:, :, :, None, None] * size - 0.5 + offsets
    # Not at whole pixels, where the derivative is one-sided and rounding, which differs, chooses the side.
    pixels = pixels.floor() + 0.05 + 0.9 * pixels.frac().remainder(1)
    weights = torch.randn(sizes["weights"]).flatten(3).softmax(-1).view(sizes["weights"])
    values = {"value": torch.randn(sizes["value"]), "weights": weights, "grad": torch.randn(sizes["grad"])}
    values = {name: value.to(through).to(setting.dtype) for name, value in values.items()}
    return {name: t.to(setting.device) for name, t in {**values, "locations": (pixels + 0.5) / size}.items()}


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    """The calls of a contestant; none where it is not installed, or does not take part."""
    if name == ONE:
        calls = make(shape, setting, OURS, layout) if torch.get_num_threads() > 1 else {}
        return {task: alone(call) for task, call in calls.items()}
    torch.manual_seed(0)
    if shape.layer:
        return layer_calls(name, references(shape), shape.levels(), HEADS, CHANNELS, POINTS, setting.offset_std)
    operator = peers.operator(name) if name in peers.PACKAGES else OWN.get(name)
    if operator is None or (name == HALF and setting.dtype == torch.bfloat16):
        return {}
    dtype = TYPES.get(name, setting.dtype if name in OWN else torch.float32)
    t = problem(shape, setting._replace(dtype=dtype), torch.bfloat16 if name == HALF else setting.dtype)
    if name == "reference":
        t |= {of: t[of][:, :CHECKED] for of in ("locations", "weights", "grad")}
    arguments = [t[of].requires_grad_() for of in ("value", "locations", "weights")]
    value, locations, weights = arguments
    levels = shape.levels()
    return differentiated(lambda: operator(value, levels, locations, weights), arguments, t["grad"])


def alone(call: Call) -> Call:
    """The call on one thread, of a process that has several."""
    threads = torch.get_num_threads()

    def on_one() -> list[Tensor]:
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return on_one


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    ours = (OURS, LAYOUT)
    limit = 2e-5 if exact(setting) else 3e-2
    if shape.layer:
        # Where rounding moves a sample over a pixel, a gradient is that of the other side: results alone are compared.
        made = {key: {"forward": calls["forward"]} for key, calls in made.items()}
    require_agreement(shape, made, (ONE, "portable", *peers.PACKAGES), ours, limit)
    require_agreement(shape, made, (HALF,), ours, 3e-2)
    for name, out in ((PARTS, slice(None)), ("reference", slice(CHECKED))):
        calls = made.get((name, LAYOUT)) or ({} if shape.layer else make(shape, setting, name, LAYOUT))
        if calls:
            theirs = calls["forward"]()[:1]
            require_equal(f"{shape}: {name}", [made[ours]["forward"]()[0][:, out]], theirs, limit)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    few = shape._replace(height=8, width=8, queries=min(shape.queries, 8))
    there = [name for name in WEIGHED if peers.operator(name) and not (shape.layer and name == peers.COMPILED)]
    contestants = [(name, LAYOUT) for name in (OURS, *there)]
    return {"memory": peaks(__name__, few, shape, setting, contestants, task)}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours = row[OURS][LAYOUT]
    others = {f"{name} /": times_ours(row, name) for name in peers.PACKAGES}
    if "gpu" in row:
        others["portable /"] = times_ours(row, "portable")
    else:
        others[f"{HALF} /"] = f"{1 / row[HALF][LAYOUT]['ratio']:.2f}" if HALF in row else "-"
        others["/ parts"] = f"{row[PARTS][LAYOUT]['ratio']:.2f}" if PARTS in row else "-"
        others[f"{ONE} /"] = times_ours(row, ONE)
    return {
        "ms": f"{ours['ms']:.2f}",
        **others,
        "spread": f"{ours['spread']:.0%}",
        "MiB": mib(row, OURS),
        **{f"{name} MiB": mib(row, name) for name in WEIGHED},
    }
