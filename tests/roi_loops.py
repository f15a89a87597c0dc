"""RoI pooling as its authors write it, one number at a time: in the words of a loop, and with none of our code."""

from __future__ import annotations

import math

import torch


def away(value: float) -> int:
    """C's round: half away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def loops_of_deform_ps_roi_pool(
    input, rois, offset=None, *, output_dim, group_size, output_size, part_size, samples_per_part, spatial_scale,
    offset_scale, mask=None,
):  # fmt: skip
    """The original operator's formulas, one number at a time, with its (x, y) turned into (y, x)."""
    (ph, pw), parts, (height, width) = output_size, part_size or output_size, input.shape[2:]
    out = torch.zeros(len(rois), output_dim, ph, pw, dtype=input.dtype)
    classes = 1 if offset is None else offset.shape[1] // 2
    if mask is not None:
        classes = mask.shape[1]
    for r, (n, x1, y1, x2, y2) in enumerate(rois.tolist()):
        left, top = (away(v) * spatial_scale - 0.5 for v in (x1, y1))
        right, bottom = ((away(v) + 1) * spatial_scale - 0.5 for v in (x2, y2))
        roi_w, roi_h = max(right - left, 0.1), max(bottom - top, 0.1)
        for d in range(output_dim):
            c = d // (output_dim // classes)
            for i in range(ph):
                for j in range(pw):
                    part = (i * parts[0] // ph, j * parts[1] // pw)
                    dy, dx = (0, 0) if offset is None else offset[r, 2 * c : 2 * c + 2, part[0], part[1]].tolist()
                    y0 = i * roi_h / ph + top + dy * offset_scale * roi_h
                    x0 = j * roi_w / pw + left + dx * offset_scale * roi_w
                    plane = input[int(n), (d * group_size + i * group_size // ph) * group_size + j * group_size // pw]
                    total, count = 0.0, 0
                    for u in range(samples_per_part):
                        for v in range(samples_per_part):
                            y, x = y0 + u * roi_h / ph / samples_per_part, x0 + v * roi_w / pw / samples_per_part
                            if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
                                continue
                            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                            a, b, e, f = math.floor(y), math.ceil(y), math.floor(x), math.ceil(x)
                            above = (1 - (x - e)) * plane[a, e].item() + (x - e) * plane[a, f].item()
                            below = (1 - (x - e)) * plane[b, e].item() + (x - e) * plane[b, f].item()
                            total, count = total + (1 - (y - a)) * above + (y - a) * below, count + 1
                    factor = 1.0 if mask is None else mask[r, c, part[0], part[1]].item()
                    out[r, d, i, j] = factor * total / count if count else 0.0
    return out


def loops_of_ps_roi_pool(input, rois, *, output_dim, group_size, output_size, spatial_scale):
    """R-FCN's formulas, one number at a time."""
    (ph, pw), (height, width) = output_size, input.shape[2:]
    out = torch.zeros(len(rois), output_dim, ph, pw, dtype=input.dtype)
    for r, (n, x1, y1, x2, y2) in enumerate(rois.tolist()):
        left, top = away(x1) * spatial_scale, away(y1) * spatial_scale
        bin_w = max((away(x2) + 1) * spatial_scale - left, 0.1) / pw
        bin_h = max((away(y2) + 1) * spatial_scale - top, 0.1) / ph
        for i in range(ph):
            for j in range(pw):
                a, b = math.floor(top + i * bin_h), math.ceil(top + (i + 1) * bin_h)
                e, f = math.floor(left + j * bin_w), math.ceil(left + (j + 1) * bin_w)
                a, b, e, f = (
                    min(max(a, 0), height),
                    min(max(b, 0), height),
                    min(max(e, 0), width),
                    min(max(f, 0), width),
                )
                for d in range(output_dim):
                    c = (d * group_size + i * group_size // ph) * group_size + j * group_size // pw
                    if b > a and f > e:
                        out[r, d, i, j] = input[int(n), c, a:b, e:f].mean()
    return out


def loops_of_deform_roi_pool(
    input, rois, offset=None, mask=None, *, output_size, spatial_scale, sampling_ratio, gamma, aligned
):
    """mmcv's formulas (they are aligned), with (x, y) turned into (y, x); RoIAlign's first ones where not aligned."""
    (ph, pw), (height, width) = output_size, input.shape[2:]
    out = torch.zeros(len(rois), input.shape[1], ph, pw, dtype=input.dtype)
    for r, (n, x1, y1, x2, y2) in enumerate(rois.tolist()):
        half = 0.5 if aligned else 0.0
        left, top, right, bottom = (v * spatial_scale - half for v in (x1, y1, x2, y2))
        roi_w, roi_h = right - left, bottom - top  # below 0 where the region is inside out
        if not aligned:
            roi_w, roi_h = max(roi_w, 1.0), max(roi_h, 1.0)
        rows = sampling_ratio if sampling_ratio > 0 else math.ceil(roi_h / ph)
        columns = sampling_ratio if sampling_ratio > 0 else math.ceil(roi_w / pw)
        for i in range(ph):
            for j in range(pw):
                dy, dx = (0.0, 0.0) if offset is None else offset[r, :, i, j].tolist()
                y0, x0 = top + gamma * roi_h * dy + i * roi_h / ph, left + gamma * roi_w * dx + j * roi_w / pw
                total = torch.zeros(input.shape[1], dtype=input.dtype)
                for u in range(rows):  # none, where their number is 0 or below
                    for v in range(columns):
                        y, x = y0 + (u + 0.5) * roi_h / ph / rows, x0 + (v + 0.5) * roi_w / pw / columns
                        if not (-1 <= y <= height and -1 <= x <= width):
                            continue
                        y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
                        a, e = min(int(y), height - 1), min(int(x), width - 1)
                        b, f = min(a + 1, height - 1), min(e + 1, width - 1)
                        above = (1 - (x - e)) * input[int(n), :, a, e] + (x - e) * input[int(n), :, a, f]
                        below = (1 - (x - e)) * input[int(n), :, b, e] + (x - e) * input[int(n), :, b, f]
                        total += (1 - (y - a)) * above + (y - a) * below
                factor = 1.0 if mask is None else mask[r, 0, i, j].item()
                out[r, :, i, j] = factor * total / max(rows * columns, 1)
    return out
