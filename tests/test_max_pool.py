"""Deformable max pooling against samples written out as sums over all pixels, and torch's pooling."""

import copy
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dcn_plugin import visualize
from dcn_plugin.layers import DeformMaxPool2d, DeformMaxPool2dPack, offset_parameters

GEOMETRIES = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=2),
    dict(kernel_size=(1, 3), stride=(2, 1), padding=(0, 1), offset_groups=2),
    dict(kernel_size=3, stride=1, padding=2, dilation=2, offset_groups=4),
]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def torchs(layer, x):
    """Torch's own function takes no padding of more than half of an undilated kernel."""
    y, x_ = layer.padding
    return F.max_pool2d(F.pad(x, (x_, x_, y, y), value=-torch.inf), layer.kernel_size, layer.stride, 0, layer.dilation)


def drawn(geometry, dtype=torch.float64, spread=1.5):
    layer, x = DeformMaxPool2d(4, **geometry), torch.randn(2, 4, 9, 11, dtype=dtype)
    size = torchs(layer, x).shape[2:]
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    return layer, x, spread * torch.randn(2, 2 * layer.offset_groups * taps, *size, dtype=dtype)


def by_hand(layer, x, offset):
    """A sample is a sum over all pixels with weights of a hat around its position; the largest of those on the map."""
    (kh, kw), (sy, sx), (py, px), (dy, dx) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    n, channels, height, width = x.shape
    rows, columns = offset.shape[2:]
    each = offset.view(n, layer.offset_groups, kh * kw, 2, rows, columns)
    samples = []
    for k in range(kh * kw):
        y = torch.arange(rows)[:, None] * sy - py + (k // kw) * dy + each[:, :, k, 0]
        x_ = torch.arange(columns) * sx - px + (k % kw) * dx + each[:, :, k, 1]
        hats = [
            (1 - (torch.arange(side) - at[..., None]).abs()).clamp(min=0) for side, at in ((height, y), (width, x_))
        ]
        per_group = x.view(n, layer.offset_groups, -1, height, width)
        sample = torch.einsum("ngcij,nghwi,nghwj->ngchw", per_group, *hats)
        there = (y > -1) & (y < height) & (x_ > -1) & (x_ < width)
        samples.append(torch.where(there[:, :, None], sample, -torch.inf))
    largest = torch.stack(samples).max(0).values
    return torch.where(largest == -torch.inf, 0, largest).reshape(n, channels, rows, columns)


@each_geometry
@layouts
def test_values_and_gradients_are_those_by_hand(geometry, layout):
    layer, x, offset = drawn(geometry)
    ours, theirs = ([t.clone().requires_grad_() for t in (x.to(memory_format=layout), offset)] for _ in range(2))
    out, truth = layer(*ours), by_hand(layer, *theirs)
    torch.testing.assert_close(out, truth)
    assert out.is_contiguous(memory_format=layout)
    along = torch.randn_like(truth)
    for one, other in zip(
        torch.autograd.grad(out, ours, along), torch.autograd.grad(truth, theirs, along), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other)


@each_geometry
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_one_is_torchs(geometry, dtype):
    pack, x = DeformMaxPool2dPack(4, **geometry, dtype=dtype), torch.randn(2, 4, 9, 11, dtype=dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, expected = pack(ours), torchs(pack, theirs)
    assert torch.equal(out, expected)
    along = torch.randn_like(expected)
    (found,), (truth,) = torch.autograd.grad(out, ours, along), torch.autograd.grad(expected, theirs, along)
    torch.testing.assert_close(found, truth)


def test_offsets_learn_where_the_largest_is():
    """Offsets of samples beside a bright column get a gradient towards it, and no others."""
    layer, x = DeformMaxPool2d(1, 1), torch.zeros(1, 1, 5, 9)
    x[..., 5] = 1
    offset = torch.zeros(1, 2, 5, 9)
    offset[:, 1] = 0.5
    offset.requires_grad_()
    layer(x, offset).sum().backward()
    assert not offset.grad[0, 0, :4].any()  # there is nothing below the last row
    assert offset.grad[0, 1, 2].tolist() == [0, 0, 0, 0, 1, -1, 0, 0, 0]


def test_equals_nan_and_nothing():
    layer = DeformMaxPool2d(1, (1, 2))
    x = torch.full((1, 1, 1, 2), 2.0, requires_grad=True)
    layer(x, torch.zeros(1, 4, 1, 1)).sum().backward()
    assert x.grad.flatten().tolist() == [1, 0]  # the first
    with_nan = torch.tensor([[[[1.0, torch.nan]]]])
    assert layer(with_nan, torch.zeros(1, 4, 1, 1)).isnan().all()
    assert layer(with_nan.flip(3), torch.zeros(1, 4, 1, 1)).isnan().all()
    assert layer(-x, torch.full((1, 4, 1, 1), 7.0)).tolist() == [[[[0.0]]]]  # all samples off the map
    away = torch.tensor([0.0, 0, 0, 5]).view(1, 4, 1, 1)
    assert layer(-x, away).tolist() == [[[[-2.0]]]]  # one of two: the other takes no part
    assert layer(x, torch.full((1, 4, 1, 1), torch.nan)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_values_with_float32_offsets(dtype):
    layer, x, offset = drawn(GEOMETRIES[0], torch.float32)
    out = layer(x.to(dtype), offset)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(x.to(dtype).float(), offset), rtol=1e-2, atol=1e-2)


@each_geometry
def test_graphs_copies_and_files(geometry):
    layer, x, offset = drawn(geometry, torch.float32)
    pack = DeformMaxPool2dPack(4, **geometry)
    nn.init.normal_(pack.conv_offset.weight, std=0.3)
    for module, given in ((layer, (x, offset)), (pack, (x,))):
        expected = module(*given)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*given), expected)
        torch.testing.assert_close(torch.jit.trace(module, given)(*given), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(nn.ModuleList([module])[0])(*given), expected)
        torch.testing.assert_close(torch.export.export(module, given).module()(*given), expected)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(*given), expected) and repr(twin) == repr(module)
        fake = copy.deepcopy(module).to("meta")(*(t.to("meta") for t in given))
        assert fake.shape == expected.shape
        assert module(*(t[:0] for t in given)).shape == (0, *expected.shape[1:])


