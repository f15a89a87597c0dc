"""The fused CUDA kernels of deform_aggregate2d, thread block by thread block on the CPU, against the reference."""

import random

import emulation
import pytest
import torch
from cases import BY_NAME, convert, deform_aggregate2d_arguments
from coverings import pairwise, word
from test_emulated_attention import (
    LIMITS,
    Emulated,
    check_that_no_order_of_threads_matters,
    check_that_nothing_else_comes,
    check_what_is_not_finite,
    close,
    schedule,
)
from test_emulated_cuda import SCHEDULES
from test_emulated_cuda import fused as fused  # every test here runs with it

from dcn_plugin import reference
from dcn_plugin.ops._operator import ORDERED, WANTED

CASE = BY_NAME["deform_aggregate2d"]


class Problem(Emulated):
    operator, names = "deform_aggregate2d", ("value", "offset", "weight")

    def __init__(self, make, dtype=torch.float32, positions=torch.float32):
        torch.manual_seed(0)
        made = make()
        arguments = convert(made, dtype=dtype)
        self.value = arguments["value"]
        self.offset = made["offset"].to(positions)
        self.weight = made["weight"].to(positions) if "weight" in made else None
        self.options = list(CASE.to_op(**arguments).values())[3:]
        self.grad = torch.randn(self.forward().shape).to(dtype)

    def how(self):
        return self.options

    def reference(self, *tensors):
        names = [a.name for a in CASE.op._schema.arguments[3:]]
        return reference.deform_aggregate2d(*tensors, **dict(zip(names, self.options, strict=True)))


def of(channels=16, groups=3, size=(6, 7), batch=2, **how):
    """Arguments with so many channels in each group."""
    return deform_aggregate2d_arguments((batch, *size, groups * channels), groups, **how)


FORMS = {
    "as_usual": of(),
    "dcnv3": of(softmax=True, official_order=True, groups=4),
    "dcnv4": of(packed=True, official_order=True, groups=4),
    "dcnv4_without_centre": of(packed=True, official_order=True, remove_center=True, groups=2),
    "packed_softmax": of(packed=True, softmax=True, groups=5),
    "without_centre": of(remove_center=True),
    "no_weights": of(weight=False),
    "channels_8": of(8, groups=7),
    "channels_24": of(24, groups=2),
    "channels_40": of(40),
    "channels_64": of(64, groups=1),
    "channels_96": of(96, groups=2, packed=True),
    "channels_128": of(128, groups=2),
    "more_channels_than_a_warp_holds": of(272, groups=1, size=(3, 4)),
    "pointwise": of(kernel=(1, 1), padding=0),
    "rows": of(kernel=(2, 4), stride=(2, 1), padding=(1, 2), dilation=(3, 2), size=(8, 9)),
    "columns": of(kernel=(5, 1), padding=(2, 0), official_order=True),
    "rectangular": of(kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), official_order=True, size=(8, 9)),
    "four_sided": of(padding=(0, 1, 2, 3)),
    "scaled": of(offset_scale=0.5, dilation=2, padding=2),
    "stretched": of(kernel=(5, 5), padding=2, offset_scale=2.0, softmax=True, groups=2),
    "more_taps_than_fit_together": of(8, kernel=(9, 7), padding=(4, 3), groups=2, size=(4, 5), softmax=True),
    "larger_than_value": of(kernel=(5, 5), padding=3, size=(2, 3)),
    "one_pixel": of(size=(1, 1), groups=1, batch=1),
    "many_pixels": of(size=(19, 17), batch=3, groups=2, packed=True, softmax=True),
    "far": of(spread=20.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype", "positions", "adds_vectors", "ordered"),
    pairwise(list(FORMS), list(LIMITS), ["float32", "as_values"], [True, False], [False, True]),
    ids=word,
)
def test_results_and_gradients(form, dtype, positions, adds_vectors, ordered):
    schedule("up", adds_vectors)
    problem = Problem(FORMS[form], dtype, torch.float32 if positions == "float32" else dtype)
    ran = problem.check(problem.everything | (ORDERED if ordered else 0))
    assert ran == ("fused", "fused ordered" if ordered else "fused")


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(seed):
    """Sizes that nobody chose: kernels, strides, paddings, scales and orders at random."""
    draw = random.Random(seed)
    schedule(draw.choice(list(SCHEDULES)), draw.random() < 0.5)
    without, dtype = draw.random() < 0.3, draw.choice(list(LIMITS))
    kernel = (draw.choice([3, 5]),) * 2 if without else (draw.randint(1, 5), draw.randint(1, 5))
    packed, weight = draw.random() < 0.5, draw.random() < 0.8
    make = of(
        8 * draw.randint(1, 10), draw.randint(1, 9), (draw.randint(1, 9), draw.randint(1, 9)), draw.randint(1, 3),
        kernel=kernel, stride=(draw.randint(1, 3), draw.randint(1, 3)),
        padding=tuple(4 + draw.randint(0, 3) for _ in range(4)), dilation=(draw.randint(1, 2), draw.randint(1, 2)),
        offset_scale=draw.choice([0.5, 1.0, 2.0]), remove_center=without, packed=packed, weight=weight,
        softmax=(packed or weight) and draw.random() < 0.5, official_order=draw.random() < 0.5,
        spread=draw.choice([0.5, 1.5, 8.0]),
    )  # fmt: skip
    assert Problem(make, dtype, draw.choice([dtype, torch.float32])).check() == ("fused", "fused")


