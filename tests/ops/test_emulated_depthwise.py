"""The fused CUDA bodies for depthwise weights (DCNv3's case), on the CPU, against the reference."""

import pytest
import torch
from test_emulated_cuda import FEW, GRADIENTS, HALVES, LAYOUTS, MANY, Problem, close, schedule, used
from test_emulated_cuda import fused as fused  # every test here runs with it

DEPTHWISE = {"deform_conv2d": "fused depthwise", "deform_conv2d_backward": "fused depthwise"}
PORTABLE = {"deform_conv2d": "portable", "deform_conv2d_backward": "portable"}


def problem(shape, **how) -> Problem:
    return Problem(shape, **{"out": shape[1], "groups": shape[1], **how})


FORMS = {
    "one_offset_group": dict(shape=(2, 8, 9, 7)),
    "offset_groups_of_8": dict(shape=(1, 24, 9, 7), offset_groups=3),
    "offset_groups_of_16": dict(shape=(2, 48, 7, 6), offset_groups=3),
    "offset_groups_of_24": dict(shape=(1, 48, 9, 7), offset_groups=2),
    "many_offset_groups": dict(shape=(1, 160, 4, 5), offset_groups=20),
    "strided": dict(shape=(2, 24, 13, 11), stride=2, padding=(0, 1, 2, 3), dilation=2),
    "large_kernel": dict(shape=(1, 16, 9, 8), kernel=5, padding=(2, 2, 2, 2)),
    "pointwise": dict(shape=(2, 24, 6, 5), kernel=1, padding=(0, 0, 0, 0)),
    "v1": dict(shape=(1, 24, 9, 9), offset_groups=3, mask=False, bias=False),
    "far": dict(shape=(1, 16, 9, 7), spread=20.0),
    "half_offsets": dict(shape=(2, 16, 9, 7), offset_groups=2, spread=0.5, offset_dtype=None),
    "one_pixel": dict(shape=(1, 8, 1, 1)),
    "one_row": dict(shape=(3, 8, 1, 9)),
}  # fmt: skip


@HALVES
@LAYOUTS
@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients(form, multiprocessors, dtype, layout):
    how = dict(FORMS[form], dtype=dtype, layout=layout)
    how["offset_dtype"] = how.get("offset_dtype", torch.float32) or dtype
    schedule("up", multiprocessors)
    assert problem(**how).check() == DEPTHWISE


@LAYOUTS
def test_shares_of_many_pixels(layout):
    """So many shares of the pixels that their sums are added in more than one go."""
    schedule("up", MANY)
    assert problem((2, 8, 40, 33), layout=layout).check() == DEPTHWISE


@HALVES
@LAYOUTS
def test_most_samples_in_one_cell(dtype, layout):
    """Whose chunks are summed up before its pixels are: equal bits every time."""
    given = problem((2, 48, 12, 14), offset_groups=3, dtype=dtype, layout=layout)
    given.aim()
    assert given.check() == DEPTHWISE
    assert all(torch.equal(*pair) for pair in zip(given.backward(), given.backward(), strict=True))


@LAYOUTS
def test_offsets_stored_pixel_by_pixel(layout):
    """Offset and mask as slices of what one convolution predicts, channels together."""
    given = problem((2, 24, 9, 7), offset_groups=3, layout=layout)
    both = torch.cat([given.offset, given.mask], 1).contiguous(memory_format=torch.channels_last)
    given.offset, given.mask = both[:, : 2 * 27], both[:, 2 * 27 :]
    assert given.check() == DEPTHWISE


def test_layouts_that_differ():
    """Input, gradient and weight each stored in its own way."""
    given = problem((2, 16, 6, 7), layout=torch.channels_last)
    given.grad = given.grad.contiguous()
    given.weight = given.weight.transpose(2, 3).contiguous().transpose(2, 3)
    assert given.check() == DEPTHWISE
    given = problem((2, 16, 6, 7), layout=torch.contiguous_format)
    given.grad = given.grad.contiguous(memory_format=torch.channels_last)
    assert given.check() == DEPTHWISE


def test_views_of_larger_tensors():
    """Strides that are no layout's of their own, pixels of the gradient that are not evenly spaced, or are all one."""
    given = problem((2, 16, 6, 6))
    given.input = torch.randn(4, 8, 9, 32).bfloat16()[::2, 1:7, 2:8, 8:24].permute(0, 3, 1, 2)
    given.grad = torch.randn(2, 16, 12, 12).bfloat16()[:, :, ::2, 1::2]
    assert given.check() == DEPTHWISE
    given.grad = torch.ones((), dtype=torch.bfloat16).expand(2, 16, 6, 6)
    assert given.check() == DEPTHWISE


@LAYOUTS
def test_values_that_are_not_finite(layout):
    """What diverged shows where it is read, and nowhere else: as in the reference."""
    given = problem((2, 16, 9, 7), offset_groups=2, layout=layout)
    given.offset[0, 4, 3, 3] = float("nan")
    given.offset[0, 7, 5, 2] = float("inf")
    given.offset[1, 0, 0, 0] = 1e30
    given.mask[1, 3, 4, 4] = float("nan")
    given.input[1, 5, 8, 6] = float("inf")
    out, gradients = given.truth()
    found = given.forward()
    assert torch.equal(found.isfinite(), out.isfinite())
    kept = out.isfinite()
    close(found[kept], out[kept], found.dtype)
    for mine, its in zip(given.backward(), gradients, strict=True):
        assert torch.equal(mine.isnan(), its.isnan())
        close(mine[its.isfinite()], its[its.isfinite()], found.dtype)
    assert used() == DEPTHWISE


@pytest.mark.parametrize("wanted", range(16))
def test_only_what_is_asked_for(wanted):
    given = problem((1, 16, 7, 6), offset_groups=2)
    every = given.backward()
    for bit, found, whole in zip(GRADIENTS, given.backward(wanted), every, strict=True):
        assert torch.equal(found, whole) if wanted & bit else found.numel() == 0


@LAYOUTS
def test_images_of_several_ranges(layout):
    """The index of two such images fills the emulated device's budget, so the third is a range of its own."""
    assert problem((3, 8, 44, 44), kernel=7, padding=(3, 3, 3, 3), layout=layout).check() == DEPTHWISE


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=(1, 12, 6, 6)),  # channels not in pieces of eight
        dict(shape=(1, 32, 6, 6), offset_groups=8),  # nor those of an offset group
        dict(shape=(1, 16, 6, 6), out=32),  # two outputs for each channel
    ],
)
def test_the_portable_path_serves_the_rest(change):
    assert problem(**change).check() == PORTABLE
