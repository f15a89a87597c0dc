"""Pooling of regions under mmcv's names, against its published numbers and its formulas in plain Python loops.

Gradients are checked through mmcv's own functions, in `test_mmcv_ops.py`.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch

from dcn_plugin.integrations.mmcv import regions

MAX, MEAN = 0, 1
# Of mmcv's tests/test_ops/test_roi_align.py and test_roi_pool.py: one image of 4 x 4 pixels, one region.
IMAGE = torch.tensor([[[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]]])
REGION = torch.tensor([[0.0, 0, 0, 3, 3]])

# Within, across every border, outside, without an extent, thin, inverted (last, which roi_align cannot take).
ROIS = torch.tensor(
    [
        [0, 0, 0, 8, 8], [1, 3.2, 1.1, 20.5, 15.2], [0, -5, -4, 3, 2.5], [1, 30, 30, 40, 40], [1, 5, 5, 5, 5],
        [0, 4, 4, 4, 9], [1, 2, 2, 21, 17], [0, 6, 6, 4, 4],
    ],
    dtype=torch.float64,
)  # fmt: skip


@pytest.fixture
def image():
    return torch.randn(2, 2, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def align(image, rois, bins, scale, ratio, mode, aligned, dtype=None):
    made = [torch.zeros(len(rois), image.shape[1], *bins, dtype=dtype or image.dtype) for _ in range(3)]
    regions.roi_align_forward(image, rois, *made, *bins, scale, ratio, mode, aligned)
    return made


def bilinear(plane, y, x):
    """Read `plane` where roi_align does: within a pixel of it, what lies beyond the outermost pixels on them."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = 0.0
    for row, column in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
        if weight:
            total += weight * plane[row, column]
    return total


def samples(roi, bins, scale, ratio, aligned):
    """Yield each bin with the positions that it reads, as mmcv's kernel goes through them."""
    y1, x1, y2, x2 = (roi[i] * scale - 0.5 * aligned for i in (2, 1, 4, 3))
    least = 0 if aligned else 1
    steps = [max(end - start, least) / number for start, end, number in ((y1, y2, bins[0]), (x1, x2, bins[1]))]
    grid = [ratio or math.ceil(step) for step in steps]
    for i, j in np.ndindex(*bins):
        yield (
            i,
            j,
            [
                (y1 + (i + (a + 0.5) / grid[0]) * steps[0], x1 + (j + (b + 0.5) / grid[1]) * steps[1])
                for a, b in np.ndindex(*grid)
            ],
        )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_the_mean_or_the_largest_of_its_samples(image, ratio, aligned):
    rois, bins, scale = ROIS[:-1], (3, 2), 0.7
    mean = align(image, rois, bins, scale, ratio, MEAN, aligned)[0]
    largest, argmax_y, argmax_x = align(image, rois, bins, scale, ratio, MAX, aligned)
    planes = image.numpy()
    for r, roi in enumerate(rois.tolist()):
        for i, j, places in samples(roi, bins, scale, ratio, aligned):
            for c in range(image.shape[1]):
                plane, at = planes[int(roi[0]), c], (r, c, i, j)
                read = [bilinear(plane, *place) for place in places]
                assert mean[at] == pytest.approx(sum(read) / max(1, len(read)))
                assert largest[at] == pytest.approx(max(read, default=0))
                if read:
                    place = argmax_y[at].item(), argmax_x[at].item()
                    assert bilinear(plane, *place) == pytest.approx(max(read))
                    assert min(math.dist(place, other) for other in places) < 1e-9
                else:
                    assert argmax_y[at] == argmax_x[at] == -1


def test_roi_align_gives_the_published_numbers():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        found = align(IMAGE.to(dtype), REGION.to(dtype), (2, 2), 1.0, 2, MEAN, True)[0]
        assert found.dtype == dtype
        assert torch.allclose(found.double(), torch.tensor([[1.9375, 4.75], [7.5625, 10.375]]).double(), rtol=2e-3)


def test_half_precision_costs_no_more_than_its_result_holds(image):
    image, rois = image.half(), ROIS[:-1].half()
    for mode in (MEAN, MAX):
        exact = align(image.double(), rois.double(), (3, 2), 0.5, 0, mode, True)[0]
        found = align(image, rois, (3, 2), 0.5, 0, mode, True)[0]
        assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-4)


def pool(image, rois, bins, scale):
    output = torch.full((len(rois), image.shape[1], *bins), 7, dtype=image.dtype)
    argmax = torch.zeros(output.shape, dtype=torch.int32)
    regions.roi_pool_forward(image, rois, output, argmax, *bins, scale)
    return output, argmax


