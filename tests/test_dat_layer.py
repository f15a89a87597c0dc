"""Attention to a deformed grid against DAT's formulas written again (`dat_formulas.py`), and its pictures."""

import copy
from unittest import mock

import pytest
import torch
import torch.fx
from dat_formulas import deformable, positions
from torch import nn

from dcn_plugin.layers import DAttention, dat, offset_parameters, reset_offsets, sampling_layers
from dcn_plugin.visualize import dilation_by_layer, offset_field, record, sampling_points, trace

# n_groups, stride, ksize, offset_range_factor, plus, q_size
FORMS = {
    "2022": dict(n_groups=2),
    "2022 one group": dict(n_groups=1, ksize=3, offset_range_factor=0.5),
    "2022 strided": dict(n_groups=4, ksize=5, stride=2),
    "plus": dict(n_groups=2, ksize=9, stride=4, offset_range_factor=-1, plus=True),
    "plus dense": dict(n_groups=4, ksize=3, stride=1, offset_range_factor=-1, plus=True),
    "plus, patches": dict(n_groups=1, ksize=3, stride=3, offset_range_factor=-1, plus=True),
    "plus, bounded": dict(n_groups=2, ksize=5, stride=2, offset_range_factor=1.5, plus=True),
    "another size": dict(n_groups=2, q_size=(14, 5)),
}
each_form = pytest.mark.parametrize("form", FORMS)


def drawn(form, dtype=torch.float64):
    """A layer whose samples have moved, some of them beyond the map, and its input."""
    torch.manual_seed(0)
    layer = DAttention(**dict(dim=16, n_heads=4, q_size=(9, 12)) | FORMS[form])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype), torch.randn(2, 16, 9, 12, dtype=dtype)


def expected(layer, x, state=None):
    state = dict(layer.named_parameters()) if state is None else state
    return deformable(state, x, layer.n_heads, layer.n_groups, layer.stride, layer.offset_range_factor, layer.plus)


@each_form
def test_values_and_gradients_are_those_of_the_formula(form):
    layer, x = drawn(form)
    found, right = (x.clone().requires_grad_() for _ in range(2))
    twin = copy.deepcopy(layer)
    out, truth = layer(found), expected(twin, right)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    along = torch.randn_like(truth)
    out.backward(along)
    truth.backward(along)
    torch.testing.assert_close(found.grad, right.grad, rtol=1e-8, atol=1e-8)
    for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert other.grad.abs().max() > 1e-3 or name == "proj_k.bias"  # which a softmax does not see
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8)


@each_form
def test_hooks_see_what_was_sampled(form):
    """Places and offsets together are the formula's positions, in pixels."""
    layer, x = drawn(form)
    with layer.register_sampling_hook(lambda layer, samples: seen.append(samples)):
        seen = []
        layer(x)
    (samples,) = seen
    assert torch.equal(samples.offset, layer.offsets(x)[0]) and layer.offsets(x)[1] is samples.mask is None
    moved, start = positions(
        dict(layer.named_parameters()), x, layer.n_groups, layer.stride, layer.offset_range_factor, layer.plus
    )
    pixels = torch.tensor([9 - 1, 12 - 1]) / 2
    torch.testing.assert_close(layer.places(samples), (start + 1) * pixels)
    offset = samples.offset.unflatten(1, (layer.n_groups, 2)).flatten(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer.places(samples) + offset, (moved + 1) * pixels)


@each_form
def test_a_fresh_layer_is_undeformed(form):
    layer, x = drawn(form)
    for make in (layer.reset_offsets, layer.reset_parameters, lambda: reset_offsets(nn.Sequential(layer))):
        nn.init.normal_(layer.conv_offset[3].weight)
        assert layer.offsets(x)[0].any()
        make()
        assert not layer.offsets(x)[0].any()
    assert layer.rpe_table.any() and layer.rpe_table.abs().max() < 0.1
    assert set(offset_parameters(layer)) == {f"conv_offset.{name}" for name, _ in layer.conv_offset.named_parameters()}


def test_memory_that_is_given_later_is_initialised():
    layer = DAttention(8, 2, 1, 4, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters()) and layer(torch.rand(1, 8, 4, 4)).any()


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 1)])
def test_maps_of_one_pixel_are_served(plus, size):
    """The original divides by nothing there."""
    torch.manual_seed(0)
    layer = DAttention(8, 4, 2, 7, 5, 4 if plus else 1, -1.0 if plus else 2.0, plus)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 8, *size, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in (x, *layer.parameters()))
    if size == (1, 1):  # every sample is the pixel
        constant = layer.proj_out(layer.proj_v(x)) if plus else None
        assert constant is None or torch.allclose(out, constant, atol=1e-6)


def test_no_images_are_allowed():
    layer, x = drawn("2022")
    out = layer(x[:0].requires_grad_())
    assert out.shape == (0, 16, 9, 12)
    out.sum().backward()
    assert layer.offsets(x[:0])[0].shape == (0, 4, 9, 12)


