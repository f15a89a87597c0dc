"""Offsets that lead far from their pixel: the tuned CPU path then reads copies of whole images, which must not show."""

import pytest
import torch
from cases import assert_close, convert, deform_conv2d_arguments, run
from conftest import TUNED, cpu_kernels

from dcn_plugin import reference
from dcn_plugin.ops import deform_conv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]
FAR = {
    "one_block": dict(shape=(3, 64, 40, 45), out=24, spread=20.0),
    "blocks": dict(shape=(1, 136, 40, 40), out=20, spread=8.0, mask=False),
    "groups": dict(shape=(2, 96, 42, 40), out=48, groups=3, offset_groups=6, spread=16.0),
    "depthwise": dict(shape=(2, 48, 44, 40), out=48, groups=48, offset_groups=3, spread=12.0),
    "kernel": dict(shape=(1, 20, 48, 52), out=12, kernel=(5, 3), padding=(4, 2), dilation=2, spread=12.0),
}


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with cpu_kernels(TUNED):
        yield request.param
    torch.set_num_threads(before)


def in_layout(arguments: dict, layout: torch.memory_format) -> dict:
    return {**arguments, "input": arguments["input"].contiguous(memory_format=layout)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAR)
def test_far_offsets_equal_the_reference(name, dtype, threads):
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments(**FAR[name])(), dtype=dtype)
    expected = run(reference.deform_conv2d, arguments)
    for layout in LAYOUTS:
        found = run(deform_conv2d, in_layout(arguments, layout))
        again = run(deform_conv2d, in_layout(arguments, layout))
        for key, value in found.items():
            assert_close(value, expected[key], dtype, f"{key}, {layout}")
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_far_offset_shows_at_its_pixel_alone(layout, threads):
    """It decides how the whole call reads."""
    torch.manual_seed(0)
    near = convert(deform_conv2d_arguments((2, 32, 60, 64), out=16, spread=0.5)(), dtype=torch.float32)
    far = {**near, "offset": near["offset"].clone()}
    far["offset"][1, 4, 30, 31] = 50.0
    before = deform_conv2d(**in_layout(near, layout))
    difference = (deform_conv2d(**in_layout(far, layout)) - before).abs().amax(1)
    changed = difference > 1e-5 * before.abs().max()
    assert changed.nonzero().tolist() == [[1, 30, 31]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_among_far_offsets(dtype, layout, threads):
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments((2, 24, 40, 44), out=8, spread=20.0)(), dtype=dtype)
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0**31, -(2.0**33)], dtype=dtype)
    places = torch.rand(arguments["offset"].shape) < 0.02
    arguments["offset"][places] = hostile[torch.randint(len(hostile), (int(places.sum()),))]
    expected = run(reference.deform_conv2d, arguments)
    found = run(deform_conv2d, in_layout(arguments, layout))
    assert expected["out"].isnan().any() and not expected["out"].isnan().all()
    # Gradients of offsets that are not finite are NaN here or there.
    for key in ("out", "grad_input", "grad_weight", "grad_bias", "grad_mask"):
        assert_close(found[key], expected[key], dtype, key)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_that_are_not_finite_are_read_only_with_a_weight(layout, threads):
    """Copies hold them, and whole offsets give their neighbours the weight 0."""
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments((1, 16, 50, 50), out=4, spread=20.0)(), dtype=torch.float32)
    arguments["offset"] = arguments["offset"].round()
    arguments["input"][:, :, ::2] = torch.inf
    arguments["input"][:, :, 1::2, ::3] = torch.nan
    expected = reference.deform_conv2d(**arguments)
    assert_close(deform_conv2d(**in_layout(arguments, layout)), expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_samples_at_one_pixel(layout, threads):
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments((1, 80, 48, 40), out=8)(), dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    taps = torch.arange(9)
    arguments["offset"] = (
        torch.stack([17.25 - (y - 1 + (taps // 3)[:, None, None]), 9.5 - (x - 1 + (taps % 3)[:, None, None])], 1)
        .double()
        .reshape(1, 18, 48, 40)
    )
    expected = run(reference.deform_conv2d, arguments)
    for key, value in run(deform_conv2d, in_layout(arguments, layout)).items():
        assert_close(value, expected[key], torch.float64, key)


@pytest.mark.parametrize("length", [1e3, 1e9])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_offsets_that_leave_the_map_leave_the_bias(layout, length, threads):
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments((2, 24, 40, 44), out=8)(), dtype=torch.float32)
    arguments["offset"] = length * arguments["offset"].sign()
    found = run(deform_conv2d, in_layout(arguments, layout))
    assert torch.equal(found["out"], arguments["bias"].detach()[:, None, None].expand_as(found["out"]))
    assert not any(found[f"grad_{name}"].any() for name in ("input", "offset", "weight", "mask"))
