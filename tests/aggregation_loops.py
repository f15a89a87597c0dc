"""Deformable aggregation in Python's numbers, tap by tap, from what DCNv3 and DCNv4 say of their orders; slow."""

import math

import torch


def loops(
    value, offset, weight=None, *, kernel_size, stride, padding, dilation, offset_scale, remove_center, softmax,
    official_order,
):  # fmt: skip
    """`dcn_plugin.ops.deform_aggregate2d` by the formula of its docstring; the same arguments, all of them given."""
    (kh, kw), n, groups = kernel_size, len(value), offset.shape[3]
    (sy, sx), (dy, dx) = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    top, left = (padding, padding) if isinstance(padding, int) else padding[:2]
    if official_order:
        taps = [(i, j) for j in range(kw) for i in range(kh)]
    else:
        taps = [(i, j) for i in range(kh) for j in range(kw)]
    if remove_center:
        del taps[len(taps) // 2]
    given, given_weights = offset.tolist(), None if weight is None else weight.tolist()
    packed = offset.dim() == 5

    def pair(k, n, y, x, g):
        return given[n][y][x][g][2 * k : 2 * k + 2] if packed else given[n][y][x][g][k]

    def logits(n, y, x, g):
        if packed:
            return given[n][y][x][g][2 * len(taps) :]
        return [1.0] * len(taps) if weight is None else given_weights[n][y][x][g]

    height, width, channels = value.shape[1:]
    each = channels // groups
    cy, cx = dy * (kh - 1) // 2, dx * (kw - 1) // 2
    out = torch.zeros(n, *offset.shape[1:3], channels, dtype=torch.float64)
    for image, oy, ox, g in torch.cartesian_prod(*(torch.arange(s) for s in (n, *offset.shape[1:4]))).tolist():
        weights = logits(image, oy, ox, g)
        if softmax:
            powers = [math.exp(w) for w in weights]
            weights = [p / sum(powers) for p in powers]
        for k, (i, j) in enumerate(taps):
            first, second = pair(k, image, oy, ox, g)
            off_y, off_x = (second, first) if official_order else (first, second)
            y = oy * sy - top + cy + offset_scale * (i * dy + off_y) - offset_scale * cy
            x = ox * sx - left + cx + offset_scale * (j * dx + off_x) - offset_scale * cx
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[k]
                        own = slice(g * each, (g + 1) * each)
                        out[image, oy, ox, own] += share * value[image, row, column, own]
    return out
