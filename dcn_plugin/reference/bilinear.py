"""The one bilinear sampler of the reference operators."""

import torch
from torch import Tensor

from ._dense import dense_arguments


@dense_arguments
def bilinear_sample(value: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample `value` bilinearly at real positions, with zeros outside the map.

    `out[b, c, p] = sum_{i,j} max(0, 1-|y-i|) * max(0, 1-|x-j|) * value[b, c, i, j]`

    Args:
        value: `[B, C, H, W]`.
        y: `[B, P]`, row positions in pixels; `0` is the centre of the first row.
        x: `[B, P]`, column positions in pixels.

    Returns:
        `[B, C, P]`. A position with `y <= -1`, `y >= H` (likewise x), or an infinite one gives 0 and zero
        gradients; a NaN position gives NaN; a pixel whose weight is 0 is not read.
    """
    height, width = value.shape[-2:]
    not_a_number = y.isnan() | x.isnan()
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Positions outside are moved to 0 before floor(), so that no inf - inf arises in value or gradient.
    y_in, x_in = torch.where(inside, y, 0), torch.where(inside, x, 0)
    y0, x0 = y_in.detach().floor(), x_in.detach().floor()
    ly, lx = y_in - y0, x_in - x0

    flat = value.flatten(2)
    out = flat.new_zeros(*flat.shape[:2], y.shape[1])
    for row, wy in ((y0, 1 - ly), (y0 + 1, ly)):
        for col, wx in ((x0, 1 - lx), (x0 + 1, lx)):
            hit = inside & (row >= 0) & (row < height) & (col >= 0) & (col < width)
            index = torch.where(hit, row * width + col, 0).long()
            weight = torch.where(hit, wy * wx, 0)[:, None]
            if flat.shape[2] == 0:
                continue
            pixel = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
            # 0 * inf would be NaN: what has no weight is not read.
            out = out + weight * torch.where((weight == 0) & ~pixel.isfinite() | ~hit[:, None], 0, pixel)
    # NaN positions poison their value and their gradient, and nothing else.
    poison = torch.where(not_a_number, torch.nan, 0.0).to(y.dtype)
    safe_sum = torch.where(not_a_number, y, 0) + torch.where(not_a_number, x, 0)
    return out + (safe_sum * poison)[:, None].to(out.dtype)


@dense_arguments
def axis_weights(position: Tensor, read: Tensor, extent: int) -> Tensor:
    """Sum up how much samples along one axis weigh each of its `extent` pixels.

    `out[..., i] = sum_s read[..., s] * max(0, 1-|position[..., s]-i|)`, so that samples on a grid need no more than
    the product of two of these: `sum_{s,t} bilinear(value, y_s, x_t) = sum_{i,j} out_y[i] * out_x[j] * value[i, j]`.

    Args:
        position: `[..., S]`, from 0 to `extent - 1` where it is read; NaN makes NaN.
        read: `[..., S]`, which samples count.
        extent: of the axis, in pixels.
    """
    first = torch.where(read & ~position.isnan(), position, 0).long()
    beyond = position - first
    out = position.new_zeros((*position.shape[:-1], extent))
    out = out.scatter_add(-1, first, torch.where(read, 1 - beyond, 0))
    return out.scatter_add(-1, (first + 1).clamp(max=extent - 1), torch.where(read, beyond, 0))
