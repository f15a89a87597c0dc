"""Eager code and graphs answer alike, whatever the values; docs/operators.md lists the inputs where they do not."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, CASES, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/operators.md"
each_case = pytest.mark.parametrize("name", BY_NAME)
each_pool = pytest.mark.parametrize("name", [case.name for case in CASES if case.of_regions])

# The first column of the table "Where eager code raises" -> what eager code says, and regions of two images.
RAISING = {
    "a batch index that names no image: below 0, too large, not a whole number, NaN": (
        r"^rois: expected a batch index from 0 to 1, got \[.*\] in row 2$",
        [[-1, 0, 0, 4, 4], [2, 0, 0, 4, 4], [0.5, 0, 0, 4, 4], [math.nan, 0, 0, 4, 4], [1e30, 0, 0, 4, 4]],
    ),
    "a corner that is NaN or infinite": (
        r"^rois: expected finite corners, got \[.*\] in row 2$",
        [[0, math.nan, 0, 4, 4], [0, 0, math.inf, 4, 4], [0, 0, 0, -math.inf, 4], [1, 0, 0, 4, math.nan]],
    ),
}
each_raising = pytest.mark.parametrize(
    ("message", "roi"),
    [pytest.param(message, roi, id=str(roi)) for message, rois in RAISING.values() for roi in rois],
)


class Call(nn.Module):
    def __init__(self, case, arguments):
        super().__init__()
        self.function = case.function
        self.options = {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}

    def forward(self, **tensors):
        return self.function(**tensors, **self.options)


def tensors(arguments):
    return {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}


@functools.cache
def graphs(name):
    """The operator compiled and exported, once, from arguments that are sound: values come later."""
    case = BY_NAME[name]
    arguments = case.make(case.full)
    model = Call(case, arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    return {"compiled": compiled, "exported": torch.export.export(model, (), tensors(arguments)).module()}


def of_graph(name, which):
    def function(**arguments):
        return graphs(name)[which](**tensors(arguments))

    return function


def assert_equal(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


# -- where they do not ------------------------------------------------------------------------------------------------


def test_the_document_lists_these_inputs():
    _, _, section = DOCUMENT.read_text().partition("### Where eager code raises and graphs give NaN")
    table = re.search(r"^\|---.*\n((?:\|.*\n)+)", section, re.M)
    assert [row.split("|")[1].strip() for row in table[1].splitlines()] == list(RAISING)


@each_pool
@each_raising
def test_eager_code_raises_and_graphs_give_nan(name, message, roi):
    case = BY_NAME[name]
    arguments = case.make(case.full)
    sound = run(case.function, arguments)
    arguments["rois"][2] = torch.tensor(roi, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        case.function(**arguments)
    others = [i for i in range(len(arguments["rois"])) if i != 2]
    for which in ("compiled", "exported"):
        result = run(of_graph(name, which), arguments)
        for k in ("out", "grad_offset", "grad_mask"):
            if k in result:
                assert result[k][2].isnan().all(), (which, k)
                assert_equal(result[k][others], sound[k][others], (which, k))
        assert result["grad_input"].isfinite().all(), which


@each_pool
@each_raising
def test_transforms_and_modes_are_eager_code(name, message, roi):
    """What sees every call, such as torch's counter of operations, and what differentiates or maps one."""
    case = BY_NAME[name]
    arguments = case.make(case.full)
    arguments["rois"][2] = torch.tensor(roi, dtype=torch.float64)
    image, rest = arguments["input"], {k: v for k, v in arguments.items() if k != "input"}

    def call(x):
        return case.function(input=x, **rest)

    with pytest.raises(ValueError, match=message), FlopCounterMode(display=False):
        call(image)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda x: call(x).sum())(image)
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(call, (image,), (image,))
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(call)(torch.stack([image, image]))
    # Regions of their own for each sample, in any dimension; nested; the second sample is the bad one.
    sound = case.make(case.full)["rois"]
    options = {k: v for k, v in arguments.items() if k != "rois"}

    def pool(rois):
        return case.function(rois=rois, **options)

    for dim in (0, 1, 2):
        rois = torch.stack([sound, arguments["rois"]], dim)
        with pytest.raises(ValueError, match=message):
            torch.func.vmap(pool, in_dims=dim)(rois)
        torch.func.vmap(pool, in_dims=dim)(torch.stack([sound, sound], dim))
    rois = torch.stack([torch.stack([sound, sound]), torch.stack([sound, arguments["rois"]])])
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(torch.func.vmap(pool), in_dims=1)(rois)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(torch.func.grad(lambda x, r: case.function(**{**options, "input": x, "rois": r}).sum()))(
            torch.stack([image, image]), rois[1]
        )


@each_pool
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_traced_code_gives_nan(name):
    case = BY_NAME[name]
    arguments = case.make(case.full)
    options = {k: v for k, v in arguments.items() if k not in ("input", "rois")}
    traced = torch.jit.trace(
        lambda x, rois: case.function(input=x, rois=rois, **options), (arguments["input"], arguments["rois"])
    )
    arguments["rois"][2, 0] = 7
    assert traced(arguments["input"], arguments["rois"])[2].isnan().all()


# -- where they do ----------------------------------------------------------------------------------------------------


def spoil(arguments, name, value):
    """Two elements of a tensor are that value."""
    spoilt = arguments[name].clone()
    spoilt.view(-1)[:: max(spoilt.numel() // 2, 1)] = value
    return {**arguments, name: spoilt}


def region(arguments, *corners):
    rois = arguments["rois"].clone()
    rois[2, 1:] = torch.tensor(corners, dtype=rois.dtype)
    return {**arguments, "rois": rois}


VALUES = (math.nan, math.inf, -math.inf, 1e30, -1e300)
REGIONS = {
    "inside out": (40, 20, 8, 4), "inside out along y": (8, 20, 40, 4), "without size": (8, 8, 8, 8),
    "far larger than the map": (-1e6, -1e6, 1e6, 1e6), "far away": (1e9, 1e9, 2e9, 2e9),
    "inside out and huge": (1e18, 1e18, -1e18, -1e18), "as large as numbers go": (-1.7e308, 0, 1.7e308, 9),
    "as large, inside out": (1.7e308, 0, -1.7e308, 9),
}  # fmt: skip


def hostile(case):
    """Arguments by what is wrong with them, all of the shapes that the graphs know."""
    arguments = case.make(case.full)
    found = {
        f"{k} {value}": spoil(arguments, k, value)
        for k in tensors(arguments) if k != "rois" for value in VALUES
    }  # fmt: skip
    if "rois" in arguments:
        found |= {what: region(arguments, *corners) for what, corners in REGIONS.items()}
        found["batch index -0.0"] = {**arguments, "rois": arguments["rois"] * torch.tensor([-0.0, 1, 1, 1, 1])}
    return found


@each_case
def test_graphs_give_what_eager_code_gives(name):
    """Values and gradients, bit by bit: whatever else is hostile raises nowhere."""
    case = BY_NAME[name]
    for what, arguments in hostile(case).items():
        expected = run(case.function, arguments)
        for which in ("compiled", "exported"):
            for k, v in run(of_graph(name, which), arguments).items():
                assert_equal(v, expected[k], f"{what}, {which}: {k}")
