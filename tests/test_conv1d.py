"""Deformable convolution of sequences against linear interpolation written out, and a plain convolution."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dcn_plugin.layers import DeformConv1d

GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=5, stride=2, padding=3, dilation=2, bias=False),
    dict(kernel_size=2, groups=2, offset_groups=4),
    dict(kernel_size=1),
    dict(kernel_size=4, padding=2, groups=4, offset_groups=2),
]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def drawn(dtype=torch.float64, length=17, **geometry):
    torch.manual_seed(0)
    layer = DeformConv1d(4, 8, dtype=dtype, **geometry)
    x = torch.randn(2, 4, length, dtype=dtype)
    outputs = F.conv1d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).shape[2]
    taps = layer.offset_groups * layer.kernel_size
    offset = 2 * torch.randn(2, taps, outputs, dtype=dtype)
    return layer, x, offset, torch.rand(2, taps, outputs, dtype=dtype)


def by_hand(layer, x, offset, mask):
    """Every sample is a sum over all places of the sequence, with weights of a hat around its position."""
    length, outputs, taps = x.shape[2], offset.shape[2], layer.kernel_size
    columns = []
    for c in range(layer.in_channels):
        group = c // (layer.in_channels // layer.offset_groups)
        for k in range(taps):
            at = torch.arange(outputs) * layer.stride - layer.padding + k * layer.dilation + offset[:, group * taps + k]
            hat = (1 - (torch.arange(length) - at[..., None]).abs()).clamp(min=0)
            sample = (hat * x[:, c, None]).sum(-1)
            columns.append(sample if mask is None else sample * mask[:, group * taps + k])
    columns = torch.stack(columns, 1)  # channels, then taps
    return F.conv1d(columns, layer.weight.flatten(1)[..., None], layer.bias, groups=layer.groups)


@each_geometry
@pytest.mark.parametrize("modulated", [False, True])
def test_values_and_gradients_are_those_by_hand(geometry, modulated):
    layer, x, offset, mask = drawn(**geometry)
    given = [x, offset, *[mask] * modulated]
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    out, truth = layer(*ours), by_hand(layer, *theirs, *[None] * (not modulated))
    torch.testing.assert_close(out, truth)
    along, parameters = torch.randn_like(truth), list(layer.parameters())
    found = torch.autograd.grad(out, (*ours, *parameters), along)
    for one, other in zip(found, torch.autograd.grad(truth, (*theirs, *parameters), along), strict=True):
        torch.testing.assert_close(one, other)


@each_geometry
def test_without_offsets_it_is_torchs_convolution(geometry):
    layer, x, offset, _ = drawn(**geometry)
    plain = nn.Conv1d(4, 8, **{k: v for k, v in geometry.items() if k != "offset_groups"}).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, offset * 0), plain(x))


def test_dc1ds_semantics_by_what_is_done_before():
    """Its default: reflected ends, and samples that stay within the kernel. Written here from its description."""
    layer, _, _, _ = drawn(kernel_size=3, offset_groups=2)
    x, offset = torch.randn(2, 4, 10).double(), 2 * torch.randn(2, 2, 10, 3).double()
    padded = F.pad(x, (1, 1), "reflect")
    taps = torch.arange(3)
    kept = (taps + offset).clamp(0, 2) - taps
    found = layer(padded, kept.movedim(3, 2).flatten(1, 2))
    assert found.shape == (2, 8, 10)
    at = torch.arange(10)[:, None] + (taps + offset).clamp(0, 2)
    low = at.floor().clamp(max=padded.shape[2] - 2).long()
    first, second = (
        padded.unflatten(1, (2, 2)).gather(3, index.flatten(2)[:, :, None].expand(-1, -1, 2, -1))
        for index in (low, low + 1)
    )
    samples = first + (second - first) * (at - low).flatten(2)[:, :, None]
    samples = samples.unflatten(3, (10, 3)).flatten(1, 2)
    wanted = torch.einsum("nclk,ock->nol", samples, layer.weight) + layer.bias[:, None]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_with_float32_offsets_far_along_a_sequence(dtype):
    layer, x, offset, _ = drawn(torch.float32, 3000, kernel_size=3, padding=1)
    layer.load_state_dict({key: value.to(dtype).float() for key, value in layer.state_dict().items()})
    truth = layer(x.to(dtype).float(), offset)
    with torch.autocast("cpu", dtype):
        under = layer(x.to(dtype).float(), offset)
    found = copy.deepcopy(layer).to(dtype)(x.to(dtype), offset)
    for out in (under, found):
        assert out.dtype == dtype and (out.float() - truth).abs().max() < 0.02 * truth.abs().max()


@each_geometry
def test_graphs_copies_and_files(geometry):
    layer, *given = drawn(torch.float32, **geometry)
    given = tuple(given)
    expected = layer(*given)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*given), expected)
    torch.testing.assert_close(torch.jit.trace(layer, given)(*given), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.ModuleList([layer])[0])(*given), expected)
    torch.testing.assert_close(torch.export.export(layer, given).module()(*given), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = DeformConv1d(4, 8, **geometry)
    loaded.load_state_dict(torch.load(file))
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*given), expected) and repr(twin) == repr(layer)
    fake = copy.deepcopy(layer).to("meta")(*(t.to("meta") for t in given))
    assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())
    assert layer(*(t[:0] for t in given)).shape == (0, *expected.shape[1:])


def test_hooks_see_a_map_one_pixel_high():
    layer, x, offset, mask = drawn(kernel_size=3, padding=1)
    with layer.register_sampling_hook(lambda layer, samples: seen.append(samples)):
        seen = []
        layer(x, offset, mask)
    (samples,) = seen
    assert samples.input.shape == (2, 4, 1, 17) and samples.offset.shape == (2, 6, 1, 17)
    assert torch.equal(samples.offset[:, 1::2, 0], offset) and not samples.offset[:, ::2].any()
    assert torch.equal(samples.mask[:, :, 0], mask) and layer.window.output_size(1, 17) == (1, 17)
