"""Multi-scale deformable attention in plain PyTorch (Zhu et al. 2021, eq. 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dense import dense_arguments
from .bilinear import bilinear_sample


@dense_arguments
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int] | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor | None = None,
    *,
    points: Sequence[int] | None = None,
    softmax: bool = False,
    reference_points: Tensor | None = None,
    offset_scale: float = 0.5,
) -> Tensor:
    """Executable definition of `dcn_plugin.ops.ms_deform_attn`; same arguments, any device, slow.

    `out[n,q,m*D+d] = sum_{l,p} weight[n,q,m,l,p] * bilinear(value_l[n,m,d], location[n,q,m,l,p] * (W_l, H_l) - 0.5)`

    `spatial_shapes` may come as pairs or as one list (H_0, W_0, H_1, W_1, ...).
    """
    sizes = [int(i) for pair in spatial_shapes for i in (pair if isinstance(pair, Sequence) else (pair,))]
    n, _, heads, channels = value.shape
    queries, levels = sampling_locations.shape[1], len(sizes) // 2
    given = sampling_locations.flatten(3, -2)  # [N, Q, M, K, 2], the points of all levels side by side
    counts = list(points) if points is not None else [given.shape[3] // levels] * levels

    # Positions and sums in at least float32, whatever is stored.
    acc = torch.promote_types(value.dtype, torch.float32)
    weights = None if attention_weights is None else attention_weights.flatten(3).to(acc)
    if weights is not None and softmax:
        weights = weights.softmax(-1)
    out = value.new_zeros((n * heads, channels, queries), dtype=acc)
    first_row = first_point = 0
    for level, count in enumerate(counts):
        height, width = sizes[2 * level : 2 * level + 2]
        size = torch.tensor([width, height], dtype=acc, device=value.device)
        here = given[:, :, :, first_point : first_point + count].to(acc)
        if reference_points is None:
            position = here * size - 0.5
        else:
            reference = reference_points[:, :, min(level, reference_points.shape[2] - 1), None, None].to(acc)
            centre = reference[..., :2] * size - 0.5
            # An offset is in pixels of the level, or, beside boxes, in what a point has of half a box.
            unit = reference[..., 2:] * size * (offset_scale / count) if reference.shape[-1] == 4 else 1
            position = centre + here * unit
        position = position.permute(0, 2, 1, 3, 4).reshape(n * heads, queries * count, 2)
        rows = value[:, first_row : first_row + height * width].to(acc)
        maps = rows.permute(0, 2, 3, 1).reshape(n * heads, channels, height, width)
        sampled = bilinear_sample(maps, position[..., 1], position[..., 0])
        sampled = sampled.reshape(n * heads, channels, queries, count)
        if weights is not None:
            own = weights[:, :, :, first_point : first_point + count].transpose(1, 2)
            sampled = sampled * own.reshape(n * heads, 1, queries, count)
        out = out + sampled.sum(-1)
        first_row, first_point = first_row + height * width, first_point + count
    out = out.reshape(n, heads, channels, queries).permute(0, 3, 1, 2)
    return out.reshape(n, queries, heads * channels).to(value.dtype)
