"""Run an operator and its reference in float64 on the same values, and compare."""

import contextlib

import torch
from cases import TOLERANCE, convert, run
from conftest import cpu_kernels


@contextlib.contextmanager
def cpu(kernels, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cpu_kernels(kernels):
            yield
    finally:
        torch.set_num_threads(before)


def compare(actual, expected, name, loose=False):
    """Every value that is not finite is the same one; the others differ by no more than the type's tolerance.

    `loose`: what is finite on one side alone is left out.
    """
    tolerance = TOLERANCE[actual.dtype]
    assert actual.shape == expected.shape, name
    rounded = expected.to(actual.dtype).double()
    actual = actual.double()
    finite = rounded.isfinite() & actual.isfinite()
    for what in () if loose else (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(actual), what(rounded)), f"{name}: {what.__name__} in other places"
    if finite.any():
        scale = max(rounded[finite].abs().max().item(), 1e-3)
        error = (actual - rounded)[finite].abs().max().item()
        assert error <= tolerance * scale, f"{name}: error {error:.3g} on a scale of {scale:.3g}"


def both(case, arguments, grad, path, threads, function=None):
    """Value and gradients of the operator, or of another `function`, and of the reference in float64."""
    with cpu(path, threads):
        actual = run(function or case.function, arguments, grad)
    for k, v in actual.items():
        assert v.dtype == arguments[k.removeprefix("grad_") if k != "out" else case.image].dtype, k
    exact = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return actual, run(case.reference, convert(exact, dtype=torch.float64), grad)
