"""DCNv1 and DCNv2 whose kernels move as a whole: six or four numbers for each position in place of two for each tap."""

import copy

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

import dcn_plugin
from dcn_plugin import reference
from dcn_plugin.layers import DCNv1, DCNv2, PrefixPredictor, offset_parameters

FORMS = {"affine": 6, "similarity": 4}
each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", [DCNv1, DCNv2])
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(2, 5), padding=(1, 0, 2, 3), dilation=(2, 1), stride=(1, 2)),
    dict(kernel_size=4, padding="same", dilation=2),
    dict(kernel_size=1),
]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def moved(kind, form, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = kind(4, 6, offset_groups=2, offset_form=form, dtype=dtype, **options)
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer, torch.randn(2, 4, 11, 12, dtype=dtype)


def by_hand(layer, x):
    """Offsets of each tap of each group at each position, one by one."""
    (kh, kw), (dy, dx), groups = layer.kernel_size, layer.dilation, layer.offset_groups
    top, left, bottom, right = layer.padding4
    predictor = layer.conv_offset
    raw = F.conv2d(
        F.pad(x, (left, right, top, bottom)), predictor.weight, predictor.bias, layer.stride, 0, layer.dilation
    )
    count, found = FORMS[layer.offset_form], []
    for g in range(groups):
        numbers = [raw[:, g * count + i] for i in range(count)]
        for i in range(kh):
            for j in range(kw):
                y, x_ = (i - (kh - 1) / 2) * dy, (j - (kw - 1) / 2) * dx
                if layer.offset_form == "affine":
                    a, b, c, d, down, right = numbers
                    found += [a * y + b * x_ + down, c * y + d * x_ + right]
                else:
                    u, v, down, right = numbers
                    found += [u * y - v * x_ + down, v * y + u * x_ + right]
    return torch.stack(found, 1), raw[:, groups * count :]


@each_geometry
@each_form
@each_kind
def test_offsets_and_masks_are_those_by_hand(kind, form, geometry):
    layer, x = moved(kind, form, **geometry)
    offset, mask = layer.offsets(x)
    expected, logits = by_hand(layer, x)
    torch.testing.assert_close(offset, expected)
    if kind is DCNv2:
        torch.testing.assert_close(mask, 2 * logits.sigmoid())
    else:
        assert mask is None and not logits.numel()


@each_geometry
@each_form
@each_kind
def test_values_and_gradients_are_those_of_the_definition(kind, form, geometry):
    layer, x = moved(kind, form, **geometry)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, parameters = layer(ours), list(layer.parameters())
    offset, logits = by_hand(layer, theirs)
    mask = 2 * logits.sigmoid() if kind is DCNv2 else None
    truth = reference.deform_conv2d(
        theirs, offset, layer.weight, layer.bias, layer.stride, layer.padding4, layer.dilation, mask
    )
    torch.testing.assert_close(out, truth)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (ours, *parameters), along)
    for one, other in zip(found, torch.autograd.grad(truth, (theirs, *parameters), along), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)


@each_kind
def test_a_matrix_scales_and_turns_the_kernel(kind):
    """As convolutions with a larger dilation, a turned kernel, and a moved image do."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 14, 14)

    def out(form, numbers):
        layer = kind(4, 6, 3, padding=1, offset_form=form)
        layer.conv_offset.bias.data[: len(numbers)] = torch.tensor(numbers)
        return layer, layer(x)

    for form, twice in (("affine", [1.0, 0, 0, 1.0, 0, 0]), ("similarity", [1.0, 0, 0, 0])):
        layer, found = out(form, twice)
        wanted = F.conv2d(x, layer.weight, layer.bias, padding=2, dilation=2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # A quarter of a turn against the clock: the tap to the right reads above.
    for form, turn in (("affine", [-1.0, -1.0, 1.0, -1.0, 0, 0]), ("similarity", [-1.0, 1.0, 0, 0])):
        layer, found = out(form, turn)
        wanted = F.conv2d(x, layer.weight.rot90(1, (2, 3)), layer.bias, padding=1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for form, shift in (("affine", [0, 0, 0, 0, 2.0, -1.0]), ("similarity", [0, 0, 2.0, -1.0])):
        layer, found = out(form, shift)
        wanted = F.conv2d(F.pad(x, (2, 0, 0, 3)), layer.weight, layer.bias, padding=(0, 0))[:, :, 1:]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_form
@each_kind
def test_a_fresh_layer_is_the_convolution_and_converts(kind, form):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    x, weight = torch.randn(2, 4, 7, 8), model[0].weight
    before = model(x)
    rule = dict(match="0", layer=dict(type=kind.__name__, offset_form=form, offset_groups=2))
    report = dcn_plugin.convert(model, rule, (4, 7, 8))
    layer = model[0]
    assert type(layer) is kind and layer.weight is weight
    torch.testing.assert_close(model(x), before)
    outputs = 2 * (FORMS[form] + 9 * (kind is DCNv2))
    assert report.params_added == outputs * (4 * 9 + 1) and report.macs_added == outputs * 4 * 9 * 56
    assert f"offset_form='{form}'" in str(report) and f"offset_form='{form}'" in repr(layer)
    assert set(offset_parameters(layer)) == {"conv_offset.weight", "conv_offset.bias"}


@each_form
@each_kind
def test_offsets_are_float32_whatever_the_values_are(kind, form):
    layer, x = moved(kind, form, torch.bfloat16, kernel_size=3, padding=1)
    with layer.register_sampling_hook(lambda layer, samples: seen.append(samples)):
        seen = []
        out = layer(x)
    assert out.dtype == torch.bfloat16 and seen[0].offset.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        single = layer.float()
        assert single.offsets(x.float())[0].dtype == torch.float32 and single(x.float()).dtype == torch.bfloat16


@each_form
@each_kind
def test_no_images_bounds_other_maps_and_dbnets_predictor(kind, form):
    layer, x = moved(kind, form, kernel_size=3, padding=1, stride=2, offset_bound=0.25)
    assert layer(x[:0]).shape == (0, 6, 6, 6)
    assert 0 < layer.offsets(x)[0].abs().max() <= 0.25
    layer.conv_offset = PrefixPredictor(layer)
    assert layer(x).shape == (2, 6, 6, 6)
    other = kind(4, 6, 3, padding=1, offset_channels=5, offset_form=form).double()
    nn.init.ones_(other.conv_offset.weight)
    offset, _ = other.offsets(x, torch.ones(2, 5, 11, 12).double())
    assert offset.shape == (2, 18, 11, 12) and offset.any()


@each_form
@each_kind
def test_graphs_compute_the_same(kind, form):
    layer, x = moved(kind, form, torch.float32, kernel_size=3, padding=1)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))(x), expected)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    other = torch.randn(3, 4, 17, 9)
    torch.testing.assert_close(
        torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()(other), layer(other)
    )
    for twin in (copy.deepcopy(layer), kind(4, 6, 3, padding=1, offset_groups=2, offset_form=form)):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), expected)
    fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())


def test_weights_of_another_form_are_refused_in_words():
    free, turned = DCNv2(4, 6, 3), DCNv2(4, 6, 3, offset_form="affine")
    with pytest.raises(RuntimeError, match=r"\(6 numbers for 'affine' and masks of 9 taps, x 1 groups\)"):
        turned.load_state_dict(free.state_dict())
    with pytest.raises(RuntimeError, match=r"DCNv2 expects \[27, 4, 3, 3\] \(3 x 1 offset groups x 9 taps\)"):
        free.load_state_dict(turned.state_dict())
