"""Layers whose weights are stored in fewer bits: torch.ao's dynamic quantisation, tensor classes such as torchao's."""

import copy

import pytest
import timm
import torch
from cases import assert_close
from torch import nn

from dcn_plugin.layers import DCNv2, OffsetConv

from .parts import each_layer, make_layer


class Int8Weight(torch.Tensor):
    """Integers and a scale for each output, which knows no operation of ours, nor of nearly anyone."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    @classmethod
    def of(cls, weight):
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-9).view(-1, *[1] * (weight.dim() - 1)) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.integers * self.scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["integers"], inner["scale"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(function(args[0].integers), function(args[0].scale))
        raise NotImplementedError(f"{function} of an Int8Weight")


def quantised(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(Int8Weight.of(layer.weight), requires_grad=False)
    return layer


def results(layer: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Value and gradients of the image and of the branch that predicts offsets."""
    image = image.detach().requires_grad_()
    out = layer(image)
    return [out, *torch.autograd.grad(out.square().sum(), [image, *layer.conv_offset.parameters()])]


@pytest.mark.parametrize("name", ["DCNv1", "DCNv2"])
def test_a_weight_that_is_stored_as_integers(name):
    layer, (image,) = make_layer(name)
    plain = copy.deepcopy(layer)
    quantised(layer)
    assert not torch.equal(layer.weight.dequantize(), plain.weight)
    with torch.no_grad():
        plain.weight.copy_(layer.weight.dequantize())
    for found, expected in zip(results(layer, image), results(plain, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    twin = copy.deepcopy(layer)
    assert type(twin.weight.data) is Int8Weight
    torch.testing.assert_close(twin(image), layer(image), rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(image), plain(image), torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*quantiz.*:UserWarning")
@each_layer
def test_dynamic_quantisation_of_torch(name):
    """It knows linear layers alone: those of the branches; convolutions stay as they are."""
    layer, inputs = make_layer(name, torch.float32)
    small = torch.ao.quantization.quantize_dynamic(layer, dtype=torch.qint8)
    changed = [m for m in small.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert bool(changed) != isinstance(layer, OffsetConv)
    with torch.no_grad():
        error = (small(*inputs) - layer(*inputs)).abs().max() / layer(*inputs).abs().max()
        # Weights and inputs of 7 bits, in up to four layers one after the other.
        assert error < 0.05 and bool(error) == bool(changed)
    assert small.state_dict().keys() != layer.state_dict().keys() if changed else not error


def torchao():
    """Its functions; importing it warns of what torch deprecates."""
    return pytest.importorskip("torchao.quantization")


@each_layer
def test_weight_only_quantisation_of_torchao(name):
    ao = torchao()
    layer, inputs = make_layer(name, torch.float32)
    plain, _ = make_layer(name, torch.float32)
    # By itself it takes linear layers; a convolution that predicts offsets it could not run.
    mine = (type(layer), nn.Linear)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig(), filter_fn=lambda m, _: isinstance(m, mine) and hasattr(m, "weight"))
    changed = [
        (m, p)
        for m, p in zip(layer.modules(), plain.modules(), strict=True)
        if isinstance(getattr(m, "weight", None), ao.Int8Tensor)
    ]
    assert changed
    with torch.no_grad():
        for module, twin in changed:
            twin.weight.copy_(module.weight.dequantize())
        expected = plain(*inputs)
        torch.testing.assert_close(layer(*inputs), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(layer)(*inputs), layer(*inputs), rtol=0, atol=0)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-4)
    layer.load_state_dict(layer.state_dict())


def test_a_model_with_quantised_layers():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_dcn", num_classes=5, zero_init_last=False).eval()
    plain = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, DCNv2)]
    for layer, twin in zip(layers, (m for m in plain.modules() if isinstance(m, DCNv2)), strict=True):
        quantised(layer)
        twin.weight.data = layer.weight.dequantize()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=0, atol=0)
    assert layers
