"""Derivatives of every operator by torch.func and torch.autograd.functional, compiled ones too."""

import pytest
import torch
from cases import OpCase, assert_close, tensors

from .parts import each_case

# "There is a performance drop": torch's fallback, sample by sample.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


@each_case
def test_jacobians_and_hessians(case: OpCase):
    """By torch.func (the reference) and by batched gradients of the kernel, of first and second order."""
    arguments = case.make(case.mixed)

    def scaled(function, name):
        def call(factor):
            return function(**{**arguments, name: arguments[name] * factor}).square().mean((-1, -2))

        return call

    for name, value in tensors(arguments).items():
        factor = (
            torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype) if name != "bias" else torch.ones_like(value)
        )
        expected = torch.autograd.functional.jacobian(scaled(case.reference, name), factor)
        ours = scaled(case.function, name)
        for found in (
            torch.func.jacrev(ours)(factor),
            torch.func.jacfwd(ours)(factor),
            torch.autograd.functional.jacobian(ours, factor, vectorize=True),
        ):
            assert_close(found, expected, torch.float64, name)
        expected = torch.autograd.functional.hessian(lambda f, n=name: scaled(case.reference, n)(f).sum(), factor)
        found = torch.autograd.functional.hessian(lambda f, g=ours: g(f).sum(), factor, vectorize=True)
        assert_close(found, expected, torch.float64, name)


def _gradient(function, value):
    return torch.func.grad(lambda v: function(v).square().sum())(value)


def _gradient_of_each_sample(function, value):
    return torch.func.vmap(lambda v: _gradient(function, v))(torch.stack([value, value / 2]))


def _gradient_penalty(function, value):
    return _gradient(lambda v: _gradient(function, v), value)


def _tangent(function, value):
    return torch.func.jvp(function, (value,), (torch.ones_like(value),))[1]


DERIVATIVES = [_gradient, _gradient_of_each_sample, _gradient_penalty, _tangent]


@each_case
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda d: d.__name__.strip("_"))
def test_compiled_derivatives_are_one_graph(case: OpCase, derivative):
    """While torch.compile traces a transform, the operator gives way to its reference, as it does uncompiled."""
    arguments = case.make(case.mixed)
    image = arguments.pop(case.image)

    def ours(value):
        return derivative(lambda v: case.function(**{case.image: v}, **arguments), value)

    expected = derivative(lambda v: case.reference(**{case.image: v}, **arguments), image)
    torch._dynamo.reset()
    found = torch.compile(ours, backend="eager", fullgraph=True)(image)
    assert expected.any()
    assert_close(found, expected, torch.float64)


@each_case
def test_one_compiled_function_in_and_out_of_a_transform(case: OpCase):
    """What was traced outside of torch.func.grad is not taken inside of it, nor the other way round."""
    arguments = case.make(case.full)
    image = arguments.pop(case.image)

    def ours(value):
        return case.function(**{case.image: value}, **arguments)

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(image), ours(image), torch.float64)
        assert_close(_gradient(compiled, image), _gradient(ours, image), torch.float64)
