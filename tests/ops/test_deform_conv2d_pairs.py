"""Deformable convolution in bfloat16 by products of pairs: by the processor's own instruction where it has one, else by
widening. Held against float64, and against what torch's own convolution of bfloat16 loses."""

import pytest
import torch
from cases import deform_conv2d_arguments, run
from conftest import PAIRS, V4, cpu_kernels

from dcn_plugin import reference
from dcn_plugin.ops import deform_conv2d, kernels_used

SERVED = {
    "one_block": dict(shape=(2, 64, 9, 11), out=40),
    "one_vector": dict(shape=(1, 16, 5, 5), out=2),
    "parts_of_blocks": dict(shape=(1, 208, 6, 7), out=34),
    "offset_groups_of_8_channels": dict(shape=(1, 32, 6, 5), out=16, offset_groups=4),
    "offset_groups_across_blocks": dict(shape=(1, 192, 5, 6), out=16, offset_groups=2),
    "groups_of_16": dict(shape=(2, 128, 6, 5), out=64, groups=8, offset_groups=8),
    "groups_of_4": dict(shape=(1, 96, 6, 5), out=48, groups=24, offset_groups=3),
    "groups_of_2": dict(shape=(1, 32, 5, 5), out=64, groups=16, offset_groups=16),
    "rows_of_tiles": dict(shape=(1, 16, 40, 90), out=8),
    "several_images_to_a_tile": dict(shape=(5, 32, 7, 7), out=16),
    "strided": dict(shape=(2, 48, 9, 8), out=70, stride=2, padding=0),
    "one_pixel": dict(shape=(1, 64, 3, 3), out=64, padding=0),
    "more_outputs_than_pixels": dict(shape=(1, 96, 4, 5), out=256),
    "narrow_windows": dict(shape=(1, 64, 60, 60), out=16, spread=9.0),
    "windows_too_large": dict(shape=(1, 32, 80, 80), out=16, spread=40.0, stride=3),
}
NOT_SERVED = {
    "few_channels": dict(shape=(2, 3, 9, 9), out=64),
    "20_channels": dict(shape=(1, 20, 9, 9), out=20),
    "odd_outputs": dict(shape=(1, 16, 5, 5), out=7),
    "groups_of_3": dict(shape=(1, 48, 5, 5), out=32, groups=16),
    "narrow_groups": dict(shape=(1, 32, 5, 5), out=32, groups=8),
    "depthwise": dict(shape=(1, 32, 6, 7), out=32, groups=32),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def bfloat16_problem(layout="nchw", positions=torch.bfloat16, **shape) -> tuple[dict, torch.Tensor]:
    """Arguments on the grid of bfloat16, offset and mask in `positions`, and a gradient of the result."""
    torch.manual_seed(0)
    arguments = deform_conv2d_arguments(**shape)()
    out = deform_conv2d(**arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.to(positions if name in ("offset", "mask") else torch.bfloat16)
            arguments[name] = value.contiguous(memory_format=LAYOUTS[layout]) if value.dim() == 4 else value
    return arguments, torch.randn(out.shape).bfloat16().contiguous(memory_format=LAYOUTS[layout])


def in_float64(arguments: dict) -> dict:
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def lost(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return ((value.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("positions", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SERVED)
def test_values_and_gradients(name, layout, positions, threads):
    arguments, grad = bfloat16_problem(layout, positions, **SERVED[name])
    expected = run(reference.deform_conv2d, in_float64(arguments), grad.double())
    with cpu_kernels(PAIRS):
        found = run(deform_conv2d, arguments, grad)
    used = kernels_used("cpu")
    assert used["deform_conv2d"] == used["deform_conv2d_backward"] == PAIRS
    for what, value in found.items():
        error = (value.double() - expected[what]).abs().max() / expected[what].abs().max()
        assert error < 8e-3, (what, error.item())  # two roundings to 8 bits


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_does_not_come_in_pairs_is_widened_as_ever(name):
    arguments, grad = bfloat16_problem(**NOT_SERVED[name])
    with cpu_kernels(V4):
        expected = run(deform_conv2d, arguments, grad)
    with cpu_kernels(PAIRS):
        found = run(deform_conv2d, arguments, grad)
    assert kernels_used("cpu")["deform_conv2d"] != PAIRS
    for what, value in found.items():
        assert torch.equal(value, expected[what]), what


@pytest.mark.parametrize("channels", [64, 256])
def test_no_less_accurate_than_torchs_convolution_of_bfloat16(channels):
    """At whole pixels, where both compute the same."""
    arguments, grad = bfloat16_problem(shape=(2, channels, 12, 12), out=channels)
    arguments.pop("bias", None)
    arguments["offset"] = torch.zeros_like(arguments["offset"])
    arguments["mask"] = torch.ones_like(arguments["mask"])
    truth = run(reference.deform_conv2d, in_float64(arguments), grad.double())
    with cpu_kernels(PAIRS):
        found = run(deform_conv2d, arguments, grad)
    image, weight = (arguments[name].detach().requires_grad_() for name in ("input", "weight"))
    out = torch.nn.functional.conv2d(image, weight, padding=1)
    out.backward(grad)
    for what, theirs in {"out": out, "grad_input": image.grad, "grad_weight": weight.grad}.items():
        assert lost(found[what], truth[what]) <= 1.01 * lost(theirs.detach(), truth[what]), what


@pytest.mark.parametrize("name", ["one_block", "groups_of_16", "narrow_windows"])
def test_columns_are_rounded_once(name):
    """Columns of bfloat16 lose no more than the result's own rounding does."""
    arguments, grad = bfloat16_problem(**SERVED[name])
    truth = run(reference.deform_conv2d, in_float64(arguments), grad.double())
    with cpu_kernels(V4):
        widened = run(deform_conv2d, arguments, grad)
    with cpu_kernels(PAIRS):
        found = run(deform_conv2d, arguments, grad)
    for what, value in found.items():
        assert lost(value, truth[what]) <= 1.6 * max(lost(widened[what], truth[what]), 1e-3), what


@pytest.mark.parametrize("wanted", ["input", "offset", "weight", "mask"])
def test_each_gradient_alone_is_the_same(wanted):
    arguments, grad = bfloat16_problem(**SERVED["one_block"])
    with cpu_kernels(PAIRS):
        expected = run(deform_conv2d, arguments, grad)[f"grad_{wanted}"]
        alone = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        alone[wanted].requires_grad_()
        deform_conv2d(**alone).backward(grad)
    assert torch.equal(alone[wanted].grad, expected)


def test_what_is_not_finite_shows_where_it_does_in_float():
    arguments, _ = bfloat16_problem(shape=(1, 32, 9, 9), out=16)
    arguments["input"][0, 3, 4, 4] = torch.nan
    arguments["input"][0, 20, 7, 1] = torch.inf
    arguments["weight"].data[5, 1, 0, 0] = torch.nan
    with cpu_kernels(V4):
        expected = run(deform_conv2d, arguments)
    with cpu_kernels(PAIRS):
        found = run(deform_conv2d, arguments)
    for what, value in found.items():
        assert torch.equal(value.isnan(), expected[what].isnan()), what
