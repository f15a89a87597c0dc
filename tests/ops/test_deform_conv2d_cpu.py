"""The tuned CPU path of deformable convolution: every vector length, and each way in which it reads and multiplies."""

import pytest
import torch
from cases import CASES, assert_close, convert, deform_conv2d_arguments, run, set_to_zero
from conftest import PORTABLE, TUNED, cpu_kernels

from dcn_plugin import reference
from dcn_plugin.ops import deform_conv2d

CASE = next(c for c in CASES if c.name == "deform_conv2d")
PREPARED = "prepared"
WAYS = {
    "one_block": dict(shape=(2, 64, 9, 11), out=40),
    "parts_of_blocks": dict(shape=(1, 200, 6, 7), out=33),
    "offset_groups_across_blocks": dict(shape=(1, 192, 5, 6), out=16, offset_groups=2),
    "groups_of_16": dict(shape=(2, 128, 6, 5), out=128, groups=8, offset_groups=8),
    "groups_of_4": dict(shape=(1, 96, 6, 5), out=48, groups=24, offset_groups=3),
    "narrow_groups_of_2": dict(shape=(2, 32, 6, 5), out=32, groups=16),
    "narrow_groups_of_4": dict(shape=(2, 96, 6, 5), out=96, groups=24, offset_groups=3),
    "narrow_groups_of_8": dict(shape=(1, 80, 6, 7), out=80, groups=10, offset_groups=2),
    "narrow_groups_in_many_tiles": dict(shape=(2, 80, 20, 21), out=80, groups=20),
    "groups_of_20": dict(shape=(1, 60, 6, 5), out=30, groups=3),
    "depthwise_over_offset_groups": dict(shape=(1, 96, 6, 7), out=96, groups=96, offset_groups=6),
    "few_channels": dict(shape=(2, 3, 20, 20), out=64, kernel=(7, 7), stride=2, padding=3),
    "20_channels": dict(shape=(1, 20, 9, 9), out=20),
    "rows_of_tiles": dict(shape=(1, 16, 40, 90), out=8),
    "several_images_to_a_tile": dict(shape=(5, 32, 7, 7), out=16),
    "weights_as_stored": dict(shape=(1, 96, 4, 5), out=256),
    "weights_as_stored_in_groups": dict(shape=(1, 128, 3, 3), out=256, groups=2),
    "groups_of_16_in_and_32_out": dict(shape=(1, 64, 9, 11), out=128, groups=4),
    "a_row_of_taps": dict(shape=(1, 32, 5, 9), out=48, kernel=(1, 5), padding=(0, 2)),
    "a_column_of_taps": dict(shape=(1, 32, 9, 5), out=48, kernel=(5, 1), padding=(2, 0)),
    "one_tap": dict(shape=(1, 80, 5, 5), out=64, kernel=(1, 1), padding=0),
    "windows_of_some_channels": dict(shape=(1, 64, 60, 60), out=16, spread=1.0),
    "small_tiles_far_apart": dict(shape=(2, 32, 150, 150), out=16, spread=1.0, stride=40),
    "far": dict(shape=(2, 64, 60, 60), out=16, spread=9.0),
    "far_parts_of_blocks": dict(shape=(1, 80, 44, 48), out=24, spread=12.0),
    "far_offset_groups": dict(shape=(2, 96, 40, 50), out=64, groups=2, offset_groups=3, spread=15.0),
    "far_depthwise": dict(shape=(1, 32, 80, 80), out=32, groups=32, spread=40.0, stride=3),
    # Copies of one, in float32 two images at a time.
    "far_image_by_image": dict(shape=(3, 16, 300, 300), out=64, spread=50.0, stride=150),
}


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last, "prepared": PREPARED}


