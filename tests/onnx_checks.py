"""What tests of exported graphs share."""

import sys

import pytest
import torch
from torch import Tensor

# The first that has DeformConv; not made for Python 3.10, where onnx's own interpreter is what remains.
HAS_RUNTIME = sys.version_info >= (3, 11)
needs_runtime = pytest.mark.skipif(not HAS_RUNTIME, reason="no onnxruntime with DeformConv")


def assert_close(found, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a part of the largest value; NaN where NaN is wanted."""
    largest = float(wanted[~wanted.isnan()].abs().max())
    assert largest > 0.01
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=tolerance * largest, equal_nan=True)


def by_definition(path, given: tuple[Tensor, ...]):
    """What onnx's own interpreter, in plain numpy, makes of a file."""
    from onnx.reference import ReferenceEvaluator

    model = ReferenceEvaluator(str(path))
    return model.run(None, {name: t.numpy() for name, t in zip(model.input_names, given, strict=True)})[0]
