"""Suppression of boxes under mmcv's names, against mmcv's published numbers and its algorithms in plain Python."""

import math

import numpy as np
import pytest
import torch

from dcn_plugin.integrations.mmcv.nms import FUNCTIONS, nms, nms_match, softnms

# Of mmcv's tests/test_ops/test_nms.py.
BOXES = torch.tensor([[6.0, 3.0, 8.0, 7.0], [3.0, 6.0, 9.0, 11.0], [3.0, 7.0, 10.0, 12.0], [1.0, 4.0, 13.0, 7.0]])
SCORES = torch.tensor([0.6, 0.9, 0.7, 0.2])
NAIVE, LINEAR, GAUSSIAN = range(3)


def drawn(seed, count=24):
    """Boxes on whole numbers and scores of eleven values, so that both overlap equally and tie."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 30
    sides = torch.rand(count, 2, generator=generator) * 15 + 1
    return torch.cat([corners, corners + sides], 1).round(), torch.rand(count, generator=generator).mul(10).round() / 10


def overlap(a, b, offset=0):
    """Intersection over union in float32, one pair at a time."""
    a, b = (np.asarray(box, np.float32) for box in (a, b))
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]) + np.float32(offset))
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]) + np.float32(offset))
    areas = [(box[2] - box[0] + np.float32(offset)) * (box[3] - box[1] + np.float32(offset)) for box in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def call_softnms(boxes, scores, *options):
    dets = boxes.new_full((len(boxes), 5), -7)
    indices = softnms(boxes, scores, dets, *options)
    return dets, indices


def test_nms_gives_the_published_boxes():
    assert nms(BOXES, SCORES, iou_threshold=0.3, offset=0).tolist() == [1, 0, 3]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_nms_keeps_what_a_plain_loop_keeps(dtype, offset):
    for seed in range(3):
        boxes, scores = drawn(seed)
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        left, kept = scores.sort(descending=True, stable=True).indices.tolist(), []
        while left:
            kept.append(left.pop(0))
            left = [i for i in left if overlap(boxes[kept[-1]].tolist(), boxes[i].tolist(), offset) <= np.float32(0.3)]
        assert nms(boxes, scores, 0.3, offset).tolist() == kept


def test_nms_takes_a_threshold_as_a_c_float_and_types_that_differ():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]])
    assert float(np.float32(0.3)) > 0.3  # their overlap is 0.3 in float32: no more than the threshold as mmcv has it
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.3, 0).tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.29, 0).tolist() == [0]
    assert nms(boxes, torch.tensor([0.8, 0.9]).half(), 0.29, 0).tolist() == [1]


@pytest.mark.parametrize(
    "method, rows, scores",
    [
        (LINEAR, [1, 0, 2, 3], [0.9, 0.6, 0.29024392, 0.2]),
        (GAUSSIAN, [1, 0, 2, 3], [0.9, 0.59630775, 0.3527551, 0.18650459]),
        (NAIVE, [1, 0, 3], [0.9, 0.6, 0.2]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softnms_gives_the_published_scores(method, rows, scores, dtype):
    dets, indices = call_softnms(BOXES.to(dtype), SCORES.to(dtype), 0.3, 0.5, 0.01, method, 0)
    assert indices.tolist() == rows
    assert torch.equal(dets[: len(rows), :4], BOXES[rows].to(dtype))
    assert torch.allclose(dets[: len(rows), 4], torch.tensor(scores, dtype=dtype))
    assert torch.equal(dets[len(rows) :], torch.full((4 - len(rows), 5), -7, dtype=dtype))


def soft_loop(boxes, scores, threshold, sigma, least, method, offset):
    """mmcv's algorithm: the best is swapped to the front, what falls below the least is replaced by the last."""
    rows = [[box, np.float32(score), index] for index, (box, score) in enumerate(zip(boxes, scores, strict=True))]
    end, first = len(rows), 0
    while first < end:
        best = first
        for i in range(first + 1, end):
            best = i if rows[best][1] < rows[i][1] else best
        rows[first], rows[best] = rows[best], rows[first]
        i = first + 1
        while i < end:
            common = overlap(rows[first][0], rows[i][0], offset)
            weight = np.float32(1)
            if method == GAUSSIAN:
                weight = np.exp(-common * common / np.float32(sigma))
            elif common >= np.float32(threshold):
                weight = np.float32(0) if method == NAIVE else 1 - common
            rows[i] = [rows[i][0], rows[i][1] * weight, rows[i][2]]
            if rows[i][1] < np.float32(least):
                rows[i], end = rows[end - 1], end - 1
            else:
                i += 1
        first += 1
    return [index for _, _, index in rows[:end]], [[*box, score] for box, score, _ in rows[:end]]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [NAIVE, LINEAR, GAUSSIAN])
