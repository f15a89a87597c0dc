"""No path of ours gives PyTorch's `grid_sample` a half-precision map, where it computes positions in half precision.

A call that did would be stopped here before it ran.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcn_plugin import ops, reference
from dcn_plugin.export.grid_sample import grid_sample_decompositions
from dcn_plugin.layers import MMCVMultiScaleDeformableAttention, MSDeformAttn

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, pixels and reference points
HALVES = (torch.bfloat16, torch.float16)
SHAPES = [(6, 5), (3, 3)]
PIXELS, QUERIES = 39, 4


class Watch(TorchDispatchMode):
    """Stops a sampler that is given a half-precision map, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.samplers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "grid_sampler" in str(function):
            self.samplers += 1
            assert args[0].dtype not in HALVES, f"{function} of {args[0].dtype}"
        return function(*args, **(kwargs or {}))


def tensors(dtype: torch.dtype, positions: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (2, QUERIES, 2, 2, 3)
    return torch.randn(2, PIXELS, 2, 8).to(dtype), torch.rand(*shape, 2).to(positions), torch.rand(shape).to(dtype)


def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ops.ms_deform_attn(value, SHAPES, locations, weights)


def defined(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return reference.ms_deform_attn(value, SHAPES, locations, weights)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("positions", ["float32", "half"])
@pytest.mark.parametrize("function", [attention, defined])
def test_the_operator(function, positions, dtype):
    given = [t.requires_grad_() for t in tensors(dtype, torch.float32 if positions == "float32" else dtype)]
    with Watch():
        out = function(*given)
        first = torch.autograd.grad(out.float().mean(), given, create_graph=True)
        sum(t.float().square().mean() for t in first).backward()
        torch.func.jvp(function, tuple(t.detach() for t in given), tuple(torch.ones_like(t) for t in given))
    assert out.dtype == dtype and all(t.grad.isfinite().all() for t in given)


def own_layer(dtype: torch.dtype) -> Call:
    layer = MSDeformAttn(16, 2, 2, 3).to(dtype)
    return lambda query, pixels, centres: layer(query, centres, pixels, SHAPES)


def layer_of_mmcv(dtype: torch.dtype) -> Call:
    layer = MMCVMultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True).to(dtype)
    return lambda query, pixels, centres: layer(
        query, value=pixels, reference_points=centres, spatial_shapes=torch.tensor(SHAPES)
    )


def served_by_transformers(dtype: torch.dtype) -> Call:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMultiscaleDeformableAttention as Theirs,
    )

    from dcn_plugin.integrations.transformers import accelerate

    layer = Theirs(transformers.DeformableDetrConfig(d_model=16, num_feature_levels=2), 2, 3).to(dtype)
    accelerate(layer)
    return lambda query, pixels, centres: layer(
        query, encoder_hidden_states=pixels, reference_points=centres, spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )[0]  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [own_layer, layer_of_mmcv, served_by_transformers])
def test_layers(make, autocast, dtype):
    torch.manual_seed(0)
    layer, own = make(torch.float32 if autocast else dtype), torch.float32 if autocast else dtype
    query, pixels = (torch.randn(2, n, 16, dtype=own, requires_grad=True) for n in (QUERIES, PIXELS))
    with Watch(), torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(query, pixels, torch.rand(2, QUERIES, 2, 2))
        out.float().square().sum().backward()
    assert out.isfinite().all() and query.grad.isfinite().all() and pixels.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_exported_with_it(dtype):
    class Attention(nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return attention(value, locations, weights)

    given = tensors(dtype, torch.float32)
    table = {**torch.export.default_decompositions(), **grid_sample_decompositions()}
    program = torch.export.export(Attention(), given).run_decompositions(table)
    with Watch() as watch, torch.no_grad():
        out = program.module()(*given)
    assert watch.samplers == len(SHAPES) and out.dtype == dtype
    torch.testing.assert_close(out, attention(*given), rtol=0.02, atol=0.02)
