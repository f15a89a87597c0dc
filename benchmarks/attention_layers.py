"""The layer of multi-scale deformable attention, transformers' layer on its fallback, and what a layer consists of."""

from collections.abc import Sequence
from importlib.util import find_spec

import attention_peers as peers
import torch
from harness import OURS, Call, differentiated
from torch import Tensor, nn

from dcn_plugin.layers import MSDeformAttn
from dcn_plugin.ops import ms_deform_attn

PARTS = "parts"
LINEARS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def parameters(layer: nn.Module) -> list[nn.Parameter]:
    """In one order for all."""
    return [parameter for name in LINEARS for parameter in getattr(layer, name).parameters()]


def layer_calls(
    name: str, points: Tensor, levels: Sequence[tuple[int, int]], heads: int, channels: int, count: int, std: float
) -> dict[str, Call]:
    """The calls of a contestant on queries with these reference points; `std`: what the offsets vary by, in pixels."""
    if name not in (OURS, PARTS, peers.FALLBACK) or (name == peers.FALLBACK and not find_spec("transformers")):
        return {}
    torch.manual_seed(0)
    batch, queries, width = *points.shape[:2], heads * channels
    layer = MSDeformAttn(width, len(levels), heads, count)
    with torch.no_grad():  # queries are N(0, 1), and so the logits; offsets are N(first offset, std^2)
        layer.sampling_offsets.weight.normal_(std=std / width**0.5)
        for parameter in layer.attention_weights.parameters():
            parameter.normal_(std=width**-0.5)
    query, grad = torch.randn(batch, queries, width, requires_grad=True), torch.randn(batch, queries, width)
    flat = torch.randn(batch, sum(h * w for h, w in levels), width, requires_grad=True)
    points = points.expand(-1, -1, len(levels), -1)
    shapes, starts = peers.tables(tuple(levels), flat.device)
    if name == PARTS:
        return of_parts(layer, query, flat, points, levels, grad)
    if name == OURS:

        def forward() -> Tensor:
            return layer(query, points, flat, levels, starts)
    else:
        layer = transformers_layer(layer)

        def forward() -> Tensor:
            return layer(
                query, encoder_hidden_states=flat, reference_points=points, spatial_shapes=shapes,
                spatial_shapes_list=levels,
            )[0]  # fmt: skip

    return differentiated(forward, [query, flat, *parameters(layer)], grad)


def transformers_layer(ours: nn.Module) -> nn.Module:
    """With the same weights."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    config = DeformableDetrConfig(d_model=ours.output_proj.out_features, num_feature_levels=ours.n_levels)
    layer = theirs.DeformableDetrMultiscaleDeformableAttention(config, ours.n_heads, ours.n_points)
    layer.load_state_dict(ours.state_dict())
    return layer


def of_parts(
    layer: nn.Module, query: Tensor, flat: Tensor, points: Tensor, levels: Sequence[tuple[int, int]], grad: Tensor
) -> dict[str, Call]:
    """The operator on locations and weights made beforehand, and the four linear layers beside it."""
    heads, shape = layer.n_heads, (*query.shape[:2], layer.n_heads, layer.n_levels, layer.n_points)
    with torch.no_grad():
        size = torch.tensor(levels, dtype=torch.float32).flip(1)[:, None]
        locations = points[:, :, None, :, None] + layer.sampling_offsets(query).view(*shape, 2) / size
        weights = layer.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
    locations.requires_grad_()
    weights.requires_grad_()
    tensors = [query, flat, locations, weights, *parameters(layer)]

    def forward() -> list[Tensor]:
        value = layer.value_proj(flat).unflatten(-1, (heads, -1))
        out = layer.output_proj(ms_deform_attn(value, levels, locations, weights))
        return [out, layer.sampling_offsets(query), layer.attention_weights(query)]

    with torch.no_grad():
        grads = [grad, *(torch.randn_like(t) for t in forward()[1:])]

    @torch.no_grad()
    def alone() -> list[Tensor]:
        return forward()

    def both() -> list[Tensor]:
        out = forward()
        return [*out, *torch.autograd.grad(out, tensors, grads)]

    return {"forward": alone, "forward+backward": both}