def test_softnms_is_mmcvs_algorithm_to_the_order_of_ties(method, offset):
    for seed in range(2):
        boxes, scores = drawn(seed, 24)
        for least in (0.001, 0.3):
            indices, rows = soft_loop(boxes.tolist(), scores.tolist(), 0.3, 0.5, least, method, offset)
            dets, found = call_softnms(boxes, scores, 0.3, 0.5, least, method, offset)
            assert found.tolist() == indices
            assert np.allclose(dets[: len(found)], np.array(rows, np.float32), rtol=1e-5, atol=1e-6)


def test_softnms_looks_at_every_box_once_even_where_none_overlaps():
    boxes = torch.tensor([[0.0, 0, 1, 1], [10, 10, 11, 11], [20, 20, 21, 21]])
    dets, indices = call_softnms(boxes, torch.tensor([0.5, 0.0001, 0.4]), 0.5, 0.5, 0.001, LINEAR, 0)
    assert indices.tolist() == [0, 2]
    assert call_softnms(boxes, torch.zeros(3), 0.5, 0.5, 0.001, LINEAR, 0)[1].tolist() == [0]  # mmcv keeps the best
    # Every overlap reaches a threshold of 0.
    assert call_softnms(boxes, torch.tensor([0.5, 0.4, 0.3]), 0.0, 0.5, 0.001, NAIVE, 0)[1].tolist() == [0]
    # A NaN is larger than nothing: it is the best only where it stands first.
    assert call_softnms(boxes, torch.tensor([0.5, math.nan, 0.6]), 0.5, 0.5, 0.001, LINEAR, 0)[1].tolist() == [2, 1, 0]
    assert call_softnms(boxes, torch.tensor([math.nan] * 3), 0.5, 0.5, 0.001, LINEAR, 0)[1].tolist() == [0, 1, 2]


def test_nms_match_groups_what_a_plain_loop_groups():
    published = torch.tensor(
        [[49.1, 32.4, 51.0, 35.9, 0.9], [49.3, 32.9, 51.0, 35.3, 0.9], [35.3, 11.5, 39.9, 14.5, 0.4],
         [35.2, 11.7, 39.7, 15.7, 0.3]]
    )  # fmt: skip
    assert nms_match(published, iou_threshold=0.6) == [[0, 1], [2, 3]]
    for seed in range(5):
        boxes, scores = drawn(seed)
        left, groups = scores.sort(descending=True, stable=True).indices.tolist(), []
        while left:
            kept = left.pop(0)
            removed = [i for i in left if overlap(boxes[kept].tolist(), boxes[i].tolist()) >= np.float32(0.25)]
            left = [i for i in left if i not in removed]
            groups.append([kept, *removed])
        assert nms_match(torch.cat([boxes, scores[:, None]], 1), 0.25) == groups


def test_nothing_comes_of_no_boxes():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    assert nms(boxes, scores, 0.5, 0).shape == nms(boxes, scores, 0.5, 1).shape == (0,)
    dets, indices = call_softnms(boxes, scores, 0.5, 0.5, 0.001, LINEAR, 0)
    assert indices.dtype == torch.int64 and indices.shape == (0,)
    assert nms_match(torch.zeros(0, 5), 0.5) == []


@pytest.mark.skipif("nms_rotated" not in FUNCTIONS, reason="this torchvision has no overlap of turned boxes")
def test_nms_rotated_gives_the_published_boxes():
    # Of mmcv's tests/test_ops/test_nms_rotated.py; labels change nothing.
    boxes = torch.tensor(
        [[6.0, 3.0, 8.0, 7.0, 0.5], [3.0, 6.0, 9.0, 11.0, 0.6], [3.0, 7.0, 10.0, 12.0, 0.3], [1.0, 4.0, 13.0, 7.0, 0.6]]
    )
    scores, labels = torch.tensor([0.7, 0.8, 0.5, 0.9]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    order = scores.sort(descending=True).indices
    for dets in (boxes, torch.cat([boxes, labels[:, None]], 1)):
        with_labels = dets.shape[1] == 6
        kept = FUNCTIONS["nms_rotated"](dets, scores, order, dets[order], labels, 0.5, with_labels)
        assert kept.tolist() == [3, 1, 0]


@pytest.mark.skipif("nms_rotated" not in FUNCTIONS, reason="this torchvision has no overlap of turned boxes")
@pytest.mark.parametrize("angle", [0.3, -0.3])
def test_boxes_turn_clockwise(angle):
    """Two long boxes in a row along their axis have a third in common, but only if they turn as their centres lie."""
    step = torch.tensor([math.cos(angle), math.sin(angle)]) * 5  # to the right and, in an image, down: clockwise
    boxes = torch.tensor([[0.0, 0.0, 10.0, 1.0, angle], [*step.tolist(), 10.0, 1.0, angle]])  # half of each in common
    scores, order, none = torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), torch.zeros(0)
    for threshold, kept in ((0.33, [0]), (0.34, [0, 1])):
        assert FUNCTIONS["nms_rotated"](boxes, scores, order, boxes, none, threshold, False).tolist() == kept
