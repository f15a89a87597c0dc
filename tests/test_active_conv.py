"""Active convolution against an ordinary one whose larger kernel holds the taps' bilinear weights, and its training."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

import dcn_plugin
from dcn_plugin.layers import ActiveConv2d, offset_parameters, reset_offsets
from dcn_plugin.visualize import record

GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, groups=2, offset_groups=2),
    dict(kernel_size=(1, 5), padding=(0, 2), dilation=(1, 2), bias=False),
    dict(kernel_size=(2, 3), padding=(1, 0, 2, 1), offset_groups=4),
    dict(kernel_size=4, padding="same"),
    dict(kernel_size=(1, 2), groups=4),
]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
REACH = 3


def moved(dtype=torch.float64, spread=1.0, **options):
    torch.manual_seed(0)
    layer = ActiveConv2d(4, 8, **dict(dtype=dtype) | options)
    nn.init.uniform_(layer.moves, -spread, spread)
    return layer, torch.randn(2, 4, 9, 11, dtype=dtype)


def all_moves(layer):
    """`[G, K, 2]`, with the middle tap."""
    kh, kw = layer.kernel_size
    if kh % 2 and kw % 2:
        half = kh * kw // 2
        still = torch.zeros(layer.offset_groups, 1, 2, dtype=layer.moves.dtype)
        return torch.cat((layer.moves[:, :half], still, layer.moves[:, half:]), 1)
    return layer.moves


def as_one_convolution(layer, x):
    """Taps at fractions of pixels are weights on the four pixels around: a kernel that reaches farther."""
    (kh, kw), (dy, dx) = layer.kernel_size, layer.dilation
    top, left, bottom, right = layer.padding4
    moves, per_group = all_moves(layer), layer.in_channels // layer.offset_groups
    rows = torch.arange(-REACH, dy * (kh - 1) + REACH + 1)
    columns = torch.arange(-REACH, dx * (kw - 1) + REACH + 1)
    per_channel = torch.arange(layer.in_channels) // per_group
    groups = torch.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    width = layer.in_channels // layer.groups
    kernels = []
    for o in range(layer.out_channels):
        channels = []
        for c in range(width):
            group = per_channel[groups[o] * width + c]
            kernel = 0
            for k in range(kh * kw):
                y = k // kw * dy + moves[group, k, 0]
                x_ = k % kw * dx + moves[group, k, 1]
                hat = (1 - (rows - y).abs()).clamp(min=0)[:, None] * (1 - (columns - x_).abs()).clamp(min=0)
                kernel = kernel + layer.weight[o, c].flatten()[k] * hat
            channels.append(kernel)
        kernels.append(torch.stack(channels))
    padded = F.pad(x, (left + REACH, right + REACH, top + REACH, bottom + REACH))
    return F.conv2d(padded, torch.stack(kernels), layer.bias, layer.stride, groups=layer.groups)


@each_geometry
def test_values_and_gradients_are_those_of_a_larger_kernel(geometry):
    layer, x = moved(normalise=False, **geometry)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, truth, parameters = layer(ours), as_one_convolution(layer, theirs), list(layer.parameters())
    torch.testing.assert_close(out, truth)
    along = torch.randn_like(truth)
    found = torch.autograd.grad(out, (ours, *parameters), along)
    right = torch.autograd.grad(truth, (theirs, *parameters), along, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


@each_geometry
def test_gradients_of_moves_have_length_one(geometry):
    layer, x = moved(**geometry)
    plain = copy.deepcopy(layer)
    plain.normalise = False
    for each in (layer, plain):
        each(x).square().sum().backward()
    direction = plain.moves.grad / plain.moves.grad.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(layer.moves.grad, direction)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    layer.zero_grad()
    (0 * layer(x)).sum().backward()  # no direction is no gradient, not NaN
    assert not layer.moves.grad.any()


@each_geometry
def test_a_fresh_layer_is_the_convolution(geometry):
    options = {key: value for key, value in geometry.items() if key != "offset_groups"}
    if isinstance(options.get("padding"), tuple) and len(options["padding"]) == 4:
        options["padding"] = 1
    conv = nn.Conv2d(4, 8, **options)
    layer, x = ActiveConv2d.from_conv(conv), torch.randn(2, 4, 9, 11)
    assert layer.weight is conv.weight
    torch.testing.assert_close(layer(x), conv(x))


def test_convert_and_rates():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    rule = dict(match="2", layer=dict(type="ActiveConv2d", offset_groups=2, warmup=3))
    report = dcn_plugin.convert(model, rule, (4, 8, 8))
    assert report.params_added == 2 * 8 * 2 and report.macs_added == 0
    assert "ActiveConv2d(offset_groups=2, normalise=True, warmup=3)" in str(report)
    assert offset_parameters(model) == {"2.moves": 0.01} and model[2].calls == 0


def test_moves_wait_for_the_weights():
    layer, x = moved(torch.float32, kernel_size=3, padding=1, warmup=2)
    for call in range(4):
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert bool(layer.moves.grad.any()) is (call >= 2) and layer.weight.grad.any()
    layer.eval()(x)
    assert layer.calls == 4
    loaded = ActiveConv2d(4, 8, 3, padding=1, warmup=2)
    loaded.load_state_dict(layer.state_dict())
    assert loaded.calls == 4
    loaded.reset_parameters()
    assert loaded.calls == 0 and not loaded.moves.any()


def test_a_checkpointed_part_counts_once():
    layer, x = moved(torch.float32, kernel_size=3, warmup=5)
    torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.calls == 1


def test_an_image_of_ones_is_no_reason_to_move():
    layer, _ = moved(torch.float32, kernel_size=3)
    layer(torch.ones(1, 4, 12, 12)).sum().backward()
    assert layer.moves.grad.norm(dim=-1).max() < 1.001 and layer.moves.grad.isfinite().all()


def test_official_blobs_compute_what_they_did():
    """Written from the definition: taps one by one, in the official order, at the official places."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    angles = torch.arange(8) * (torch.pi / 4)
    x = torch.cat((torch.zeros(1), angles.cos().round() + 0.3 * torch.randn(8)))
    y = torch.cat((torch.zeros(1), angles.sin().round() + 0.3 * torch.randn(8)))
    layer, image = ActiveConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 7, 8)
    layer.load_official(weight, x.view(1, 1, 3, 3), y.view(1, 1, 3, 3), bias)
    expected = torch.zeros(1, 6, 7, 8) + bias[:, None, None]
    reach = 4
    padded = F.pad(image, (reach,) * 4)
    side = torch.arange(-reach, reach + 1)
    for k in range(9):
        hat = (1 - (side - y[k]).abs()).clamp(min=0)[:, None] * (1 - (side - x[k]).abs()).clamp(min=0)
        shifted = F.conv2d(padded, hat.expand(4, 1, -1, -1), groups=4)
        expected = expected + torch.einsum("oc,nchw->nohw", weight.flatten(2)[..., k], shifted)
    torch.testing.assert_close(layer(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_float32_whatever_the_values_are(dtype):
    layer, x = moved(torch.float32, kernel_size=3, padding=1)
    layer.load_state_dict({key: value.to(dtype).float() for key, value in layer.state_dict().items()})
    x = torch.randn(1, 4, 3, 700).to(dtype)
    truth = layer(x.float())
    with torch.autocast("cpu", dtype):
        under = layer(x.float())
    half = copy.deepcopy(layer).to(dtype)
    with half.register_sampling_hook(lambda layer, samples: seen.append(samples.offset.dtype)):
        seen = []
        found = half(x)
    assert seen == [torch.float32]
    for out in (under, found):
        assert out.dtype == dtype and (out.float() - truth).abs().max() < 0.02 * truth.abs().max()


@each_geometry
def test_graphs_copies_and_files(geometry):
    layer, x = moved(torch.float32, **geometry)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))(x), expected)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    other = torch.randn(3, 4, 17, 10)
    torch.testing.assert_close(torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()(other), layer(other))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = ActiveConv2d(4, 8, **geometry)
    loaded.load_state_dict(torch.load(file))
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected) and repr(twin) == repr(layer)
    fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


