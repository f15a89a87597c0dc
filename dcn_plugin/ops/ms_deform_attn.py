"""Multi-scale deformable attention: the public function, and what torch needs to trace and differentiate it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor | None = None,
    *,
    points: Sequence[int] | None = None,
    softmax: bool = False,
    reference_points: Tensor | None = None,
    offset_scale: float = 0.5,
) -> Tensor:
    """Sum weighted samples of several maps at learnt positions: multi-scale deformable attention.

        out(n, q, m) = sum over l, p of weight(q, m, l, p) * value_l(n, m, location(q, m, l, p) * (W_l, H_l) - 0.5)

    for query q, head m and point p of level l, with zeros outside the map and bilinear interpolation in between.
    Unlike elsewhere in this package, pairs of positions are **(x, y)**, as in every checkpoint of the field; shapes are
    (H, W).

    Args:
        value: `[N, S, M, D]`, the pixels of all levels one after the other, S = sum of H_l * W_l; float64, float32,
            float16 or bfloat16.
        spatial_shapes: (H, W) of each of the L levels: pairs, or a tensor `[L, 2]`, whose numbers are read (on CUDA
            that waits for the device; pairs do not).
        sampling_locations: `[N, Q, M, L, P, 2]` in units of each map, (0, 0) its top left corner and (1, 1) its bottom
            right one; or `[N, Q, M, K, 2]` with the K points of all levels side by side. May be float32 beside half
            values. Beside `reference_points` these are raw offsets.
        attention_weights: `[N, Q, M, L, P]` or `[N, Q, M, K]`; None: all ones. May be float32 beside half values.
        points: how many points each level has, where they differ; None: K / L each.
        softmax: take `attention_weights` as logits of a softmax over all K points of a query and head.
        reference_points: `[N, Q, L, 2]` or `[N, Q, 1, 2]` (x, y): location = reference + offset / (W_l, H_l); or
            `[..., 4]` (x, y, w, h): location = (x, y) + offset * (w, h) * offset_scale / P_l. None:
            `sampling_locations` are locations.
        offset_scale: the part of a box that an offset of P_l reaches.

    Returns:
        `[N, Q, M * D]`, of the values' type. A position that lies outside its map, or is infinite, contributes 0; a
        NaN position gives NaN.

    Raises:
        ValueError: a shape, size or device does not fit; levels that do not add up to S. TypeError: a type does not
            fit. Both name the argument.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import ms_deform_attn
        >>> shapes = [(6, 8), (3, 4)]
        >>> value = torch.ones(1, 6 * 8 + 3 * 4, 2, 16)  # 2 heads of 16 channels
        >>> locations, logits = torch.rand(1, 5, 2, 2, 4, 2) * 0.5 + 0.25, torch.zeros(1, 5, 2, 2, 4)
        >>> out = ms_deform_attn(value, shapes, locations, logits, softmax=True)
        >>> out.shape, torch.allclose(out, torch.ones(1))
        (torch.Size([1, 5, 32]), True)

    Source: Zhu et al., Deformable DETR (2021), eq. 3.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    return reference.ms_deform_attn(
        value, spatial_shapes, sampling_locations, attention_weights,
        points=points, softmax=softmax, reference_points=reference_points, offset_scale=offset_scale,
    )  # fmt: skip
