"""The control for deformation: a convolution with a larger dilation, where a rule would put a deformable layer."""

import copy
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

import dcn_plugin
from dcn_plugin.layers import Dilated, offset_parameters, sampling_layers
from dcn_plugin.visualize import dilation_by_layer

# A convolution, the factor, and what it is then.
FORMS = [
    (dict(kernel_size=3, padding=1), 2, dict(padding=2, dilation=2)),
    (dict(kernel_size=3, padding=2, dilation=2, groups=4), 3, dict(padding=6, dilation=6, groups=4)),
    (
        dict(kernel_size=(3, 5), stride=2, padding=(0, 2), bias=False),
        (2, 1),
        dict(stride=2, padding=(1, 2), dilation=(2, 1)),
    ),
    (dict(kernel_size=3, padding="same"), 4, dict(padding=4, dilation=4)),
    (dict(kernel_size=3, padding="valid"), 2, dict(padding=1, dilation=2)),
    (dict(kernel_size=1), 5, {}),
    (dict(kernel_size=(3, 3)), 1, {}),
]
each_form = pytest.mark.parametrize(("options", "factor", "wanted"), FORMS, ids=str)


@each_form
def test_it_is_torchs_dilated_convolution(options, factor, wanted):
    double = dict(dtype=torch.float64)
    conv, x = nn.Conv2d(4, 8, **options, **double), torch.randn(2, 4, 14, 15, **double, requires_grad=True)
    layer = Dilated.from_conv(conv, factor=factor)
    out = layer(x)
    assert layer.weight is conv.weight and out.shape == conv(x).shape
    truth = F.conv2d(x, conv.weight, conv.bias, **wanted)
    torch.testing.assert_close(out, truth)
    along, tensors = torch.randn_like(out), (x, *conv.parameters())
    found = torch.autograd.grad(out, tensors, along)
    torch.testing.assert_close(found, torch.autograd.grad(truth, tensors, along))


def test_an_odd_pixel_of_padding_lies_below_and_to_the_right():
    conv, x = nn.Conv2d(4, 8, 2, padding=1), torch.randn(1, 4, 9, 9)
    layer = Dilated.from_conv(conv)
    assert layer.window.padding == (1, 1, 2, 2) and layer(x).shape == conv(x).shape
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, (1, 2, 1, 2)), conv.weight, conv.bias, dilation=2))


@each_form
def test_graphs_copies_and_layouts(options, factor, wanted):
    layer, x = Dilated(4, 8, **options, factor=factor), torch.randn(2, 4, 14, 15)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected) and repr(twin) == repr(layer)
    fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert fake.shape == expected.shape and layer(x[:0]).shape == (0, *expected.shape[1:])
    last = layer(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_rule_names_it():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    x, weight = torch.randn(1, 4, 9, 9), model[2].weight
    report = dcn_plugin.convert(model, dict(match="2", layer=dict(type="Dilated", factor=2)), (4, 9, 9))
    assert report.params_added == report.macs_added == 0 and model[2].weight is weight
    assert "Dilated(offset_groups=1, factor=(2, 2))" in str(report)
    assert offset_parameters(model) == {} and list(sampling_layers(model)) == ["2"]
    assert model(x).shape == x.shape and list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]
    assert dilation_by_layer(model, x)["2"].unique().tolist() == [2.0]