def test_compiled_training_is_training():
    layer, x = moved(torch.float32, kernel_size=3, padding=1, warmup=1)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for call in range(2):
        for each in (layer, compiled):
            each.zero_grad()
            each(x).square().sum().backward()
        assert bool(layer.moves.grad.any()) is bool(call)
        torch.testing.assert_close(twin.moves.grad, layer.moves.grad)
    assert twin.calls == layer.calls == 2


def test_pictures_and_starting_again():
    layer, _ = moved(torch.float32, kernel_size=3, padding=1, dilation=2)
    model, image = nn.Sequential(layer), torch.rand(1, 4, 9, 9)
    (item,) = record(model, image)
    taps = torch.cartesian_prod(torch.arange(3), torch.arange(3)) * 2 - 1
    torch.testing.assert_close(item.positions(3, 4), torch.tensor([3.0, 4.0]) + taps + all_moves(layer)[0].detach())
    reset_offsets(model)
    assert not layer.offsets(image)[0].any() and layer.weight.any()


def test_memory_that_is_given_later_is_initialised():
    """As transformers does: built on meta, given memory, and handed to an initialiser that knows nothing of it."""
    layer = ActiveConv2d(4, 8, 3, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    if not layer._is_hf_initialized:
        layer._is_hf_initialized = True
    assert not layer.moves.any() and layer.weight.isfinite().all() and layer.weight.any()


def test_a_bias_that_does_not_fit_changes_nothing():
    layer = ActiveConv2d(4, 6, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="bias: expected shape"):
        layer.load_official(torch.ones(6, 4, 3, 3), torch.zeros(9), torch.zeros(9), torch.zeros(5))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
