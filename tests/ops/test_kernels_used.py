"""Which kernels served an operator last, and what decides it on the CPU."""

import pytest
import torch
from cases import CASES, run
from conftest import BASELINE, PORTABLE, TUNED, V3, cpu_kernels

from dcn_plugin.ops import kernels_used
from dcn_plugin.ops._kernels import latest

CHOOSE = torch.ops.dcn_plugin._choose_cpu_kernels
TUNED_NAMES = ("tuned baseline", "tuned x86-64-v3", "tuned x86-64-v4")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("limit", [PORTABLE, BASELINE, V3, TUNED])
def test_each_direction_of_each_operator_tells_what_served_it(case, limit):
    with cpu_kernels(limit):
        run(case.function, case.make(case.full))
    allowed = {PORTABLE: (PORTABLE,), BASELINE: TUNED_NAMES[:1], V3: TUNED_NAMES[:2], TUNED: TUNED_NAMES}[limit]
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


def test_the_last_call_on_any_device_counts():
    cpu, cuda = "a\t5\ttuned baseline\nb\t7\tportable\n", "a\t6\tfused 64x64\n"
    assert latest(cpu, cuda) == latest(cuda, cpu) == {"a": "fused 64x64", "b": "portable"}
    assert latest(cpu) == {"a": "tuned baseline", "b": "portable"} and latest() == {}


def test_a_choice_returns_the_one_before():
    before = CHOOSE("portable")
    try:
        assert CHOOSE("tuned baseline") == "portable"
        assert CHOOSE("tuned x86-64-v3") == "tuned baseline"
        assert CHOOSE("tuned") == "tuned x86-64-v3"
        assert CHOOSE("tuned x86-64-v4") == "tuned x86-64-v4"
        with pytest.raises(RuntimeError, match="limit: expected 'portable', 'tuned' .*, got 'fast'"):
            CHOOSE("fast")
    finally:
        CHOOSE(before)
