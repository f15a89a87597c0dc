"""Which kernels served an operator last, and what decides it on the CPU."""

import pytest
import torch
from cases import CASES, run
from conftest import BASELINE, PAIRS, PORTABLE, TUNED, V3, V4, cpu_kernels

from dcn_plugin.ops import deform_aggregate2d, deform_conv2d, deform_roi_pool, kernels_used, ms_deform_attn
from dcn_plugin.ops._kernels import latest

CHOOSE = torch.ops.dcn_plugin._choose_cpu_kernels
TUNED_NAMES = (BASELINE, V3, V4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("limit", [PORTABLE, BASELINE, V3, V4, TUNED, PAIRS])
def test_each_direction_of_each_operator_tells_what_served_it(case, limit):
    with cpu_kernels(limit):
        run(case.function, case.make(case.full))
    allowed = {PORTABLE: (PORTABLE,), BASELINE: TUNED_NAMES[:1], V3: TUNED_NAMES[:2]}.get(limit, TUNED_NAMES)
    used = kernels_used("cpu")
    assert used[case.name] in allowed and used[f"{case.name}_backward"] in allowed
    assert kernels_used()[case.name] == used[case.name]


def test_what_the_tuned_path_cannot_index_is_served_by_the_portable_one():
    image = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**30, 1)
    with cpu_kernels(TUNED):
        torch.ops.dcn_plugin.deform_conv2d(
            image, torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1), None, None, [2**30, 1], [0] * 4, [1, 1]
        )
    assert kernels_used("cpu")["deform_conv2d"] == "portable"


def image(*shape: int) -> torch.Tensor:
    """Of any size, in the memory of one value."""
    return torch.zeros(1).expand(shape)


def attend(levels=((2, 2),), heads=1, points=1):
    rows = sum(height * width for height, width in levels)
    ms_deform_attn(image(1, rows, heads, 2), levels, torch.zeros(1, 1, heads, points, 2), points=[points])


# What the tuned path refuses, and what it says of it.
REFUSED = {
    "deform_conv2d": [
        (
            lambda: deform_conv2d(image(1, 1, 2**30, 1), torch.zeros(1, 2, 1, 1), image(1, 1, 1, 1), stride=(2**30, 1)),
            "input: expected fewer than 2^30 rows and columns, with padding",
        )
    ],
    "deform_roi_pool": [
        (
            lambda: deform_roi_pool(image(1, 1, 2**30, 1), torch.zeros(1, 5), output_size=1, sampling_ratio=1),
            "input: expected fewer than 2^30 rows and columns",
        )
    ],
    "ms_deform_attn": [
        (lambda: attend(points=1025), "points: expected at most 1024 together"),
        (lambda: attend(heads=65, points=1024), "points: expected at most 65536 of all heads together"),
        (lambda: attend([(2**15, 2**15)]), "spatial_shapes: expected fewer than 2^30 pixels of a level"),
    ],
    "deform_aggregate2d": [
        (
            lambda: deform_aggregate2d(
                image(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 33**2, 2), kernel_size=33, padding=16
            ),
            "offset: expected at most 1024 taps of a group",
        ),
        (
            lambda: deform_aggregate2d(
                image(1, 2**13, 2**12, 8), torch.zeros(1, 1, 1, 1, 1, 2), kernel_size=1, padding=0, stride=2**13
            ),
            "value: expected images of a group below 2^30 bytes in float64",
        ),
    ],
}


@pytest.mark.parametrize(
    ("operator", "call", "reason"),
    [pytest.param(operator, *case, id=case[-1]) for operator, cases in REFUSED.items() for case in cases],
)
def test_a_reason_is_told_where_the_tuned_path_does_not_serve(operator, call, reason):
    case = next(case for case in CASES if case.name == operator)
    with cpu_kernels(TUNED):
        call()
        assert kernels_used()[operator] == "portable"
        assert kernels_used("cpu", reasons=True)[operator] == f"portable ({reason})"
        run(case.function, case.make(case.full))
        assert kernels_used(reasons=True)[operator].startswith("tuned")
    with cpu_kernels(PORTABLE):
        run(case.function, case.make(case.full))
        assert kernels_used(reasons=True)[operator] == "portable"  # which was chosen


def test_the_last_call_on_any_device_counts():
    cpu, cuda = "a\t5\ttuned baseline\t\nb\t7\tportable\tinput: too large\n", "a\t6\tfused 64x64\t\n"
    assert latest(cpu, cuda) == latest(cuda, cpu) == {"a": "fused 64x64", "b": "portable"}
    assert latest(cpu) == {"a": "tuned baseline", "b": "portable"} and latest() == {}
    assert latest(cpu, cuda, reasons=True) == {"a": "fused 64x64", "b": "portable (input: too large)"}


def test_a_choice_returns_the_one_before():
    before = CHOOSE("portable")
    try:
        assert CHOOSE("tuned baseline") == "portable"
        assert CHOOSE("tuned x86-64-v3") == "tuned baseline"
        assert CHOOSE("tuned") == "tuned x86-64-v3"
        assert CHOOSE("tuned x86-64-v4") == "tuned"
        assert CHOOSE("tuned bfloat16") == "tuned x86-64-v4"
        with pytest.raises(RuntimeError, match="limit: expected 'portable', 'tuned' .*, got 'fast'"):
            CHOOSE("fast")
    finally:
        CHOOSE(before)
