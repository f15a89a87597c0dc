"""The fused CUDA kernels of ms_deform_attn, thread block by thread block on the CPU, against the reference."""

import itertools
import random

import emulation
import pytest
import torch
from coverings import pairwise, word
from test_emulated_cuda import FEW, LIMITS, SCHEDULES, used
from test_emulated_cuda import fused as fused  # every test here runs with it

from dcn_plugin import reference
from dcn_plugin.ops._operator import ORDERED, WANTED

LIMITS = {torch.float32: 1e-5, **LIMITS}
NAMES = ("value", "sampling_locations", "attention_weights", "reference_points")
LEVELS = [(6, 8), (3, 4), (1, 2)]


def schedule(name="up", adds_vectors=True):
    emulation.load().set_schedule(*SCHEDULES[name], FEW, adds_vectors)


class Emulated:
    """Arguments of a call, a gradient of its result, and what the reference makes of them in float64."""

    operator: str
    names: tuple[str, ...]  # of the tensors that can be differentiated by, the value first
    grad: torch.Tensor

    def tensors(self):
        return [getattr(self, name) for name in self.names]

    @property
    def everything(self):
        return sum(WANTED[name] for name in self.names)

    def how(self):
        """The compiled operator's options."""
        raise NotImplementedError

    def reference(self, *tensors):
        raise NotImplementedError

    def forward(self):
        return getattr(emulation.load(), self.operator)(*self.tensors(), *self.how())

    def backward(self, wanted=None):
        wanted = self.everything if wanted is None else wanted
        return getattr(emulation.load(), f"{self.operator}_backward")(self.grad, *self.tensors(), *self.how(), wanted)

    def truth(self):
        exact = [None if t is None else t.double().requires_grad_() for t in self.tensors()]
        out = self.reference(*exact)
        found = iter(torch.autograd.grad(out, [t for t in exact if t is not None], self.grad.double()))
        return out.detach(), [None if t is None else next(found) for t in exact]

    def check(self, wanted=None):
        """Compare everything, and return which kernels ran: of the operator, and of its backward."""
        out, gradients = self.truth()
        close(self.forward(), out, self.tensors()[0].dtype)
        for given, name, mine, its in zip(self.tensors(), self.names, self.backward(wanted), gradients, strict=True):
            if its is None:
                assert mine.numel() == 0
            else:
                close(mine, its, given.dtype, name)
        return self.ran()

    def ran(self):
        kernels = used(self.operator)
        return kernels[self.operator], kernels[f"{self.operator}_backward"]


class Problem(Emulated):
    operator, names = "ms_deform_attn", NAMES

    def __init__(
        self, channels=32, heads=3, queries=5, batch=2, levels=LEVELS, points=(4, 4, 4), weights=True, softmax=False,
        reference_points=0, reference_levels=None, spread=0.7, dtype=torch.float32, positions=torch.float32,
    ):  # fmt: skip
        torch.manual_seed(0)
        rows, k = sum(h * w for h, w in levels), sum(points)
        self.levels, self.softmax, self.scale = levels, softmax, 0.5
        self.points = list(points)
        locations = (torch.rand(batch, queries, heads, k, 2) - 0.5) * 2 * spread + 0.5
        self.reference_points = None
        if reference_points:
            locations = (locations - 0.5) * 6
            centres = torch.rand(batch, queries, reference_levels or len(levels), reference_points)
            self.reference_points = (centres * 0.6 + 0.2).to(positions)
        self.value = torch.randn(batch, rows, heads, channels).to(dtype)
        self.sampling_locations = locations.to(positions)
        self.attention_weights = torch.randn(batch, queries, heads, k).to(positions) if weights else None
        self.grad = torch.randn(batch, queries, heads * channels).to(dtype)

    def how(self):
        return [size for level in self.levels for size in level], self.points, self.softmax, self.scale

    def reference(self, value, locations, weights, reference_points):
        shapes, points, softmax, scale = self.how()
        return reference.ms_deform_attn(
            value, shapes, locations, weights,
            points=points, softmax=softmax, reference_points=reference_points, offset_scale=scale,
        )  # fmt: skip


def close(found, truth, dtype, name="out"):
    assert found.dtype == dtype and found.shape == truth.shape and found.is_contiguous()
    limit = LIMITS[dtype] * truth.abs().max()
    error = (found.double() - truth).abs().max()
    assert error <= limit, f"{name} is off by {error:.2g}, {limit:.2g} allowed"


