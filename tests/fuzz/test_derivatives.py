"""Second gradients and forward mode of every operator, on any shapes and layouts, against the reference in float64."""

import torch
from cases import BY_NAME, TOLERANCE, leaves, run, tensors
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fuzz.comparison import compare, cpu
from fuzz.strategies import calls, each_name, fuzz, in_memory, paths


def like(arguments, seed):
    """A direction for each tensor, in its type."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator).to(v) for k, v in tensors(arguments).items()}


def second_gradients(function, arguments, grad, directions):
    """The gradients of what the first gradients are along `directions`, by the arguments and by `grad`."""
    arguments, grad = leaves(arguments), grad.detach().requires_grad_()
    wanted = tensors(arguments)
    first = torch.autograd.grad(function(**arguments), list(wanted.values()), grad, create_graph=True)
    found = torch.autograd.grad(
        first, [*wanted.values(), grad], list(directions.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip([*wanted, "grad"], found, strict=True))


def tangent(function, arguments, grad, directions):
    # torch has no tangents for memory that several elements share.
    own = {k: v.clone() if 0 in v.stride() else v for k, v in tensors(arguments).items()}
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(v, directions[k]) for k, v in own.items()}
        return {"tangent": forward_ad.unpack_dual(function(**(arguments | dual))).tangent}


def in_double(value):
    if isinstance(value, dict):
        return {k: in_double(v) for k, v in value.items()}
    return value.double().contiguous() if isinstance(value, torch.Tensor) else value


@each_name
def test_second_gradients_and_tangents_are_those_of_the_reference(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name), paths)
    def check(data, arguments, path):
        arguments = data.draw(in_memory(arguments, case))
        out = case.reference(**in_double(arguments))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(arguments[case.image])
        given_to = arguments, grad, like(arguments, 1)
        for compute in (second_gradients, tangent):
            with cpu(path, 1):
                actual = compute(case.function, *given_to)
            expected = compute(case.reference, *map(in_double, given_to))
            for k, v in actual.items():
                compare(v, expected[k], f"{compute.__name__} {k}")
        # What the compiled backward says of the same directions.
        exact, grad, directions = map(in_double, given_to)
        along = tangent(case.function, exact, grad, directions)["tangent"] * grad
        first = run(case.function, exact, grad)
        terms = [first[f"grad_{k}"] * v for k, v in directions.items()]
        error = (along.sum() - sum(t.sum() for t in terms)).abs()
        assert error <= TOLERANCE[torch.float64] * max(1, sum(t.abs().sum() for t in terms))

    check()