def pool_loop(planes, rois, bins, scale):
    """Take the largest of all pixels that a bin touches, the first of equal ones."""
    height, width = planes.shape[2:]
    output, argmax = np.zeros((len(rois), planes.shape[1], *bins)), np.full((len(rois), planes.shape[1], *bins), -1)
    for r, (image, x1, y1, x2, y2) in enumerate(rois):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, j in np.ndindex(*bins):
            rows, columns = (
                range(max(0, math.floor(first + k * step)), min(most, math.ceil(first + (k + 1) * step)))
                for first, k, step, most in (
                    (y1, i, (y2 - y1) / bins[0], height),
                    (x1, j, (x2 - x1) / bins[1], width),
                )
            )
            for c in range(planes.shape[1]):
                for row, column in product(rows, columns):
                    value = planes[int(image), c, row, column]
                    if argmax[r, c, i, j] < 0 or value > output[r, c, i, j]:
                        output[r, c, i, j], argmax[r, c, i, j] = value, row * width + column
    return output, argmax


@pytest.mark.parametrize("bins", [(2, 2), (7, 5)])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_roi_pool_is_the_largest_pixel_that_a_bin_touches(image, bins, scale):
    for planes in (image, (image * 2).round()):  # the latter with many equal pixels
        output, argmax = pool(planes, ROIS, bins, scale)
        expected = pool_loop(planes.numpy(), ROIS.tolist(), bins, scale)
        assert np.array_equal(output, expected[0])
        assert np.array_equal(argmax, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_roi_pool_gives_the_published_numbers(dtype):
    output, argmax = pool(IMAGE.to(dtype), REGION.to(dtype), (2, 2), 1.0)
    assert output.tolist() == [[[[4, 8], [12, 16]]]]
    grad = torch.zeros_like(IMAGE, dtype=dtype)
    regions.roi_pool_backward(torch.ones_like(output), REGION.to(dtype), argmax, grad, 2, 2, 1.0)
    assert grad.tolist() == [[[[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]]]


def test_regions_are_taken_in_parts_without_a_difference(image, monkeypatch):
    whole = align(image, ROIS[:-1], (2, 2), 0.7, 0, MAX, True), pool(image, ROIS, (2, 2), 0.7)
    monkeypatch.setattr(regions, "AT_ONCE", 1)
    parts = align(image, ROIS[:-1], (2, 2), 0.7, 0, MAX, True), pool(image, ROIS, (2, 2), 0.7)
    for one, other in zip(whole, parts, strict=True):
        assert all(map(torch.equal, one, other))


def test_no_regions_are_no_gradient(image):
    none = ROIS[:0]
    grad = torch.zeros_like(image)
    for mode in (MAX, MEAN):
        made = align(image, none, (2, 2), 1.0, 0, mode, True)
        assert made[0].shape == (0, 2, 2, 2)
        regions.roi_align_backward(made[0], none, made[1], made[2], grad, 2, 2, 1.0, 0, mode, True)
    output, argmax = pool(image, none, (2, 2), 1.0)
    regions.roi_pool_backward(output, none, argmax, grad, 2, 2, 1.0)
    assert not grad.any()


def test_gradients_are_added(image):
    made = align(image, ROIS[:-1], (2, 2), 1.0, 2, MAX, True)
    output, argmax = pool(image, ROIS, (2, 2), 1.0)
    for start in (0.0, 5.0):
        grads = [torch.full_like(image, start) for _ in range(3)]
        for grad, mode in zip(grads, (MAX, MEAN), strict=False):
            given = torch.ones_like(made[0]), ROIS[:-1], made[1], made[2], grad
            regions.roi_align_backward(*given, 2, 2, 1.0, 2, mode, True)
        regions.roi_pool_backward(torch.ones_like(output), ROIS, argmax, grads[2], 2, 2, 1.0)
        # Each output hands on all of its gradient, but for samples outside of the map and empty bins.
        sums = [grad.sum().item() - start * image.numel() for grad in grads]
        if not start:
            first = sums
            assert sums[2] == (argmax >= 0).sum()
    assert sums == pytest.approx(first)


@pytest.mark.parametrize("row", [(1 - 1e-9, 0, 0, 1, 1), (0, 0, 0, 1e39, 1), (0, -3e38, 0, 3e38, 1)])
def test_regions_are_checked_in_the_type_that_they_are_used_in(row):
    """In float32, these are of the second image, which is not there, or without an end."""
    image, rois = torch.zeros(1, 2, 7, 8), torch.tensor([row], dtype=torch.float64)
    for mode in (MAX, MEAN):
        with pytest.raises(ValueError, match="rois: expected finite regions"):
            align(image, rois, (2, 2), 1.0, 2, mode, True)
    made = [torch.zeros(1, 2, 2, 2) for _ in range(3)]
    with pytest.raises(ValueError, match="rois: expected finite regions"):
        regions.roi_align_backward(made[0], rois, *made[1:], torch.zeros_like(image), 2, 2, 1.0, 2, MEAN, True)
