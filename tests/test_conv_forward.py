"""`_conv_forward(input, weight, bias)`: what other code calls of a convolution whose weight it has scaled."""

import pytest
import torch
from torch import nn

import dcn_plugin  # noqa: F401  (mmcv builds DCN and DCNv2 then)
from dcn_plugin.layers import DCNv1, DCNv2

LAYERS = {
    "DCNv1": lambda **options: DCNv1(8, 8, 3, padding=1, **options),
    "DCNv2": lambda **options: DCNv2(8, 8, 3, padding=1, groups=2, offset_groups=2, **options),
    "four-sided": lambda **options: DCNv2(8, 8, (2, 3), padding=(0, 1, 2, 1), offset_bound=2.0, **options),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_bias = pytest.mark.parametrize("bias", [True, False])
IMAGES = torch.rand(2, 8, 12, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(name, **options):
    torch.manual_seed(0)
    layer = LAYERS[name](**options).double()
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


@each_layer
@each_bias
def test_is_the_layer_with_another_weight_and_bias(name, bias):
    layer, other = make(name, bias=bias), make(name)
    other.conv_offset = layer.conv_offset
    weight, shift = nn.Parameter(torch.randn_like(layer.weight)), nn.Parameter(torch.randn(8, dtype=torch.float64))
    other.weight, other.bias = weight, shift
    found, expected = layer._conv_forward(IMAGES, weight, shift), other(IMAGES)
    assert torch.equal(found, expected)
    probe = torch.randn_like(found)
    for one, two in zip(
        torch.autograd.grad(found, [weight, shift, layer.conv_offset.weight], probe),
        torch.autograd.grad(expected, [weight, shift, other.conv_offset.weight], probe),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
    assert torch.equal(layer._conv_forward(IMAGES, layer.weight, layer.bias), layer(IMAGES))


@each_layer
def test_is_linear_in_weight_and_bias(name):
    """As the scaling by a norm needs it, though it is not in the input."""
    layer = make(name)
    scale = torch.rand(8, dtype=torch.float64) + 0.5
    found = layer._conv_forward(IMAGES, layer.weight * scale[:, None, None, None], layer.bias * scale)
    torch.testing.assert_close(found, layer(IMAGES) * scale[:, None, None])


@each_layer
def test_forward_goes_through_it(name):
    layer = make(name)
    seen = []

    def twice(input, weight, bias):
        seen.append((weight, bias))
        return type(layer)._conv_forward(layer, input, 2 * weight, bias)

    layer._conv_forward = twice
    layer(IMAGES)
    assert seen == [(layer.weight, layer.bias)] and seen[0][0] is layer.weight


@each_layer
def test_sampling_hooks_see_its_calls(name):
    layer, seen = make(name), []
    layer.register_sampling_hook(lambda _, samples: seen.append(samples))
    layer._conv_forward(IMAGES, layer.weight.detach() * 3, layer.bias)
    offset, mask = layer.offsets(IMAGES)
    assert len(seen) == 1 and torch.equal(seen[0].offset, offset)
    assert mask is None if name == "DCNv1" else torch.equal(seen[0].mask, mask)


@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
@each_bias
@pytest.mark.parametrize("affine", [True, False])
def test_mmcvs_efficient_evaluation_of_norms_agrees(kind, bias, affine):
    cnn = pytest.importorskip("mmcv.cnn")

    def build(efficient):
        return cnn.ConvModule(
            8, 8, 3, padding=1, bias=bias, conv_cfg=dict(type=kind, deform_groups=2),
            norm_cfg=dict(type="BN", affine=affine), efficient_conv_bn_eval=efficient,
        ).double()  # fmt: skip

    torch.manual_seed(0)
    plain, efficient = build(False), build(True)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain.norm.running_mean.normal_()
    plain.norm.running_var.uniform_(0.5, 2)
    efficient.load_state_dict(plain.state_dict())
    calls = []
    efficient.norm.register_forward_hook(lambda *_: calls.append(1))
    found, expected = efficient.eval()(IMAGES), plain.eval()(IMAGES)
    torch.testing.assert_close(found, expected)
    assert not calls, "the norm is part of the weight"
    gradients = [torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in
                 ((found, efficient), (expected, plain))]  # fmt: skip
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(efficient.train()(IMAGES), plain.train()(IMAGES))
    assert calls
