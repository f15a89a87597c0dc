"""Layers whose weights are computed from other parameters: pruned, normed, orthogonal, parametrised in any way."""

import copy

import pytest
import timm
import torch
from cases import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dcn_plugin.layers import DCNv2, OffsetConv, offset_parameters

from .parts import each_layer, make_layer

# Old ways, which torch still has and deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


def _remove_parametrization(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


# Name -> how a module's weight is made to be computed, how it becomes a plain parameter again.
WAYS = {
    "l1_unstructured": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "ln_structured": (lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0), lambda m: prune.remove(m, "weight")),
    "weight_norm": (parametrizations.weight_norm, _remove_parametrization),
    "spectral_norm": (parametrizations.spectral_norm, _remove_parametrization),
    "orthogonal": (parametrizations.orthogonal, _remove_parametrization),
    "registered": (lambda m: parametrize.register_parametrization(m, "weight", Halved()), _remove_parametrization),
    "old_weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old_spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}
PRUNING = ("l1_unstructured", "ln_structured")
each_way = pytest.mark.parametrize("way", WAYS)


def weighted(layer: nn.Module) -> list[nn.Module]:
    """The layer, if it has a weight, and every part of it that has one; not norms, whose weight is a row."""
    return [m for m in layer.modules() if isinstance(w := getattr(m, "weight", None), torch.Tensor) and w.dim() > 1]


def reparametrised(name: str, way: str, dtype: torch.dtype = torch.float64):
    layer, inputs = make_layer(name, dtype)
    for module in weighted(layer):
        WAYS[way][0](module)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if not key.endswith("bias"):
                parameter.mul_(1.2)
        # Spectral norms take a step of their iteration with each call in training; the old ways compute in a call.
        for training in (*[True] * 5, False):
            layer.train(training)(*inputs)
    return layer, inputs


def plain_twin(layer: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer that has the present weights as plain parameters."""
    twin, _ = make_layer(name, dtype)
    with torch.no_grad():
        for module, source in zip(weighted(twin), weighted(layer), strict=True):
            module.weight.copy_(source.weight)
        as_they_are = dict(layer.named_parameters())
        for key, parameter in twin.named_parameters():
            parameter.copy_(as_they_are.get(key, parameter))
    return twin.eval()


@each_layer
@each_way
def test_value_is_that_of_the_computed_weights(name, way):
    layer, inputs = reparametrised(name, way)
    found = layer(*inputs)
    assert_close(found, plain_twin(layer, name)(*inputs), torch.float64)
    assert not torch.allclose(found, make_layer(name)[0](*inputs))
    half, inputs = reparametrised(name, way, torch.float32)
    half(*inputs)
    twin = plain_twin(half, name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(half(*inputs), twin(*inputs), torch.bfloat16)


@each_layer
@each_way
def test_gradients_reach_what_the_weights_are_computed_from(name, way):
    """They are those of plain weights, taken on through what computes the weights."""
    layer, inputs = reparametrised(name, way)
    twin = plain_twin(layer, name)
    twin(*inputs).square().sum().backward()
    layer(*inputs).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert sum(bool(p.grad.any()) for p in layer.parameters()) > len(list(layer.parameters())) / 2
    layer(*inputs)  # the old ways compute a weight once for each call
    for module, plain in zip(weighted(layer), weighted(twin), strict=True):
        weight = module.weight
        sources = {k: p for k, p in module.named_parameters() if k.startswith(("weight", "parametrizations"))}
        expected = torch.autograd.grad(weight, list(sources.values()), plain.weight.grad)
        for (key, source), grad in zip(sources.items(), expected, strict=True):
            assert_close(source.grad, grad, torch.float64, key)
        if module.bias is not None:
            assert_close(module.bias.grad, plain.bias.grad, torch.float64)
    # Optimizers still find the branches that predict offsets.
    names = ("conv_offset", "offset", "mask_fc", "sampling_offsets", "center_feature_scale_proj", "localiser", "moves")
    branches = [k for k, _ in layer.named_parameters() if k.startswith(names)]
    assert list(offset_parameters(layer)) == branches and branches


@each_layer
@each_way
def test_state_goes_into_a_file_and_a_copy_and_back_to_plain_weights(name, way):
    layer, inputs = reparametrised(name, way)

    @torch.no_grad()  # torch's linear of three dimensions rounds in another order where it records
    def values(module):
        return module(*inputs)

    expected = values(layer)
    other, _ = reparametrised(name, way)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(values(other), expected, rtol=0, atol=0)
    plain, _ = make_layer(name)
    with pytest.raises(RuntimeError, match=r'Missing key.*"[\w.]*weight"'):
        plain.load_state_dict(layer.state_dict())
    # torch copies no tensors with a history, which the old ways keep on the module after a call with gradients.
    torch.testing.assert_close(values(copy.deepcopy(layer)), expected, rtol=0, atol=0)
    for module in weighted(layer):
        WAYS[way][1](module)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert_close(layer(*inputs), expected, torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert_close(plain(*inputs), expected, torch.float64)


@each_layer
@each_way
def test_compiles_as_one_graph(name, way):
    layer, inputs = reparametrised(name, way)
    expected = layer(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(*inputs), expected, torch.float64)


@each_layer
@pytest.mark.parametrize("way", PRUNING)
def test_training_leaves_pruned_weights_at_zero(name, way):
    layer, inputs = reparametrised(name, way)
    before = [m.weight.detach().clone() for m in weighted(layer)]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(*inputs).square().sum().backward()
        optimizer.step()
    layer(*inputs)
    for module, old in zip(weighted(layer), before, strict=True):
        pruned = module.weight_mask == 0
        assert pruned.any() and not module.weight[pruned].any()
        assert (module.weight[~pruned] != old[~pruned]).any()


def test_global_pruning_of_a_model():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_dcn", num_classes=5).eval()
    layers = [m for m in model.modules() if isinstance(m, OffsetConv)]
    for layer in layers:
        nn.init.normal_(layer.conv_offset.weight, std=0.02)
    chosen = [(m, "weight") for layer in layers for m in (layer, layer.conv_offset)]
    prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.5)
    assert layers and all(isinstance(layer, DCNv2) for layer in layers)
    weights = torch.cat([m.weight.flatten() for m, _ in chosen])
    assert (weights == 0).sum() == round(weights.numel() / 2)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    for module, _ in chosen:
        prune.remove(module, "weight")
    twin = timm.create_model("resnet18_dcn", num_classes=5).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