def check_that_no_order_of_threads_matters(problem):
    """Bit by bit, where additions to the value's gradient have an order; where they have none, within rounding."""
    found, added = {}, {}
    for name, adds_vectors in itertools.product(SCHEDULES, (True, False)):
        schedule(name, adds_vectors)
        found[name, adds_vectors] = [problem.forward(), *problem.backward(problem.everything | ORDERED)]
        added[name, adds_vectors] = problem.backward(WANTED["value"])[0]
    for how, results in found.items():
        for mine, its in zip(results, found["up", True], strict=True):
            assert mine.isfinite().all() and torch.equal(mine, its), how
        close(added[how], results[1].double(), problem.tensors()[0].dtype)


def check_what_is_not_finite(problem):
    """What diverged shows where it is read, and nowhere else: as in the reference."""
    out, gradients = problem.truth()
    found = problem.forward()
    assert torch.equal(found.isfinite(), out.isfinite())
    kept = out.isfinite()
    close(found[kept], out[kept], found.dtype)
    for mine, its in zip(problem.backward(), gradients, strict=True):
        if its is None:
            continue
        assert torch.equal(mine.isnan(), its.isnan())
        close(mine[its.isfinite()], its[its.isfinite()], mine.dtype)
    assert problem.ran() == ("fused", "fused")


def check_that_nothing_else_comes(problem, wanted):
    """`wanted` has a bit for each tensor, in their order."""
    bits = [WANTED[name] for name in problem.names]
    chosen = sum(bit for i, bit in enumerate(bits) if wanted >> i & 1)
    for bit, found, whole in zip(bits, problem.backward(chosen), problem.backward(), strict=True):
        assert torch.equal(found, whole) if chosen & bit else found.numel() == 0


FORMS = {
    "as_usual": dict(),
    "channels_8": dict(channels=8, queries=41),
    "channels_16": dict(channels=16),
    "channels_24": dict(channels=24, heads=2),
    "channels_40": dict(channels=40),
    "channels_64": dict(channels=64, heads=1),
    "channels_96": dict(channels=96, heads=2),
    "channels_128": dict(channels=128),
    "more_channels_than_a_warp_holds": dict(channels=272, heads=1),
    "one_point": dict(levels=[(5, 7)], points=(1,)),
    "ragged_points": dict(points=(1, 7, 3)),
    "more_points_than_fit_together": dict(channels=8, points=(9, 30, 2), queries=3),
    "no_weights": dict(weights=False, points=(2, 1, 3)),
    "softmax": dict(softmax=True, points=(3, 4, 5)),
    "softmax_of_many": dict(softmax=True, points=(30, 1, 9), channels=16),
    "references": dict(reference_points=2),
    "shared_references": dict(reference_points=2, reference_levels=1, points=(1, 4, 3)),
    "boxes": dict(reference_points=4, softmax=True, points=(3, 2, 4)),
    "shared_boxes": dict(reference_points=4, reference_levels=1),
    "far": dict(spread=30.0, softmax=True),
    "many_queries": dict(queries=90, heads=2, batch=3, channels=16, points=(2, 2, 2)),
    "one_query": dict(queries=1, heads=1, batch=1),
    "ordered": dict(ordered=True, softmax=True, reference_points=4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype", "positions", "adds_vectors"),
    pairwise(list(FORMS), list(LIMITS), ["float32", "as_values"], [True, False]),
    ids=word,
)
def test_results_and_gradients(form, dtype, positions, adds_vectors):
    schedule("up", adds_vectors)
    how = dict(FORMS[form], dtype=dtype, positions=torch.float32 if positions == "float32" else dtype)
    ordered = how.pop("ordered", False)
    problem = Problem(**how)
    ran = problem.check(problem.everything | (ORDERED if ordered else 0))
    assert ran == ("fused", "fused ordered" if ordered else "fused")


@pytest.mark.parametrize("seed", range(16))
def test_random_calls(seed):
    draw = random.Random(seed)
    levels = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 5))]
    dtype = draw.choice(list(LIMITS))
    weights = draw.random() < 0.8
    schedule(draw.choice(list(SCHEDULES)), draw.random() < 0.5)
    problem = Problem(
        8 * draw.randint(1, 16), draw.randint(1, 9), draw.randint(1, 20), draw.randint(1, 3), levels,
        [draw.randint(1, 9) for _ in levels], weights, weights and draw.random() < 0.5, draw.choice([0, 0, 2, 4]),
        draw.choice([None, 1]), draw.choice([0.3, 0.6, 2.0]), dtype, draw.choice([dtype, torch.float32]),
    )  # fmt: skip
    assert problem.check() == ("fused", "fused")


