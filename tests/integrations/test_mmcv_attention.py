"""Multi-scale deformable attention under mmcv's names: against plain loops, mmcv's own formula and mmcv's layer."""

import numpy as np
import pytest
import torch

from dcn_plugin.integrations.mmcv import attention


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_sums_up_bilinear_samples_of_every_level():
    sizes, heads, channels, queries, points = [(4, 5), (2, 3)], 2, 3, 4, 2
    value = drawn(2, 26, heads, channels)
    locations = drawn(2, queries, heads, 2, points, 2, seed=1) * 0.5 + 0.5  # some of them outside
    weights = drawn(2, queries, heads, 2, points, seed=2)
    expected = torch.zeros(2, queries, heads, channels, dtype=torch.float64)
    for n, q, h, level, point in np.ndindex(2, queries, heads, 2, points):
        height, width = sizes[level]
        x, y = (locations[n, q, h, level, point] * torch.tensor([width, height]) - 0.5).tolist()
        for row, column in np.ndindex(height, width):
            share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            pixel = value[n, 20 * level + row * width + column, h]
            expected[n, q, h] += weights[n, q, h, level, point] * share * pixel
    shapes, starts = torch.tensor(sizes), torch.tensor([0, 20])
    found = attention.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
    assert torch.allclose(found, expected.flatten(2))
    half = (each.half() for each in (value, locations, weights))
    value, *others = half
    found = attention.ms_deform_attn_forward(value, shapes, starts, *others, im2col_step=64)
    assert found.dtype == torch.float16
    assert torch.allclose(found.double(), expected.flatten(2), atol=0.05)


def test_attentions_gradients_are_those_of_finite_differences():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.save_for_backward(*given)
            return attention.ms_deform_attn_forward(given[0], *levels, *given[1:], 64)

        @staticmethod
        def backward(ctx, grad):
            made = [torch.zeros_like(each) for each in ctx.saved_tensors]
            value, *others = ctx.saved_tensors
            attention.ms_deform_attn_backward(value, *levels, *others, grad, *made, 64)
            return tuple(made)

    levels = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
    given = drawn(1, 16, 2, 2), drawn(1, 3, 2, 2, 2, 2, seed=1).sigmoid(), drawn(1, 3, 2, 2, 2, seed=2)
    assert torch.autograd.gradcheck(Attention.apply, [each.requires_grad_() for each in given])


def test_nothing_is_allowed():
    shapes, starts = torch.tensor([(2, 2)]), torch.tensor([0])
    given = torch.zeros(1, 4, 2, 3), shapes, starts, torch.zeros(1, 0, 2, 1, 2, 2), torch.zeros(1, 0, 2, 1, 2)
    assert attention.ms_deform_attn_forward(*given, 64).shape == (1, 0, 6)
    made = [torch.zeros_like(each) for each in (given[0], *given[3:])]
    attention.ms_deform_attn_backward(*given, torch.zeros(1, 0, 6), *made, 64)
    assert not made[0].any()


@pytest.fixture
def run(forks):
    pytest.importorskip("mmcv")
    return lambda code: forks.run(f"{SHARED}\n{code}")


SHARED = """
import torch, warnings
warnings.simplefilter("ignore")
from dcn_plugin.integrations import mmcv as stand_in
from dcn_plugin.integrations.mmcv import attention
from dcn_plugin.layers import MMCVMultiScaleDeformableAttention
stand_in.install()
import mmcv.ops.multi_scale_deform_attn as m
close = torch.testing.assert_close
torch.manual_seed(0)
SHAPES, STARTS = torch.tensor([[6, 8], [3, 4], [2, 2]]), torch.tensor([0, 48, 60])


def inputs(numbers, dtype=torch.float32):
    query, pixels = torch.randn(5, 2, 16), torch.randn(64, 2, 16)  # [Q, N, C]
    at = torch.rand(2, 5, 3, numbers) * 1.2 - 0.1
    mask = torch.rand(2, 64) < 0.3
    given = dict(query=query, value=pixels, query_pos=torch.randn_like(query), reference_points=at)
    given = {name: each.to(dtype).requires_grad_() for name, each in given.items()}
    return given, dict(key_padding_mask=mask, spatial_shapes=SHAPES, level_start_index=STARTS)
"""