def test_what_is_dropped_is_dropped_in_training_alone():
    torch.manual_seed(0)
    layer, x = DAttention(16, 4, 2, (9, 12), attn_drop=0.5, proj_drop=0.5).double(), torch.randn(1, 16, 9, 12).double()
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert not torch.equal(layer.train()(x), layer(x))
    assert 0.4 < (layer(x) == 0).double().mean() < 0.6


@pytest.mark.parametrize("how", ["half", "autocast"])
def test_positions_are_float32_whatever_the_values_are(how):
    """On a wide map, where positions rounded to bfloat16 lie whole pixels away."""
    torch.manual_seed(0)
    layer, x = DAttention(16, 4, 2, 8, offset_range_factor=-1, plus=True), torch.randn(1, 16, 3, 250).bfloat16()
    layer.load_state_dict({key: value.bfloat16().float() for key, value in layer.state_dict().items()})
    truth, positions = layer(x.float()), dat._positions
    with mock.patch.object(dat, "_positions", lambda *given: positions(*given).bfloat16().float()):
        rounded = layer(x.float())
    if how == "half":
        found = copy.deepcopy(layer).bfloat16()(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x.float())
    assert found.dtype == torch.bfloat16
    error, of_rounding = ((t.float() - truth).abs().mean() / truth.std() for t in (found, rounded))
    assert error < 0.02 and of_rounding > 3 * error, (error, of_rounding)


def test_it_is_traced_by_torch_fx():
    layer, x = drawn("plus")
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(traced(x), layer(x))


def test_a_table_of_another_size_means_the_same_ways():
    small, x = drawn("2022")
    state = small.state_dict()
    fine = nn.functional.interpolate(state["rpe_table"][None], (65, 89), mode="bilinear", align_corners=True)[0]
    large = DAttention(16, 4, 2, (33, 45)).double()
    large.load_state_dict(state | dict(rpe_table=fine))
    torch.testing.assert_close(large(x), small(x))


# -- pictures ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A stem with stride 4, and two layers of attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.first = DAttention(8, 2, 2, 8, 5, 2, -1.0, True)
        self.second = DAttention(8, 2, 1, 8, 3)

    def forward(self, x):
        return self.second(self.first(self.stem(x)))


@pytest.fixture
def moved():
    torch.manual_seed(0)
    model = Model().eval()
    for name in offset_parameters(model):
        nn.init.normal_(model.get_parameter(name), std=0.3)
    return model, torch.rand(1, 3, 32, 32)


def test_records_have_places_and_moves(moved):
    model, images = moved
    first, second = record(model, images)
    assert list(sampling_layers(model)) == [first.name, second.name] == ["first", "second"]
    assert first.offset.shape == (1, 2, 1, 2, 4, 4) and second.offset.shape == (1, 1, 1, 2, 8, 8)
    assert first.input_size == (8, 8) and first.grid == first.out_grid == ((4.0, 1.5), (4.0, 1.5))
    maps = model.stem(images)
    offset, _ = model.first.offsets(maps)
    torch.testing.assert_close(first.offset.flatten(1, 3), offset)
    # DAT++ of four samples: 2 * 0.5 / 3 - 1 of eight pixels' centres, and from there on by 2 / 3 of half of them.
    torch.testing.assert_close(first.places[:, 0, 0], (torch.tensor([1, 3, 5, 6]) / 3 * 3.5))
    every = first.places + offset[0, 2:].permute(1, 2, 0)
    torch.testing.assert_close(first.positions(3, 5, group=1), every.reshape(-1, 2))
    assert torch.equal(first.positions(3, 5), first.positions(0, 0))


def test_every_unit_reads_all_samples(moved):
    model, images = moved
    records = record(model, images)
    last = trace(records[1:], (3.0, 3.0))
    assert last.shape == (64, 2) and torch.equal(last, trace(records[1:], (30.0, 17.0)))
    torch.testing.assert_close(last, records[1].positions(0, 0) * 4 + 1.5)
    # Through both, the first layer's: each of its queries reads all of them, once.
    torch.testing.assert_close(trace(records, (3.0, 3.0), group=1), records[0].positions(0, 0, 1) * 4 + 1.5)
    with pytest.raises(ValueError, match="unit: expected"):
        trace(records, (40.0, 3.0))


def test_pictures_of_points_and_offsets(moved):
    pytest.importorskip("matplotlib")
    model, images = moved
    item = record(model, images, ["second"])[0]
    points = sampling_points(model, images, (8, 8), layers=1).axes[0].collections[0].get_offsets()
    torch.testing.assert_close(torch.tensor(points.tolist()), (item.positions(0, 0) * 4 + 1.5).flip(1))
    arrows = offset_field(model, images[0], "second").axes[0].collections[0]
    start, length = item.places.reshape(-1, 2) * 4 + 1.5, item.offset[0, 0, 0].flatten(1) * 4
    torch.testing.assert_close(torch.tensor(arrows.get_offsets().tolist()), start.flip(1))
    torch.testing.assert_close(torch.tensor(arrows.V.tolist()), length[0])


def test_a_grid_has_no_dilation(moved):
    with pytest.raises(ValueError, match="model: expected deformable convolutions inside, got Model without any"):
        dilation_by_layer(*moved)