@pytest.mark.parametrize("channels", [8, 24, 32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_nothing_depends_on_the_order_of_threads(channels, dtype):
    """A barrier that is missing shows: shared memory begins as NaN, and some order of threads reads it too early."""
    problem = Problem(channels, points=(9, 4, 7), softmax=True, dtype=dtype)
    check_that_no_order_of_threads_matters(problem)


@pytest.mark.parametrize("dtype", LIMITS, ids=word)
@pytest.mark.parametrize("softmax", [False, True])
def test_values_that_are_not_finite(dtype, softmax):
    problem = Problem(32, queries=9, heads=2, softmax=softmax, spread=0.45, dtype=dtype)
    locations, weights = problem.sampling_locations, problem.attention_weights
    locations[0, 0, 0, 3, 0] = float("nan")
    locations[0, 1, 1, 7, 1] = float("inf")
    locations[1, 2, 0, 2, 0] = -1e30
    weights[1, 3, 1, 4] = float("nan")
    if softmax:
        weights[1, 4, 0] = float("-inf")
        weights[1, 5, 0, 2] = float("inf")
    problem.value[1, 20, 0, 5] = float("inf")
    problem.value[1, 50, 1, 6] = float("nan")
    check_what_is_not_finite(problem)


def test_corners_without_weight_are_not_read():
    """A point on the middle of a pixel reads that pixel alone, whatever its neighbours hold."""
    problem = Problem(8, 1, 1, 1, [(4, 4)], (1,))
    problem.sampling_locations[:] = torch.tensor([1.5, 2.5]) / 4
    problem.value[:] = float("inf")
    problem.value[:, 2 * 4 + 1] = 3.0
    problem.attention_weights[:] = 2.0
    assert torch.equal(problem.forward(), torch.full((1, 1, 8), 6.0))
    grad = problem.backward(WANTED["value"])[0]
    assert torch.equal(grad[0, 2 * 4 + 1, 0], 2 * problem.grad[0, 0]) and grad.count_nonzero() == 8


@pytest.mark.parametrize("wanted", range(16))
def test_only_what_is_asked_for(wanted):
    check_that_nothing_else_comes(Problem(16, reference_points=2, softmax=True), wanted)


def test_views_of_larger_tensors():
    """Any strides of positions and weights; of values and gradients those that keep vectors whole."""
    problem = Problem(16, heads=3, queries=5, batch=2, dtype=torch.bfloat16)
    n, rows, heads, channels = problem.value.shape
    problem.value = torch.randn(n, heads, 2 * rows, 24).bfloat16()[:, :, ::2, 8:].transpose(1, 2)
    problem.sampling_locations = torch.rand(2, 12, n, 5, heads).permute(2, 3, 4, 1, 0)
    problem.attention_weights = torch.rand(heads, 12, 5, 2 * n).permute(3, 2, 0, 1)[::2]
    assert problem.check() == ("fused", "fused")
    problem.grad = torch.randn(5, 2, heads * channels + 1).bfloat16()[..., 1:].transpose(0, 1)  # copied
    assert problem.check() == ("fused", "fused")
    problem.grad = torch.ones((), dtype=torch.bfloat16).expand(2, 5, heads * channels)
    assert problem.check() == ("fused", "fused")


@pytest.mark.parametrize("case", ["unaligned", "channels_apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=word)
def test_values_whose_channels_are_no_aligned_vectors_are_copied(case, dtype):
    problem = Problem(16, dtype=dtype)
    n, rows, heads, channels = problem.value.shape
    if case == "unaligned":
        problem.value = torch.randn(n, rows, heads, 24).to(dtype)[..., 1:17]
    else:
        problem.value = torch.randn(n, rows, channels, heads).to(dtype).transpose(2, 3)
    assert problem.check() == ("fused", "fused")


def test_the_portable_path_serves_the_rest():
    assert Problem(20, dtype=torch.float16).check() == ("portable", "portable")


def test_double_and_nothing_at_all_are_portable():
    problem = Problem(16)
    out = problem.truth()[0]
    for name in NAMES[:3]:
        setattr(problem, name, getattr(problem, name).double())
    torch.testing.assert_close(problem.forward(), out)
    assert problem.ran()[0] == "portable"
    for empty in (Problem(queries=0), Problem(batch=0)):
        assert empty.forward().numel() == 0 and not empty.backward()[0].any()
        assert empty.ran() == ("portable", "portable")


def test_portable_is_the_default(monkeypatch):
    monkeypatch.delenv("DCN_PLUGIN_CUDA_KERNELS")
    assert Problem().check() == ("portable", "portable")


@pytest.mark.parametrize("channels", [32, 36])
def test_most_samples_in_one_cell(channels):
    """Whose chunks are summed up before its pixels are, when the order is fixed: equal bits every time."""
    problem = Problem(channels, 2, 200, levels=[(5, 7)], points=(4,))
    problem.sampling_locations[:, 3:] = 0.52
    wanted = problem.everything | ORDERED
    assert problem.check(wanted) == ("fused", "fused ordered")
    again = zip(problem.backward(wanted), problem.backward(wanted), strict=True)
    assert all(torch.equal(*pair) for pair in again)
