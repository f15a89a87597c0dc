"""Deformable aggregation in plain PyTorch (Wang et al. 2023, InternImage, eq. 2; Xiong et al. 2024, DCNv4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dense import dense_arguments
from .bilinear import bilinear_sample


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


@dense_arguments
def deform_aggregate2d(
    value: Tensor,
    offset: Tensor,
    weight: Tensor | None = None,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    official_order: bool = False,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.deform_aggregate2d`; same arguments, any device, slow.

    `out[n,p,g*D+d] = sum_k weight[n,p,g,k] * bilinear(value[n,g*D+d], p0 + scale * (k * dilation - c + offset))` with
    `c = dilation * (kernel - 1) // 2` and `p0 = p * stride - padding + c`, the centre of the kernel
    """
    kernel, strides, dilations = _pair(kernel_size), _pair(stride), _pair(dilation)
    pad = _pair(padding)
    pads = pad if len(pad) == 4 else (*pad, *pad)
    n, height, width, channels = value.shape
    groups = offset.shape[3]
    # Positions and sums in at least float32, whatever is stored.
    acc = torch.promote_types(value.dtype, torch.float32)
    like = value.new_empty((), dtype=acc)

    # Where the taps lie without offsets, along y and x: [outputs of the axis, taps of the axis].
    axes = []
    for i, extent in enumerate((height, width)):
        centre = dilations[i] * (kernel[i] - 1) // 2
        count = (extent + pads[i] + pads[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        middle = torch.arange(count).to(like) * strides[i] - pads[i] + centre
        axes.append(middle[:, None] + offset_scale * (torch.arange(kernel[i]).to(like) * dilations[i] - centre))
    out_h, out_w = len(axes[0]), len(axes[1])
    taps = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    if official_order:  # column by column
        taps.sort(key=lambda tap: tap[1])
    if remove_center:
        taps.remove((kernel[0] // 2, kernel[1] // 2))
    rows = axes[0][:, [i for i, _ in taps]]  # [H', K]
    columns = axes[1][:, [j for _, j in taps]]

    if weight is None and offset.dim() == 5:  # packed: weights follow each group's offsets
        offset, weight = offset.split((2 * len(taps), len(taps)), -1)
        offset = offset.unflatten(-1, (len(taps), 2))
    y, x = (offset.flip(-1) if official_order else offset).to(acc).unbind(-1)  # [N, H', W', G, K]
    y = rows[:, None, None] + offset_scale * y
    x = columns[:, None] + offset_scale * x
    maps = value.to(acc).permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height, width)
    positions = (n * groups, out_h * out_w * len(taps))
    sampled = bilinear_sample(maps, y.movedim(3, 1).reshape(positions), x.movedim(3, 1).reshape(positions))
    sampled = sampled.reshape(n, groups, channels // groups, out_h, out_w, len(taps))
    if weight is not None:
        weight = weight.to(acc)
        sampled = sampled * (weight.softmax(-1) if softmax else weight).movedim(3, 1)[:, :, None]
    return sampled.sum(-1).permute(0, 3, 4, 1, 2).reshape(n, out_h, out_w, channels).to(value.dtype)
