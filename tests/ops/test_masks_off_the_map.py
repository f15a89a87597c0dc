"""A weight that is not finite at a sample off the map: NaN in what it multiplies, and nowhere else, on every path."""

import pytest
import torch
from conftest import PORTABLE, TUNED, cpu_kernels

from dcn_plugin import ops, reference


def convolution(module, value, position, weight):
    return module.deform_conv2d(
        value, position.permute(0, 3, 4, 1, 2).flatten(1, 2), torch.ones(6, 6, 3, 3), None, 1, 1, 1,
        weight.permute(0, 3, 1, 2),
    )  # fmt: skip


def aggregation(module, value, position, weight):
    return module.deform_aggregate2d(value.permute(0, 2, 3, 1), position.unsqueeze(3), weight.unsqueeze(3))


def attention(module, value, position, weight):
    queries = position.flatten(1, 2)[:, :, None, None] / 8
    return module.ms_deform_attn(
        value.flatten(2).transpose(1, 2).unsqueeze(2), [(5, 7)], queries, weight.flatten(1, 2)[:, :, None, None]
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernels", [PORTABLE, TUNED])
@pytest.mark.parametrize("operator", [convolution, aggregation, attention])
def test_only_the_gradient_of_that_sample_is_nan(operator, kernels, bad):
    """`weight * 0` is NaN there, as it is in the output; the definition leaves the sample out of its gradient."""
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(1, 6, 5, 7, generator=generator)
    position = torch.rand(1, 5, 7, 9, 2, generator=generator)
    weight = torch.rand(1, 5, 7, 9, generator=generator)
    position[0, 2, 3, 4] = 1e4
    weight[0, 2, 3, 4] = bad
    found = {}
    with cpu_kernels(kernels):
        for module in (ops, reference):
            given = [t.clone().requires_grad_() for t in (value, position, weight)]
            out = operator(module, *given)
            found[module] = [out, *torch.autograd.grad(out, given, torch.ones_like(out))]
    (out, *gradients), (truth, *wanted) = found[ops], found[reference]
    torch.testing.assert_close(out, truth, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert out.isnan().sum() == 6
    for own, other in zip((gradients[0], gradients[2]), (wanted[0], wanted[2]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    off = torch.zeros(1, 5, 7, 9, dtype=torch.bool)
    off[0, 2, 3, 4] = True
    assert gradients[1][off].isnan().all() and not wanted[1][off].any()
    torch.testing.assert_close(gradients[1][~off], wanted[1][~off], rtol=1e-4, atol=1e-4)
