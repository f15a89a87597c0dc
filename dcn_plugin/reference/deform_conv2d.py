"""Deformable convolution v1/v2 in plain PyTorch (Dai et al. 2017, eq. 2; Zhu et al. 2019, eq. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dense import dense_arguments
from .bilinear import bilinear_sample


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


@dense_arguments
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.deform_conv2d`; same arguments, any device, slow.

    `out[n,o,p] = bias[o] + sum_{k,c} weight[o,c,k] * mask[n,k,p] *
    bilinear(input[n,c], p * stride - pad + p_k + offset[k])`
    """
    (sy, sx), (dy, dx) = _pair(stride), _pair(dilation)
    pad = _pair(padding)
    top, left, bottom, right = pad if len(pad) == 4 else (*pad, *pad)
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    taps, groups = kh * kw, channels // group_channels
    offset_groups = offset.shape[1] // (2 * taps)
    out_h = (height + top + bottom - dy * (kh - 1) - 1) // sy + 1
    out_w = (width + left + right - dx * (kw - 1) - 1) // sx + 1

    # Positions and sums in at least float32, whatever is stored.
    acc = torch.promote_types(input.dtype, torch.float32)
    like = input.new_empty((), dtype=acc)
    base_y = (torch.arange(out_h).to(like) * sy - top)[:, None] + (torch.arange(kh).to(like) * dy)[:, None, None, None]
    base_x = (torch.arange(out_w).to(like) * sx - left) + (torch.arange(kw).to(like) * dx)[:, None, None]
    shift = offset.to(acc).reshape(n, offset_groups, kh, kw, 2, out_h, out_w)
    y = shift[:, :, :, :, 0] + base_y  # [N, offset_groups, kh, kw, H', W']
    x = shift[:, :, :, :, 1] + base_x

    per_group = input.to(acc).reshape(n * offset_groups, channels // offset_groups, height, width)
    positions = (n * offset_groups, taps * out_h * out_w)  # no -1, which reshape cannot infer for an empty batch
    columns = bilinear_sample(per_group, y.reshape(positions), x.reshape(positions))
    columns = columns.reshape(n, offset_groups, channels // offset_groups, taps, out_h, out_w)
    if mask is not None:
        columns = columns * mask.to(acc).reshape(n, offset_groups, 1, taps, out_h, out_w)
    columns = columns.reshape(n, groups, group_channels, taps, out_h, out_w)
    kernel = weight.to(acc).reshape(groups, out_channels // groups, group_channels, taps)
    out = torch.einsum("ngckyx,gock->ngoyx", columns, kernel).reshape(n, out_channels, out_h, out_w)
    if bias is not None:
        out = out + bias.to(acc)[:, None, None]
    return out.to(input.dtype)