def test_the_functions_are_mmcvs_formula(run):
    """mmcv's own function, which it has again after `uninstall()`; values and gradients."""
    code = """
ours = m.multi_scale_deformable_attn_pytorch
assert ours is attention.multi_scale_deformable_attn_pytorch
stand_in.uninstall()
theirs = m.multi_scale_deformable_attn_pytorch
assert theirs.__module__ == m.__name__
stand_in.install()
assert m.multi_scale_deformable_attn_pytorch is ours
for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
    draw = lambda *shape: torch.randn(shape, dtype=dtype)
    given = draw(2, 64, 4, 4), torch.rand(2, 5, 4, 3, 2, 2).to(dtype) * 1.2 - 0.1, draw(2, 5, 4, 3, 2)
    along, found = draw(2, 5, 16), []
    for function in (
        lambda v, p, w: theirs(v, SHAPES, p, w), lambda v, p, w: ours(v, SHAPES, p, w),
        lambda v, p, w: ours(v, SHAPES.tolist(), p, w),
        lambda v, p, w: m.MultiScaleDeformableAttnFunction.apply(v, SHAPES, STARTS, p, w, 64),
    ):
        own = [each.clone().requires_grad_() for each in given]
        out = function(*own)
        found.append((out, *torch.autograd.grad(out, own, along)))
    for other in found[1:]:
        for one, true in zip(other, found[0]):
            close(one, true, rtol=near, atol=near * max(1, float(true.abs().max())))
"""
    assert run(code) == ""


@pytest.mark.parametrize("numbers", [2, 4], ids=["points", "boxes"])
def test_the_layer_is_mmcvs(run, numbers):
    """Values, gradients and the start of mmcv's class, on its own formula; each takes the other's weights."""
    code = f"""
stand_in.uninstall()  # mmcv's own function again
for options in (dict(), dict(batch_first=True), dict(value_proj_ratio=0.5)):
    arguments = dict(embed_dims=16, num_heads=4, num_levels=3, num_points=2, dropout=0.0, im2col_step=8, **options)
    theirs, ours = m.MultiScaleDeformableAttention(**arguments), MMCVMultiScaleDeformableAttention(**arguments)
    for name in ("sampling_offsets", "attention_weights"):
        for kind in ("weight", "bias"):
            assert torch.equal(ours.get_parameter(f"{{name}}.{{kind}}"), theirs.get_parameter(f"{{name}}.{{kind}}"))
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    given, rest = inputs({numbers})
    first = options.get("batch_first", False)
    results = []
    for layer in (theirs, ours):
        own = {{name: each.detach().clone().requires_grad_() for name, each in given.items()}}
        turned = {{n: t if n == "reference_points" or not first else t.transpose(0, 1) for n, t in own.items()}}
        out = layer(key=None, attn_mask=None, **turned, **rest)
        again = layer(identity=torch.zeros_like(out), **turned, **rest)
        along = torch.ones_like(out).cumsum(0)
        results.append((out, again, *torch.autograd.grad(out, [*own.values(), *layer.parameters()], along)))
    for one, true in zip(*results):
        assert true.any()
        close(one, true, rtol=1e-5, atol=1e-5 * max(1, float(true.abs().max())))
    theirs.load_state_dict(ours.state_dict())
    query = torch.zeros(64, 2, 16)  # which are its own pixels
    at = torch.rand(2, 64, 3, {numbers})
    query = query.transpose(0, 1) if first else query
    alone = dict(reference_points=at, spatial_shapes=SHAPES, level_start_index=STARTS)
    close(ours(query, **alone), theirs(query, **alone))
    close(ours(query, residual=query + 1, **alone), theirs(query, identity=query + 1, **alone))
ours.init_weights()
assert not ours.sampling_offsets.weight.any()
"""
    assert run(code) == ""


def test_models_on_a_cpu_reach_our_operator(run):
    """Through mmcv's layer, in bfloat16 under autocast too, where positions stay float32."""
    code = """
asked = []
operator = attention.ops.ms_deform_attn
attention.ops.ms_deform_attn = lambda *given, **more: asked.append(given[2].dtype) or operator(*given, **more)
layer = m.MultiScaleDeformableAttention(16, 4, 3, 2, dropout=0.0)
given, rest = inputs(2)
expected = layer(**given, **rest)
assert asked == [torch.float32]
with torch.autocast("cpu", torch.bfloat16):
    found = layer(**given, **rest)
assert asked == [torch.float32] * 2
close(found.float(), expected, rtol=0.02, atol=0.02)
stand_in.uninstall()
close(layer(**given, **rest), expected)  # a layer that was built goes on working, on mmcv's formula
assert len(asked) == 2
"""
    assert run(code) == ""