def laid_out(arguments: dict, layout: torch.memory_format | str) -> dict:
    if layout == PREPARED:  # as prepare_for_inference stores weights: outputs side by side
        return arguments | {"weight": arguments["weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)}
    return {
        k: v.contiguous(memory_format=layout) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
        for k, v in arguments.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_the_reference(way, layout, vectors):
    torch.manual_seed(0)
    exact = deform_conv2d_arguments(**WAYS[way])()
    expected = run(reference.deform_conv2d, exact)
    grad = torch.randn(expected["out"].shape, dtype=torch.float64)
    expected = run(reference.deform_conv2d, exact, grad)
    for dtype in (torch.float64, torch.float32):
        arguments = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in exact.items()}
        if dtype == torch.float32:  # offsets on the grid of float32 lie where those of float64 do
            rounded = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            expected = run(reference.deform_conv2d, rounded, grad.float().double())
        for name, value in run(deform_conv2d, laid_out(arguments, layout), grad).items():
            truth = expected[name]
            error = (value.double() - truth).abs().max() / truth.abs().max()
            assert error < (1e-12 if dtype == torch.float64 else 2e-5), (name, dtype, error.item())


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize("channels", [112, 128, 160, 256])
def test_any_number_of_threads_shares_groups_out(channels, width, count):
    """Threads share channels out in blocks, which are cut between groups, and hold whole vectors of them."""
    torch.manual_seed(0)
    arguments = deform_conv2d_arguments((1, channels, 5, 5), out=channels, groups=channels // width)()
    expected = run(reference.deform_conv2d, arguments)
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = run(deform_conv2d, arguments)
    finally:
        torch.set_num_threads(before)
    for name, value in found.items():
        assert_close(value, expected[name], torch.float32, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["one_block", "weights_as_stored", "depthwise_over_offset_groups"])
def test_gradients_are_set_to_zero_once_where_they_are_added_to_and_else_not(way, dtype):
    torch.manual_seed(0)
    arguments = convert(deform_conv2d_arguments(**WAYS[way])(), dtype=dtype)
    zeroed = set_to_zero(lambda: run(deform_conv2d, arguments))
    assert zeroed.count(arguments["weight"].shape) == 0
    # Half types are summed elsewhere, in float.
    assert zeroed.count(arguments["input"].shape) == (dtype == torch.float32)


@pytest.mark.parametrize("kernels", [TUNED, PORTABLE])
@pytest.mark.parametrize("batch", [0, 1])
def test_no_gradient_is_left_unwritten(batch, kernels):
    torch.manual_seed(0)
    arguments = deform_conv2d_arguments(**WAYS["one_block"])()
    arguments = {k: v[:batch] if k in ("input", "offset", "mask") else v for k, v in arguments.items()}
    expected = run(reference.deform_conv2d, arguments)
    # New memory is filled with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        with cpu_kernels(kernels):
            found = run(deform_conv2d, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in found.items():
        assert_close(value, expected[name], torch.float64, name)


@pytest.mark.parametrize("config", CASE.configs)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_vector_length_equals_the_reference(config, dtype, vectors):
    arguments = CASE.make(config, dtype, "cpu")
    expected = run(reference.deform_conv2d, arguments)
    for name, value in run(deform_conv2d, arguments).items():
        assert_close(value, expected[name], dtype, name)


def test_hostile_values_in_tiles_of_whole_vectors(vectors):
    # A wide map, so that the loops over taps run in vectors; NCHW and far offsets, so that there are windows to find.
    torch.manual_seed(0)
    arguments = deform_conv2d_arguments((1, 32, 20, 40), out=8)()
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, -(2.0**63), 1e-45, -0.0, 0.5, -1.0])
    picked = torch.randint(len(hostile), arguments["offset"].shape)
    arguments["offset"] = hostile[picked]
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    expected = run(reference.deform_conv2d, arguments)
    for layout in (torch.contiguous_format, torch.channels_last):
        actual = run(deform_conv2d, laid_out(arguments, layout))
        for name in ("out", "grad_input", "grad_bias", "grad_weight", "grad_mask"):
            assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
        assert_close(actual["grad_input"], expected["grad_input"], torch.float32, "grad_input")
