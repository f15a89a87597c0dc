"""Layers with weights prepared for inference, and the same without."""

import copy

import torch
from cases import assert_close
from torch import nn

from dcn_plugin import DCNv2, prepare_for_inference

C = 32  # four times 49 pixels are more than the outputs: nothing is used in the order of nn.Conv2d's weights


def twins(dtype=torch.float32, c=C, out=C, kernel=3, **options):
    """A layer, and a prepared one with the same values."""
    torch.manual_seed(0)
    plain = DCNv2(c, out, kernel, padding=kernel // 2, dtype=dtype, **options)
    nn.init.normal_(plain.conv_offset.weight, std=0.02)
    nn.init.normal_(plain.conv_offset.bias, std=0.5)
    plain.requires_grad_(False)
    return plain, prepare_for_inference(copy.deepcopy(plain))


def image(dtype=torch.float32, c=C, size=7, batch=1):
    torch.manual_seed(1)
    return torch.randn(batch, c, size, size, dtype=dtype)


def is_prepared(layer):
    return layer.weight.stride(0) == 1 and layer.weight.permute(2, 3, 1, 0).is_contiguous()


def assert_same(plain, prepared, x):
    """But for rounding: weights that are outdated, or of another place, change the first digit."""
    with torch.no_grad():
        expected, found = plain(x), prepared(x)
    assert_close(found, expected, found.dtype)
    return found
