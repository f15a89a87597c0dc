"""The default CUDA path of deform_conv2d on the CPU, as CUDA runs it: half operands, shared sums, small ranges.

What test_deform_conv2d*.py run on the CPU is the same source with float operands and one lane for each sum.
"""

import itertools

import emulation
import pytest
import torch
from cases import TOLERANCE
from coverings import pairwise, word
from test_emulated_cuda import FORMATS, LIMITS, Problem, used

from dcn_plugin import reference

PORTABLE = {"deform_conv2d": "portable", "deform_conv2d_backward": "portable"}
TYPES = {torch.float64: 1e-12, torch.float32: TOLERANCE[torch.float32], **LIMITS}
COLUMN_BYTES = 40 << 10  # so few that small problems have several ranges
# The most that numbers of elements may be: those that need more are of 64 bits.
INDICES = {"32_bits": 2**31 - 1, "64_bits": 0}

FORMS = {
    "one_vector": dict(shape=(2, 8, 6, 5), out=16),
    "many_vectors": dict(shape=(1, 136, 7, 6), out=24),
    "lanes_share_sums": dict(shape=(2, 64, 6, 7), out=16, offset_groups=2),
    "a_lane_more_than_others": dict(shape=(1, 72, 5, 5), out=8),
    "channels_of_odd_number": dict(shape=(2, 21, 6, 5), out=10, offset_groups=3),
    "one_channel": dict(shape=(3, 1, 9, 8), out=4),
    "one_output": dict(shape=(2, 16, 9, 8), out=1),
    "one_pixel": dict(shape=(3, 8, 3, 3), out=8, padding=(0, 0, 0, 0)),
    "groups": dict(shape=(2, 32, 9, 7), out=16, groups=4),
    "groups_across_offset_groups": dict(shape=(1, 48, 9, 7), out=32, groups=2, offset_groups=3),
    "offset_groups_across_groups": dict(shape=(1, 48, 6, 7), out=33, groups=3, offset_groups=2),
    "depthwise": dict(shape=(2, 16, 9, 7), out=16, groups=16),
    "depthwise_in_lanes": dict(shape=(1, 72, 9, 8), out=72, groups=72, offset_groups=3),
    "depthwise_of_odd_number": dict(shape=(2, 21, 9, 7), out=21, groups=21, offset_groups=3, bias=False),
    "depthwise_v1": dict(shape=(2, 24, 13, 11), out=24, groups=24, stride=2, padding=(0, 1, 2, 3), mask=False),
    "ranges_of_images": dict(shape=(9, 16, 10, 10), out=8),
    "ranges_within_images": dict(shape=(2, 64, 15, 13), out=8),
    "strided": dict(shape=(2, 24, 23, 21), out=16, stride=4, padding=(0, 1, 2, 3), dilation=2),
    "four_sided": dict(shape=(2, 8, 7, 9), out=8, padding=(0, 3, 1, 2)),
    "v1": dict(shape=(1, 24, 9, 9), out=32, mask=False, bias=False),
    "far": dict(shape=(1, 16, 9, 7), out=16, spread=20.0),
    "half_offsets": dict(shape=(1, 16, 9, 7), out=16, spread=0.5, offset_dtype=None),
}  # fmt: skip


@pytest.fixture(params=INDICES.values(), ids=INDICES)
def indices(request, monkeypatch):
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "portable")
    emulation.load().set_portable(COLUMN_BYTES, request.param)
    yield
    emulation.load().set_portable()


def close(found, truth, dtype):
    limit = TYPES[dtype] * truth.abs().max()
    error = (found.double() - truth).abs().max()
    assert error <= limit, f"off by {error:.2g}, {limit:.2g} allowed"


def check(problem):
    out, gradients = problem.truth()
    found = [problem.forward(), *problem.backward()]
    for mine, its in zip(found, [out, *gradients], strict=False):
        close(mine, its, problem.input.dtype)
    arguments = (problem.input, problem.offset, problem.weight, problem.mask)
    for mine, its in zip(found[1:], arguments, strict=True):
        assert its is None or mine.stride() == its.stride()
    assert used() == PORTABLE
    return found


@pytest.mark.parametrize(("form", "dtype", "layout"), pairwise(list(FORMS), list(TYPES), list(FORMATS)), ids=word)
def test_results_and_gradients(form, dtype, layout, indices):
    how = dict(FORMS[form], dtype=dtype, layout=FORMATS[layout])
    offset_dtype = how.get("offset_dtype", dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    check(Problem(**{**how, "offset_dtype": offset_dtype or dtype}))


@pytest.mark.parametrize("dtype", TYPES, ids=word)
def test_views(dtype, indices):
    """Images that begin anywhere in memory, whose pixels are further apart than their channels."""
    offset_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    for first, layout in itertools.product([0, 1, 8], FORMATS.values()):
        problem = Problem((2, 24, 9, 7), 8, offset_groups=2, dtype=dtype, layout=layout, offset_dtype=offset_dtype)
        problem.input = problem.input[:, first : first + 16]
        problem.weight = problem.weight[:, :16]
        problem.offset, problem.mask = (t.mT.contiguous().mT for t in (problem.offset, problem.mask))
        problem.grad = problem.grad[:, :, :1, :1].expand_as(problem.grad)
        out, gradients = problem.truth()
        for mine, its in zip([problem.forward(), *problem.backward()], [out, *gradients], strict=True):
            close(mine, its, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=word)
@pytest.mark.parametrize("channels", [24, 15])
def test_most_samples_in_one_cell(channels, dtype, indices):
    """Lists that are cut into bins to be sorted, and into chunks to be summed up; equal bits every time."""
    problem = Problem((2, channels, 12, 14), 8, dtype=dtype, offset_groups=3)
    problem.aim()
    found = check(problem)
    assert all(torch.equal(*pair) for pair in zip(found[1:], problem.backward(), strict=True))


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_that_are_wanted_alone(wanted, indices):
    problem = Problem((2, 16, 9, 7), 8, offset_groups=2, dtype=torch.float32)
    every = problem.backward()
    for bit, (mine, its) in enumerate(zip(problem.backward(wanted), every, strict=True)):
        assert torch.equal(mine, its) if wanted >> bit & 1 else mine.numel() == 0


def test_values_beside_the_corners_do_not_count(indices):
    """A corner without weight is not read, so that infinity there gives no NaN."""
    problem = Problem((1, 16, 6, 6), 8, padding=(0, 0, 0, 0), spread=0.0, dtype=torch.float32)
    problem.input[:, :, 0, 0] = float("inf")
    out = problem.forward()
    assert out[:, :, 1:].isfinite().all() and out[:, :, 0, 1:].isfinite().all()
    exact = reference.deform_conv2d(
        problem.input.double(), problem.offset.double(), problem.weight.double(), problem.bias.double(),
        (1, 1), (0, 0, 0, 0), (1, 1), mask=problem.mask.double(),
    )  # fmt: skip
    assert torch.equal(out.isfinite(), exact.isfinite())
