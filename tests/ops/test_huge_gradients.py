"""Gradients of images with more than 2^31 elements. Forward: test_deform_conv2d.py and test_roi_pool.py."""

import pytest
import torch
from conftest import TUNED, cpu_kernels

from dcn_plugin.ops import (
    deform_aggregate2d,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
    ps_roi_pool,
)

# 4 GiB for the gradient in bfloat16; the image beside it is read at its end alone, and untouched pages cost nothing.
IMAGES, CHANNELS, SIDE = 1025, 2, 1024
ROI = torch.tensor([[2.0, 3.0, 9.0, 8.0]])


def _region(image: torch.Tensor) -> torch.Tensor:
    """A region of the last image."""
    return torch.cat([torch.tensor([[len(image) - 1.0]]), ROI], 1)


def _convolve(image):
    torch.manual_seed(0)
    offset = torch.randn(1, 18, 4, 4).expand(len(image), -1, -1, -1)
    return deform_conv2d(image, offset, torch.randn(2, CHANNELS, 3, 3, dtype=image.dtype), stride=300)


def _attend(image):
    """Images are heads' channels beside each other; the last one is looked at, by the points of one query."""
    value = image.flatten(2).mT[:, :, None]
    torch.manual_seed(0)
    locations = torch.rand(1, 1, 1, 1, 4, 2).expand(len(image), -1, -1, -1, -1, -1)
    return ms_deform_attn(value, [(SIDE, SIDE)], locations)


def _aggregate(image):
    torch.manual_seed(0)
    offset = torch.randn(1, 4, 4, 1, 9, 2).expand(len(image), -1, -1, -1, -1, -1)
    return deform_aggregate2d(image.permute(0, 2, 3, 1), offset, stride=300)


CALLS = {
    "deform_aggregate2d": _aggregate,
    "ms_deform_attn": _attend,
    "deform_conv2d": _convolve,
    "deform_roi_pool": lambda x: deform_roi_pool(x, _region(x), output_size=2, sampling_ratio=2),
    "deform_ps_roi_pool": lambda x: deform_ps_roi_pool(
        x, _region(x), output_dim=CHANNELS, group_size=1, output_size=2, samples_per_part=2
    ),
    "ps_roi_pool": lambda x: ps_roi_pool(x, _region(x), output_dim=CHANNELS, group_size=1, output_size=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_more_than_2_to_the_31_elements(name):
    image = torch.empty(IMAGES, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16)
    assert image.numel() > 2**31
    image[-1].normal_()
    image.requires_grad_()
    with cpu_kernels(TUNED):
        out = CALLS[name](image)
        (grad,) = torch.autograd.grad(out[-1].sum(), image)
        last = image.detach()[-1:].clone().requires_grad_()
        alone = CALLS[name](last)
        (expected,) = torch.autograd.grad(alone[-1].sum(), last)
    assert torch.equal(out[-1], alone[-1])
    assert expected.any() and torch.equal(grad[-1], expected[-1])
    assert not grad[:-1].any()
