"""Layers under what PyTorch does to modules: penalties, checkpointing, other parameters, no values, sharing."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from cases import assert_close
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from .parts import each_layer, make_layer

# "There is a performance drop": torch's fallback, sample by sample.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


@each_layer
def test_gradient_penalty_trains(name):
    """Second gradients through a layer, by every parameter, against a finite difference of the penalty."""
    layer, (image, *rest) = make_layer(name)
    parameters = list(layer.parameters())

    def penalty():
        x = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer(x, *rest).square().sum(), x, create_graph=True)
        return slope.square().sum()

    grads = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    step = 1e-6
    for parameter, grad in zip(parameters, grads, strict=True):
        direction, start = torch.randn_like(parameter), parameter.detach().clone()
        values = []
        for sign in (1, -1):
            parameter.data = start + sign * step * direction
            values.append(penalty().item())
        parameter.data = start
        difference = (values[0] - values[1]) / (2 * step)
        assert abs((grad * direction).sum().item() - difference) <= 1e-5 * max(1.0, abs(difference))


@each_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    layer, (image, *rest) = make_layer(name)
    image.requires_grad_()
    wanted = [image, *layer.parameters()]
    plain = torch.autograd.grad(layer(image, *rest).square().sum(), wanted)
    out = checkpoint(layer, image, *rest, use_reentrant=use_reentrant)
    out.square().sum().backward()  # a reentrant one knows backward() alone
    for value, expected in zip(wanted, plain, strict=True):
        torch.testing.assert_close(value.grad, expected, rtol=0, atol=0)


@each_layer
def test_functional_call_and_ensembles(name):
    """Parameters from outside; with vmap, a layer for each sample in one call."""
    layer, inputs = make_layer(name)
    stacked = {k: torch.stack([v.detach(), v.detach() * 0.5, v.detach() - 0.1]) for k, v in layer.named_parameters()}
    before = layer(*inputs)
    found = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, inputs))(stacked)
    for i in range(3):
        twin = copy.deepcopy(layer)
        twin.load_state_dict({k: v[i] for k, v in stacked.items()})
        assert_close(found[i], twin(*inputs), torch.float64)
    assert not torch.equal(found[1], found[0]) and torch.equal(layer(*inputs), before)


@each_layer
def test_layers_without_values(name):
    """On the meta device and with fake tensors: shape, strides and type of the real result, forward and backward."""
    layer, inputs = make_layer(name, torch.float32)
    real = layer(*inputs)
    meta = copy.deepcopy(layer).to("meta")
    out = meta(*(t.to("meta") for t in inputs))
    assert out.is_meta and (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    out.sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in meta.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in meta.parameters()) == len(list(meta.parameters()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = layer(*(mode.from_tensor(t) for t in inputs))
        assert isinstance(out, torch._subclasses.FakeTensor)
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


@each_layer
def test_shared_memory_is_one_for_all_processes(name):
    layer, inputs = make_layer(name)
    before = layer(*inputs)
    layer.share_memory()
    twin = pickle.loads(ForkingPickler.dumps(layer))  # what a process gets
    assert all(p.is_shared() for p in twin.parameters())
    torch.testing.assert_close(twin(*inputs), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(twin(*inputs), before)
    torch.testing.assert_close(twin(*inputs), layer(*inputs), rtol=0, atol=0)


@each_layer
def test_gradient_scaler_with_autocast(name):
    """Scaled gradients are unscaled to what they are; a step with an infinite one is left out."""
    layer, inputs = make_layer(name, torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(*inputs).float().square().mean()

    expected = torch.autograd.grad(loss(), list(layer.parameters()))
    start = [p.detach().clone() for p in layer.parameters()]
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    for parameter, old, grad in zip(layer.parameters(), start, expected, strict=True):
        assert_close(parameter, old - 0.1 * grad, torch.float32)
    assert any(not torch.equal(p, old) for p, old in zip(layer.parameters(), start, strict=True))
    kept = [p.detach().clone() for p in layer.parameters()]
    optimizer.zero_grad()
    scaler.scale(loss() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), kept, strict=True))