@pytest.mark.parametrize("channels", [8, 24, 32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_nothing_depends_on_the_order_of_threads(channels, dtype):
    """A barrier that is missing shows: shared memory begins as NaN, and some order of threads reads it too early."""
    make = of(channels, size=(4, 3), kernel=(5, 4), padding=2, softmax=True, packed=channels == 24)
    check_that_no_order_of_threads_matters(Problem(make, dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=word)
@pytest.mark.parametrize("softmax", [False, True])
def test_values_that_are_not_finite(dtype, softmax):
    problem = Problem(of(32, groups=2, softmax=softmax, spread=0.45), dtype)
    offset, weight = problem.offset, problem.weight
    offset[0, 0, 0, 0, 3, 0] = float("nan")
    offset[0, 1, 2, 1, 7, 1] = float("inf")
    offset[1, 2, 3, 0, 2, 0] = -1e30
    weight[1, 3, 2, 1, 4] = float("nan")
    if softmax:
        weight[1, 4, 1, 0] = float("-inf")
        weight[1, 2, 4, 0, 2] = float("inf")
    problem.value[1, 2, 3, 5] = float("inf")
    problem.value[1, 5, 1, 38] = float("nan")
    check_what_is_not_finite(problem)


def test_corners_without_weight_are_not_read():
    """A tap on the middle of a pixel reads that pixel alone, whatever its neighbours hold."""
    problem = Problem(of(8, 1, (4, 4), 1, kernel=(1, 1), padding=0))
    problem.offset[:] = 1e9
    problem.offset[0, 0, 0] = torch.tensor([2.0, 1.0])
    problem.value[:] = float("inf")
    problem.value[0, 2, 1] = 3.0
    problem.weight[:] = 2.0
    out = problem.forward()
    assert torch.equal(out[0, 0, 0], torch.full((8,), 6.0)) and out.count_nonzero() == 8
    grad = problem.backward(WANTED["value"])[0]
    assert torch.equal(grad[0, 2, 1], 2 * problem.grad[0, 0, 0]) and grad.count_nonzero() == 8


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_only_what_is_asked_for(wanted, packed):
    check_that_nothing_else_comes(Problem(of(packed=packed, softmax=True)), wanted)


def test_views_of_larger_tensors():
    """Any strides of offsets and weights; of values and gradients those that keep vectors whole."""
    problem = Problem(of(), torch.bfloat16)
    n, height, width, channels = problem.value.shape
    problem.value = torch.randn(height, width, 2 * n, channels + 16).bfloat16()[:, :, ::2, 8:-8].permute(2, 0, 1, 3)
    problem.offset = torch.randn(2, 9, n, height * width, 3).permute(2, 3, 4, 1, 0).unflatten(1, (height, width))
    problem.weight = torch.randn(3, 9, height * width, 2 * n).permute(3, 2, 0, 1)[::2].unflatten(1, (height, width))
    assert problem.check() == ("fused", "fused")
    problem.value = problem.value.new_zeros(n, height, width + 2, channels)[:, :, 1:-1].normal_()  # a part: copied
    assert problem.check() == ("fused", "fused")
    problem.grad = torch.randn(n, height, width, channels + 1).bfloat16()[..., 1:]  # copied, too
    assert problem.check() == ("fused", "fused")
    problem.grad = torch.ones((), dtype=torch.bfloat16).expand(n, height, width, channels)
    assert problem.check() == ("fused", "fused")


@pytest.mark.parametrize("case", ["unaligned", "channels_apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=word)
def test_values_whose_channels_are_no_aligned_vectors_are_copied(case, dtype):
    problem = Problem(of(strided=case == "channels_apart"), dtype)
    if case == "unaligned":
        problem.value = torch.randn(*problem.value.shape[:3], 56).to(dtype)[..., 1:49]
    assert problem.check() == ("fused", "fused")


def test_the_portable_path_serves_the_rest():
    assert Problem(of(20), torch.float16).check() == ("portable", "portable")


def test_a_grid_that_32_bits_do_not_count_is_portable():
    problem = Problem(of(kernel=(1, 1), padding=0))
    problem.options[1] = [1, (1 << 30) - 1]  # one column of the result
    problem.offset, problem.weight, problem.grad = (t[:, :, :1] for t in (problem.offset, problem.weight, problem.grad))
    assert problem.check() == ("fused", "fused")
    problem.options[2] = [0, 0, 0, 1 << 30]  # a second one
    two = (torch.cat([t, t], 2) for t in (problem.offset, problem.weight, problem.grad))
    problem.offset, problem.weight, problem.grad = two
    assert problem.check() == ("portable", "portable")


def test_double_and_nothing_at_all_are_portable():
    problem = Problem(of())
    out = problem.truth()[0]
    for name in problem.names:
        setattr(problem, name, getattr(problem, name).double())
    torch.testing.assert_close(problem.forward(), out)
    assert problem.ran()[0] == "portable"
    empty = Problem(of(batch=0))
    assert empty.forward().numel() == 0 and not empty.backward()[0].any()
    assert empty.ran() == ("portable", "portable")


def test_portable_is_the_default(monkeypatch):
    monkeypatch.delenv("DCN_PLUGIN_CUDA_KERNELS")
    assert Problem(of()).check() == ("portable", "portable")


@pytest.mark.parametrize("dtype", LIMITS, ids=word)
@pytest.mark.parametrize("config", CASE.configs)
def test_cases_of_all_devices(config, dtype):
    """The table that CPU and CUDA share: whatever the call, a kernel that is right serves it."""
    rounded = CASE.make(config, dtype)
    truth = CASE.reference(**convert(rounded, dtype=torch.float64))
    close(emulation.load().deform_aggregate2d(*CASE.to_op(**rounded).values()), truth, dtype)
