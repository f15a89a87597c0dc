"""mmcv's suppression of overlapping boxes: torchvision's where that does the same, NumPy or plain PyTorch elsewhere.

Every loop here goes over the boxes that are kept, one after the other, because what is kept decides what is looked at
next; all that a kept box does to the others is done at once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from ...ops._check import shape, tensor
from ._wide import wide


def _single(value: float) -> float:
    """Round as the compiled mmcv does, whose thresholds are C++ floats: a tie with 0.3 must fall on the same side."""
    return float(np.float32(value))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the boxes that no better one overlaps by more than the threshold, the best one first.

    Args:
        boxes: `[N, 4]`, x1, y1, x2, y2.
        scores: `[N]`.
        iou_threshold: what a kept box may overlap a better one by.
        offset: 0, or 1 where corners are pixels, so that a side is `x2 - x1 + 1` long.
    """
    tensor(boxes, "boxes", 2, "[N, 4]")
    shape(boxes, "boxes", (len(boxes), 4))
    shape(scores, "scores", (len(boxes),))
    boxes = wide(boxes)
    if offset:  # torchvision knows no such sides; in float64 the addition takes nothing from the coordinates
        boxes = boxes.double() + boxes.new_tensor([0, 0, offset, offset], dtype=torch.float64)
    # The two types need not agree for mmcv. Ordering is all that scores are for, and it survives a wider type.
    common = torch.promote_types(boxes.dtype, scores.dtype)
    return torchvision.ops.nms(boxes.to(common), scores.to(common), _single(iou_threshold))


def _table(boxes: Tensor, offset: int) -> Any:
    """Return x1, y1, x2, y2 and the area of each box, as rows of an array of its own."""
    corners = wide(boxes.detach()).cpu().numpy().T
    sides = corners[2:] - corners[:2] + offset
    return np.concatenate([corners, sides[:1] * sides[1:]])


def _near(box: Any, others: Any, offset: int, threshold: float) -> Any:
    """Return the places of those of `others` whose overlap with `box` can reach the threshold: few, of many boxes."""
    if threshold <= 0:
        return np.arange(others.shape[1])
    x1, y1, x2, y2 = others[:4]
    left, top, right, bottom = box[:4]
    return np.flatnonzero((x1 < right + offset) & (y1 < bottom + offset) & (left < x2 + offset) & (top < y2 + offset))