def test_exported_sizes_may_change():
    pack = DeformMaxPool2dPack(4, 3, 2, 1)
    nn.init.normal_(pack.conv_offset.weight, std=0.3)
    sizes = {0: torch.export.Dim("batch")} | {
        axis: torch.export.Dim(name, min=3, max=1 << 15) for axis, name in ((2, "height"), (3, "width"))
    }
    program = torch.export.export(pack, (torch.randn(2, 4, 12, 14),), dynamic_shapes=(sizes,)).module()
    other = torch.randn(3, 4, 17, 9)
    torch.testing.assert_close(program(other), pack(other))


def test_samples_of_vmap():
    torch.manual_seed(0)
    layer, offset = DeformMaxPool2d(4, 3, 2, 1), torch.randn(3, 2, 18, 5, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(6, 4, 9, 12).contiguous(memory_format=layout).unflatten(0, (3, 2))
        alone = torch.stack([layer(*each) for each in zip(x, offset, strict=True)])
        torch.testing.assert_close(torch.func.vmap(layer)(x, offset), alone)


def test_contract():
    pack = DeformMaxPool2dPack(4, 3, 2, 1, offset_groups=2)
    x = torch.randn(1, 4, 9, 9)
    assert offset_parameters(pack) == {"conv_offset.weight": 1.0, "conv_offset.bias": 1.0}
    nn.init.constant_(pack.conv_offset.bias, 0.5)
    (seen,) = visualize.record(nn.Sequential(pack), x)
    assert seen.window == pack.window and seen.offset.shape == (1, 2, 9, 2, 5, 5)
    assert (seen.offset == 0.5).all()
    pack.reset_parameters()
    assert torch.equal(pack(x), F.max_pool2d(x, 3, 2, 1))
    assert not any(p.any() for p in pack.parameters())
