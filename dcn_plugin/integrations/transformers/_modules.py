"""What transformers' modules of deformable attention compute, by `ms_deform_attn`. The arguments' order is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import ms_deform_attn

Shapes = Sequence[tuple[int, int]]  # (H, W) of each level


def _pixel_of(
    reference: Tensor, offsets: Tensor, shapes: Shapes, points: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return locations [N, Q, M, K, 2] and the maps' sizes (W, H) [K, 2] in the locations' type."""
    sizes = torch.cat([offsets.new_tensor([[w, h]]).expand(p, 2) for (h, w), p in zip(shapes, points, strict=True)])
    levels = [min(level, reference.shape[2] - 1) for level, count in enumerate(points) for _ in range(count)]
    of_points = reference[:, :, None, levels]
    if reference.shape[-1] == 2:
        return of_points + offsets / sizes, sizes
    # In this order of products the numbers are theirs to the last bit, and so is the pixel.
    share = offsets.new_tensor([1 / count for count in points for _ in range(count)])[:, None]
    return of_points[..., :2] + offsets * share * of_points[..., 2:] * scale, sizes


def _nearest(locations: Tensor, sizes: Tensor) -> Tensor:
    """Return the centres of the pixels that `method="discrete"` takes; no gradient comes to them."""
    pixels = (locations.detach() * sizes + 0.5).trunc()
    return (torch.minimum(pixels.clamp_min(0), sizes - 1) + 0.5) / sizes


def _attend(
    module: Any,
    queries: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    reference: Tensor,
    shapes: Shapes,
    points: Sequence[int],
    scale: float = 0.5,
    method: str = "default",
) -> tuple[Tensor, Tensor]:
    """Return what the samples add up to [N, Q, M * D], and the weights [N, Q, M, K], of which callers hand some on."""
    n, q, _ = queries.shape
    if hidden is not None:
        value = value.masked_fill(hidden[..., None], 0.0)
    value = value.reshape(n, value.shape[1], module.n_heads, -1)
    offsets = module.sampling_offsets(queries).reshape(n, q, module.n_heads, sum(points), 2)
    weights = module.attention_weights(queries).reshape(n, q, module.n_heads, sum(points)).softmax(-1)
    # Boxes and grids may be float32 beside half offsets, never the other way round.
    offsets = offsets.to(torch.promote_types(offsets.dtype, reference.dtype))
    reference = reference.to(offsets.dtype).expand(n, q, -1, -1)
    if method == "discrete":
        precise = torch.promote_types(offsets.dtype, torch.float32)
        given = _nearest(*_pixel_of(reference.to(precise), offsets.to(precise), shapes, points, scale))
        return ms_deform_attn(value, shapes, given, weights, points=points), weights
    out = ms_deform_attn(
        value, shapes, offsets, weights, points=points, reference_points=reference, offset_scale=scale
    )  # fmt: skip
    return out, weights


def _as_theirs(out: Tensor, value: Tensor, weights: Tensor, method: str = "default") -> Tensor:
    """Under autocast our sums are half. Theirs are not where `grid_sample` or what is summed is float32."""
    kind = torch.promote_types(value.dtype, weights.dtype)
    if method == "default" and torch.is_autocast_enabled(out.device.type):
        kind = torch.promote_types(kind, torch.float32)
    return out.to(kind)


def _moved(hidden_states: Tensor, position_embeddings: Tensor | None) -> Tensor:
    return hidden_states if position_embeddings is None else hidden_states + position_embeddings