def _overlaps(box: Any, others: Any, offset: int) -> Any:
    """Return the intersection over union of `box`, a column of a table, with each of `others`, several columns."""
    sides = np.minimum(box[2:4, None], others[2:4]) - np.maximum(box[:2, None], others[:2]) + offset
    np.maximum(sides, 0, out=sides)
    common = sides[0] * sides[1]
    return common / (box[4] + others[4] - common)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of what better boxes overlap; write what is left to `dets`, the best one first; return indices.

    Where two scores are equal, the order is mmcv's: it keeps the boxes in one array, swaps the best to the front, and
    fills the place of one that falls below `min_score` from the end.

    Args:
        boxes: `[N, 4]`, x1, y1, x2, y2.
        scores: `[N]`.
        dets: `[N, 5]`, where the boxes that are left and their scores go; the rows after them stay as they are.
        iou_threshold: from which overlap on methods 0 and 1 act.
        sigma: how far method 2 reaches.
        min_score: below it, a box is dropped.
        method: 0 drops what overlaps, 1 multiplies its score with `1 - overlap`, 2 every score with
            `exp(-overlap**2 / sigma)`.
        offset: 0, or 1 where corners are pixels.
    """
    tensor(boxes, "boxes", 2, "[N, 4]")
    shape(boxes, "boxes", (len(boxes), 4))
    shape(scores, "scores", (len(boxes),))
    shape(dets, "dets", (len(boxes), 5))
    table = _table(boxes, offset)
    table = np.concatenate([table, wide(scores.detach()).cpu().numpy()[None].astype(table.dtype)])
    index = np.arange(len(boxes))
    threshold, least = _single(iou_threshold), _single(min_score)
    first, end = 0, len(boxes)
    with np.errstate(invalid="ignore", divide="ignore"):  # boxes without an area
        while first < end:
            best = first + _best(table[5, first:end])
            table[:, [first, best]] = table[:, [best, first]]
            index[[first, best]] = index[[best, first]]
            others = table[:, first + 1 : end]
            near = _near(table[:, first], others, offset, threshold)
            overlap = _overlaps(table[:, first], others[:, near], offset)
            if method == 0:
                others[5, near[overlap >= threshold]] = 0
            elif method == 1:
                others[5, near] *= np.where(overlap >= threshold, 1 - overlap, 1)
            else:
                others[5, near] *= np.exp(-overlap * overlap / sigma)
            first += 1
            # The first round looks at all, later ones only at scores that have changed.
            low = others[5] < least if first == 1 else others[5, near] < least
            if low.any():
                end = first + _close_gaps(others, index[first:end], np.flatnonzero(low) if first == 1 else near[low])
    dets[:end].copy_(torch.from_numpy(np.concatenate([table[:4, :end], table[5:, :end]]).T.copy()))
    return torch.from_numpy(index[:end].copy()).to(boxes.device)


def _close_gaps(table: Any, index: Any, gone: Any) -> int:
    """Move the columns of `table` and of `index` to the front, without those at `gone`; return how many are left.

    The last one left comes to the first gap, the one before it to the second.
    """
    left = len(index) - len(gone)
    stays = np.ones(len(index), bool)
    stays[gone] = False
    gaps, fillers = gone[gone < left], left + np.flatnonzero(stays[left:])[::-1]
    table[:, gaps] = table[:, fillers]
    index[gaps] = index[fillers]
    return left


def _best(scores: Any) -> int:
    """Return where the first largest score is, as comparing one after the other finds it: a NaN only if it is first."""
    found = int(scores.argmax())
    if math.isnan(scores[found]):
        found = 0 if math.isnan(scores[0]) else int(np.nanargmax(scores))
    return found


def _suppress(count: int, removes: Callable[[int, Any], Any]) -> Iterator[tuple[int, Any]]:
    """Go through `count` boxes, the best one first, and yield each that is kept beside those that it removes.

    `removes(kept, alive)` returns the places of the boxes behind `kept` that it removes, among those that are alive.
    """
    alive = np.ones(count, bool)
    for kept in range(count):
        if alive[kept]:
            removed = removes(kept, alive)
            alive[removed] = False
            yield kept, removed


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return, for each box that is kept, the best one first, its index and those of the boxes it removes, by score.

    Args:
        dets: `[N, 5]`, x1, y1, x2, y2, score.
        iou_threshold: from which overlap on a box is removed.
    """
    tensor(dets, "dets", 2, "[N, 5]")
    shape(dets, "dets", (len(dets), 5))
    order = dets[:, 4].sort(descending=True, stable=True).indices.cpu().numpy()
    table = _table(dets[:, :4], 0)[:, order]
    threshold = _single(iou_threshold)

    def removes(kept: int, alive: Any) -> Any:
        places = kept + 1 + _near(table[:, kept], table[:, kept + 1 :], 0, threshold)
        places = places[alive[places]]
        return places[_overlaps(table[:, kept], table[:, places], 0) >= threshold]

    with np.errstate(invalid="ignore", divide="ignore"):
        return [[int(order[kept]), *order[removed].tolist()] for kept, removed in _suppress(len(dets), removes)]


def _rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the overlap of each pair. mmcv turns boxes clockwise by radians, torchvision the other way by degrees."""
    turned = boxes1.new_tensor([1, 1, 1, 1, -180 / math.pi])
    return torchvision.ops.box_iou(wide(boxes1 * turned), wide(boxes2 * turned), fmt="cxcywhr")


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Return the indices of turned boxes that no better one overlaps by as much as the threshold, the best one first.

    As in mmcv, labels change nothing: `mmcv.ops.batched_nms` moves the boxes of classes apart.

    Args:
        dets: `[N, 5]`, or `[N, 6]` with the label: the centre's x and y, width, height, an angle in radians, clockwise.
        scores: `[N]`.
        order: `[N]`, the places of the boxes by score.
        dets_sorted: `dets` in that order.
        labels: what `dets` holds, if it does.
        iou_threshold: from which overlap on a box is removed.
        multi_label: whether `dets` holds labels.
    """
    tensor(dets_sorted, "dets_sorted", 2, "[N, 5] or [N, 6]")
    shape(dets_sorted, "dets_sorted", (len(dets), 5 + bool(multi_label)))
    shape(order, "order", (len(dets),))
    boxes = dets_sorted[:, :5].detach()
    threshold = _single(iou_threshold)

    def removes(kept: int, alive: Any) -> Any:
        places = kept + 1 + np.flatnonzero(alive[kept + 1 :])
        if not len(places):
            return places
        overlap = _rotated(boxes[kept][None], boxes[torch.from_numpy(places)])[0]
        return places[(overlap >= threshold).cpu().numpy()]

    return order[[kept for kept, _ in _suppress(len(dets), removes)]]


FUNCTIONS: dict[str, Callable[..., Any]] = {"nms": nms, "softnms": softnms, "nms_match": nms_match}
if hasattr(torch.ops.torchvision, "box_iou_rotated"):  # older ones have no overlap of turned boxes
    FUNCTIONS["nms_rotated"] = nms_rotated
