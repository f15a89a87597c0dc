"""The gradient of a convolution's input without atomic sums: its index of samples, its ranges, the order of sums."""

import pytest
import torch
from aiming import aim
from cases import assert_close, convert, deform_conv2d_arguments, run
from conftest import PORTABLE, cpu_kernels
from coverings import cover

from dcn_plugin import reference
from dcn_plugin.ops import deform_conv2d

GEOMETRIES = {
    "one_pixel": deform_conv2d_arguments((2, 3, 1, 1), out=2, padding=1),
    "one_column": deform_conv2d_arguments((2, 3, 9, 1), out=2, kernel=(3, 1), padding=(1, 0)),
    "mostly_outside": deform_conv2d_arguments(spread=40.0),
    "strided": deform_conv2d_arguments((3, 5, 13, 17), stride=(3, 2), padding=2, dilation=(1, 2)),
    "sparse": deform_conv2d_arguments((2, 4, 20, 18), kernel=(2, 2), stride=7, padding=0),
    "four_sided": deform_conv2d_arguments(kernel=(3, 2), padding=(0, 3, 1, 2)),
    "without_mask": deform_conv2d_arguments(mask=False),
    "odd_channels": deform_conv2d_arguments((2, 22, 6, 5), offset_groups=2),
    "offset_groups": deform_conv2d_arguments((2, 12, 7, 6), groups=2, offset_groups=3),
    "offset_group_per_channel": deform_conv2d_arguments((2, 6, 7, 6), groups=6, offset_groups=6),
    # Columns take at most 4 MB at a time (csrc/runtime/cpu.h): seven images of nine, half an image, a third of one.
    "ranges_of_images": deform_conv2d_arguments((9, 16, 20, 20), out=3),
    "two_ranges_an_image": deform_conv2d_arguments((2, 32, 30, 29), out=3, kernel=(5, 5), padding=2),
    "three_ranges_an_image": deform_conv2d_arguments((2, 128, 12, 13), out=2, kernel=(11, 11), padding=5, spread=4.0),
    # So few samples that the map decides how many images are worked on at a time.
    "large_map": deform_conv2d_arguments((3, 1, 600, 600), out=2, kernel=(2, 2), stride=150, padding=0),
}  # fmt: skip


def gradient_like(arguments: dict) -> torch.Tensor:
    return torch.randn(deform_conv2d(**arguments).shape, dtype=torch.float64)


def assert_equals_reference(arguments: dict, grad: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
    actual = run(deform_conv2d, arguments, grad)
    stored = grad.to(dtype).double()
    for name, value in run(reference.deform_conv2d, convert(arguments, dtype=torch.float64), stored).items():
        assert_close(actual[name], value, dtype, name)


@cover("geometry, layout", GEOMETRIES, [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_the_reference(geometry, layout, device):
    torch.manual_seed(0)
    arguments = convert(GEOMETRIES[geometry](), device=device)
    arguments["input"] = arguments["input"].contiguous(memory_format=layout)
    assert_equals_reference(arguments, gradient_like(arguments).to(device))


@cover(
    "dtype, offset_dtype, geometry",
    [torch.float32, torch.float16, torch.bfloat16],
    ["alike", torch.float32],
    ["offset_groups", "two_ranges_an_image"],
)
def test_gradients_of_every_type(geometry, dtype, offset_dtype, device):
    torch.manual_seed(0)
    arguments = convert(GEOMETRIES[geometry](), dtype=dtype, device=device)
    if offset_dtype != "alike":
        arguments["offset"] = arguments["offset"].to(offset_dtype) + 0.01
    assert_equals_reference(arguments, gradient_like(arguments).to(device), dtype)


PLACES = {
    "one": [(3.25, 4.5)],
    "a_pixel": [(3.0, 4.0)],
    "corner_of_the_map": [(-0.75, 13.5)],
    "neighbours": [(3.25, 4.5), (4.25, 4.75), (3.5, 5.25), (4.0, 5.5)],
    "mostly_outside": [(2.5, 1.5), (1e30, 0.0), (0.0, float("-inf")), (-1.0, 3.0)],
    "not_a_number": [(2.5, 1.5), (float("nan"), 1.0), (1.0, float("nan")), (float("inf"), float("nan"))],
    "nowhere": [(-5.0, 3.0)],
}


@cover("places, size", PLACES, [(2, 4, 14, 14), (1, 40, 32, 28)])  # one range of columns, and several
def test_many_samples_at_few_places(places, size, device):
    torch.manual_seed(0)
    arguments = aim(deform_conv2d_arguments(size, out=2, kernel=(5, 5), padding=2, offset_groups=2)(), PLACES[places])
    arguments = convert(arguments, device=device)
    grad = gradient_like(arguments).to(device)
    if places == "not_a_number":
        # What a NaN position spoils is its own gradient and the weight's; the map's other samples count as ever.
        actual, expected = run(deform_conv2d, arguments, grad), run(reference.deform_conv2d, arguments, grad)
        assert expected["grad_input"].isfinite().all()
        assert_close(actual["grad_input"], expected["grad_input"], torch.float64)
        return
    assert_equals_reference(arguments, grad)


def ordered_problem(places: list[tuple[float, float]] | None, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """Sums whose bits show their order, and columns whose bits do not depend on the product: one output channel.

    Odd numbers of channels and offset groups: two threads do not split between those, but share some.
    """
    torch.manual_seed(0)
    arguments = deform_conv2d_arguments((2, 21, 40, 40), out=1, offset_groups=3, bias=False)()
    arguments = convert(aim(arguments, places) if places else arguments, dtype=dtype)
    return arguments, gradient_like(arguments) * torch.logspace(-3, 3, 40, dtype=torch.float64)


@cover("places, dtype", [None, "one", "neighbours"], [torch.float64, torch.float32, torch.bfloat16])
def test_two_threads_give_equal_bits_every_time(places, dtype, device):
    arguments, grad = ordered_problem(PLACES.get(places), dtype)
    arguments, grad = convert(arguments, device=device), grad.to(device)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [run(deform_conv2d, arguments, grad) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("places", [None, "one", "neighbours"])
def test_the_number_of_threads_does_not_show_in_the_portable_sums(places):
    arguments, grad = ordered_problem(PLACES.get(places), torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with cpu_kernels(PORTABLE):
                found.append(run(deform_conv2d, arguments, grad)["grad_input"])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])