def _of_deformable_detr(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,  # True: keep
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    level_start_index: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    out, weights = _attend(
        self, _moved(hidden_states, position_embeddings), self.value_proj(encoder_hidden_states),
        None if attention_mask is None else ~attention_mask, reference_points, spatial_shapes_list,
        [self.n_points] * self.n_levels,
    )  # fmt: skip
    return self.output_proj(out), weights.unflatten(-1, (self.n_levels, self.n_points))


def _of_rt_detr_v2(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,  # True: keep
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    level_start_index: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    out, weights = _attend(
        self, _moved(hidden_states, position_embeddings), self.value_proj(encoder_hidden_states),
        None if attention_mask is None else ~attention_mask, reference_points, spatial_shapes_list,
        self.n_points_list, self.offset_scale, self.method,
    )  # fmt: skip
    return self.output_proj(out), weights


def _of_d_fine(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,  # True: keep
    reference_points: Any = None,
    encoder_hidden_states: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    # The values are taken as they come, and so is the result: these modules have no projections.
    out, weights = _attend(
        self, hidden_states, encoder_hidden_states, None if attention_mask is None else ~attention_mask,
        reference_points, spatial_shapes_list, self.num_points_list, self.offset_scale, self.decoder_method,
    )  # fmt: skip
    return _as_theirs(out, encoder_hidden_states, weights, self.decoder_method), weights


def _of_mask2former(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,  # True: padding
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor]:
    out, weights = _attend(
        self, _moved(hidden_states, position_embeddings), self.value_proj(encoder_hidden_states), attention_mask,
        reference_points, spatial_shapes_list, [self.n_points] * self.n_levels,
    )  # fmt: skip
    return self.output_proj(out), weights.unflatten(-1, (self.n_levels, self.n_points))


def _of_oneformer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,  # True: padding
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Tensor | None = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
    spatial_shapes_list: Any = None,
) -> tuple[Tensor, Tensor]:
    return _of_mask2former(
        self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, position_embeddings,
        reference_points, spatial_shapes_list,
    )  # fmt: skip


def sampled_v2(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    if method == "discrete":
        precise = sampling_locations.to(torch.promote_types(sampling_locations.dtype, torch.float32))
        sizes = [(w, h) for (h, w), p in zip(value_spatial_shapes, num_points_list, strict=True) for _ in range(p)]
        sampling_locations = _nearest(precise, precise.new_tensor(sizes))
    out = ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights, points=num_points_list)
    return _as_theirs(out, value, attention_weights, method)


def _pixel_centres(spatial_shapes_list: Shapes, valid_ratios: Tensor, device: Any) -> Tensor:
    """Encoders look from each pixel's centre; where maps are wide, half precision cannot tell neighbours apart."""
    ratios = valid_ratios.to(torch.promote_types(valid_ratios.dtype, torch.float32))
    levels = []
    for level, (height, width) in enumerate(spatial_shapes_list):
        y, x = (torch.arange(size, dtype=ratios.dtype, device=device) + 0.5 for size in (height, width))
        whole = ratios[:, level] * ratios.new_tensor([width, height])  # [N, 2], without padding
        levels.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) / whole[:, None])
    return torch.cat(levels, 1)[:, :, None] * ratios[:, None]


class MultiScaleDeformableAttention(nn.Module):
    """Sum weighted samples of several maps; `kernels` may put this forward into the module of that name.

    It has no state, and no members but what a layer of a kernel may have.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        out = ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        return _as_theirs(out, value, attention_weights)


# Which texts these were written from, as transformers 5.23 has them; of the forwards, 5.8 has the same but OneFormer's.

OURS: dict[str, Callable[..., Any]] = {
    "19f7f0e88ae2": _of_deformable_detr,  # and RT-DETR, LW-DETR, RF-DETR, PP-DocLayout v2 to v4
    "317b1239b0e6": _of_deformable_detr,  # Grounding DINO, both
    "6fc2685c8757": _of_deformable_detr,  # OmDet-Turbo
    "9803ce38c9d0": _of_rt_detr_v2,
    "28e13f72ccec": _of_d_fine,  # and DEIMv2
    "7f0c16de19f0": _of_mask2former,
    "748ab1f85617": _of_oneformer,
    # The sampler alone serves modules whose forward is a user's own.
    "01f06899b67b": MultiScaleDeformableAttention.forward,
    "2526ab48bce6": sampled_v2,
    "7d2f7b031efb": _pixel_centres,  # Deformable DETR's encoder
    "eef1c78510d8": _pixel_centres,  # Grounding DINO's, both
    "fd87aff3a1af": _pixel_centres,  # Mask2Former's
    "7c282755d48b": _pixel_centres,  # OneFormer's
}
