"""What is particular to deformable aggregation: other implementations, orders, packed tensors, strides, rules."""

import math

import pytest
import torch
import torch.nn.functional as F
from aggregation_loops import loops
from cases import BY_NAME, Calls, assert_close, convert, deform_aggregate2d_arguments, run
from conftest import PORTABLE, TUNED, cpu_kernels

from dcn_plugin import reference
from dcn_plugin.ops import deform_aggregate2d, deform_conv2d, kernels_used

CASE = BY_NAME["deform_aggregate2d"]


# -- other implementations ------------------------------------------------------------------------------------------


LOOPED = [
    "weights", "packed", "softmax", "packed_softmax", "no_centre", "rectangular", "rows", "four_sided", "scaled",
    "stretched", "far", "strided", "larger_than_value",
]  # fmt: skip


@pytest.mark.parametrize("config", LOOPED)
def test_equals_plain_loops(config, device):
    arguments = CASE.make(config, device=device)
    assert_close(deform_aggregate2d(**arguments), loops(**convert(arguments, device="cpu")), torch.float64)


def by_torchvision(value, offset, weight=None, *, kernel_size, official_order, softmax, packed=False, **options):
    """torchvision's convolution with one weight of 1 for each channel and tap, its taps row by row."""
    torchvision_ops = pytest.importorskip("torchvision.ops")
    n, out_h, out_w, groups = offset.shape[:4]
    taps = kernel_size[0] * kernel_size[1]
    if packed:
        offset, weight = offset[..., : 2 * taps].unflatten(-1, (taps, 2)), offset[..., 2 * taps :]
    weight = torch.ones_like(offset[..., 0]) if weight is None else weight
    weight = weight.softmax(-1) if softmax else weight
    if official_order:
        offset = offset.flip(-1).unflatten(4, kernel_size[::-1]).transpose(4, 5).flatten(4, 5)
        weight = weight.unflatten(4, kernel_size[::-1]).transpose(4, 5).flatten(4, 5)
    options = {k: options[k] for k in ("stride", "padding", "dilation")}
    ones = torch.ones(value.shape[3], 1, *kernel_size).to(value)
    out = torchvision_ops.deform_conv2d(
        value.permute(0, 3, 1, 2).contiguous(), offset.permute(0, 3, 4, 5, 1, 2).reshape(n, -1, out_h, out_w), ones,
        mask=weight.permute(0, 3, 4, 1, 2).reshape(n, -1, out_h, out_w), **options,
    )  # fmt: skip
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("config", ["weights", "plain", "softmax", "rectangular", "rows", "pointwise", "many_pixels"])
def test_equals_a_depthwise_deformable_convolution_of_torchvision(config):
    arguments = CASE.make(config)
    packed = config == "many_pixels"
    expected = run(lambda **given: by_torchvision(**given, packed=packed), arguments)
    for name, truth in expected.items():
        assert_close(run(deform_aggregate2d, arguments)[name], truth, torch.float64, name)


def test_zero_offsets_and_weights_of_the_kernel_are_a_depthwise_convolution(device):
    torch.manual_seed(0)
    value, kernel = torch.randn(2, 9, 8, 6, device=device).double(), torch.randn(6, 1, 3, 5, device=device).double()
    offset = torch.zeros(2, 5, 4, 6, 15, 2, device=device).double()
    weight = kernel.flatten(1).expand(2, 5, 4, 6, 15)
    out = deform_aggregate2d(value, offset, weight, kernel_size=(3, 5), stride=2, padding=(1, 2))
    expected = F.conv2d(value.permute(0, 3, 1, 2), kernel, stride=2, padding=(1, 2), groups=6)
    assert_close(out, expected.permute(0, 2, 3, 1), torch.float64)


# -- forms of the arguments -----------------------------------------------------------------------------------------


def reordered(arguments):
    """The same call in the other order of pairs and taps."""
    columns = arguments["official_order"]
    kernel = arguments["kernel_size"]
    order = torch.arange(kernel[0] * kernel[1]).view(kernel[::-1] if columns else kernel).T.flatten()
    if arguments["remove_center"]:
        middle = len(order) // 2
        order = torch.cat([order[:middle], order[middle + 1 :]])
        order = order - (order > middle).long()
    changed = {"offset": arguments["offset"].flip(-1)[..., order, :], "official_order": not columns}
    return arguments | changed | {"weight": arguments["weight"][..., order]}


@pytest.mark.parametrize("config", ["weights", "no_centre", "rectangular", "rows", "stretched"])
def test_the_other_order_is_a_permutation(config, device):
    arguments = CASE.make(config, device=device)
    assert_close(deform_aggregate2d(**reordered(arguments)), deform_aggregate2d(**arguments), torch.float64)


@pytest.mark.parametrize("config", ["packed", "packed_softmax", "many_pixels"])
def test_a_packed_tensor_is_the_two_in_one_and_so_is_its_gradient(config, device):
    arguments = CASE.make(config, device=device)
    taps = arguments["offset"].shape[4] // 3
    offset, weight = arguments["offset"][..., : 2 * taps].unflatten(-1, (taps, 2)), arguments["offset"][..., 2 * taps :]
    apart = run(deform_aggregate2d, arguments | {"offset": offset, "weight": weight})
    packed = run(deform_aggregate2d, arguments)
    assert torch.equal(packed["out"], apart["out"]) and torch.equal(packed["grad_value"], apart["grad_value"])
    joined = torch.cat([apart["grad_offset"].flatten(4), apart["grad_weight"]], -1)
    assert torch.equal(packed["grad_offset"], joined)


def test_a_slice_of_a_wider_tensor_is_read_where_it_lies():
    """As the layers have it: a linear's result, padded to a multiple of 8, goes in by its strides."""
    groups, taps = 4, 9
    wide = torch.randn(2, 6 * 7, 112)
    offset = wide[..., : 3 * groups * taps].unflatten(1, (6, 7)).unflatten(-1, (groups, 3 * taps))
    assert offset.data_ptr() == wide.data_ptr() and not offset.is_contiguous()
    value = torch.randn(2, 6, 7, 64)
    with Calls(CASE.op) as calls:
        found = deform_aggregate2d(value, offset)
    assert calls.found[0][1].data_ptr() == wide.data_ptr()
    assert_close(found, reference.deform_aggregate2d(value.double(), offset.double()), torch.float32)


@pytest.mark.parametrize("name", ["value", "offset", "weight"])
def test_a_part_of_a_larger_map(name, device):
    """Rows and columns cut off: no one stride goes from pixel to pixel."""
    arguments = CASE.make("weights", device=device)
    whole = F.pad(arguments[name].movedim((1, 2), (-2, -1)), (1, 2, 2, 1), value=torch.nan).movedim((-2, -1), (1, 2))
    cut = arguments | {name: whole[:, 2:-1, 1:-2]}
    assert torch.equal(cut[name], arguments[name])
    for result, expected in run(deform_aggregate2d, arguments).items():
        assert torch.equal(run(deform_aggregate2d, cut)[result], expected), result


def test_images_in_torchs_layout_are_read_where_they_lie(device):
    arguments = CASE.make("weights", device=device)
    image = arguments["value"].permute(0, 3, 1, 2).contiguous()
    out = deform_aggregate2d(**arguments | {"value": image.permute(0, 2, 3, 1)})
    assert out.is_contiguous() and torch.equal(out, deform_aggregate2d(**arguments))


def test_no_weights_are_ones(device):
    arguments = CASE.make("plain", device=device)
    ones = torch.ones_like(arguments["offset"][..., 0])
    assert torch.equal(deform_aggregate2d(**arguments), deform_aggregate2d(**arguments, weight=ones))


def test_the_scale_moves_the_grid_with_the_offsets():
    """About the centre of the kernel: at 0.5 without offsets the outer taps lie half a pixel away."""
    value = torch.arange(5.0)[None, None, :, None].expand(1, 5, 5, 1)
    offset = torch.zeros(1, 5, 5, 1, 9, 2)
    taps = [one.expand(1, 5, 5, 1, 9) for one in torch.eye(9)]
    found = [deform_aggregate2d(value, offset, one, offset_scale=0.5)[0, 2, 2, 0].item() for one in taps]
    assert found == [1.5, 2.0, 2.5] * 3


# -- positions and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_of_a_wide_map_are_found_where_float32_positions_say(dtype, device):
    width = 250
    value = (101 * torch.arange(width)).remainder(251).to(dtype)[None, None, :, None].to(device)
    offset = torch.zeros(1, 1, width, 1, 1, 2, device=device)
    offset[..., 1] = torch.arange(width - 1, -width, -2, device=device)[:, None, None].reshape(1, 1, width, 1, 1)
    out = deform_aggregate2d(value, offset, kernel_size=1, padding=0)
    torch.testing.assert_close(out, value.flip(2), rtol=0, atol=0)


def test_autocast_hands_on_float32_positions_and_weights(device):
    arguments = CASE.make("weights", torch.float32, device)
    with torch.autocast(device, torch.bfloat16), Calls(CASE.op) as calls:
        assert deform_aggregate2d(**arguments).dtype == torch.bfloat16
    types = [t.dtype for t in calls.found[-1] if isinstance(t, torch.Tensor)]
    assert types == [torch.bfloat16, torch.float32, torch.float32]


def pixel(y, x, device, **more):
    """A map of 3 x 4 whose pixels are 1 to 12, read at (y, x) in pixels by its first pixel's one tap."""
    value = torch.arange(1.0, 13.0, dtype=torch.float64, device=device).view(1, 3, 4, 1)
    offset = torch.full((1, 3, 4, 1, 1, 2), 1e9, dtype=torch.float64, device=device)
    offset[0, 0, 0, 0, 0] = torch.tensor([y, x], dtype=torch.float64)
    return dict(value=value, offset=offset, kernel_size=1, padding=0, **more)


@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [(0, 0, 1), (0, 3, 4), (2, 0, 9), (0, 1.5, 2.5), (0, -0.75, 0.25), (2, 3.75, 3), (1, -1, 0), (3, 1, 0)],
)
def test_zeros_lie_outside(y, x, expected, device):
    out = deform_aggregate2d(**pixel(y, x, device)).flatten()
    assert out[0].item() == pytest.approx(expected, abs=1e-12) and not out[1:].any()
    official = deform_aggregate2d(**pixel(x, y, device, official_order=True)).flatten()
    assert torch.equal(official, out)


@pytest.mark.parametrize("far", [-1.5, 4.5, 1e30, -1e30, math.inf, -math.inf])
def test_outside_gives_zero_value_and_zero_gradients(far, device):
    for name, value in run(deform_aggregate2d, pixel(1.0, far, device)).items():
        assert not value.any(), name


def test_nan_positions_show_in_their_group_and_nowhere_else(device):
    arguments = CASE.make("weights", device=device)
    arguments["offset"][1, 2, 3, 1, 4, 0] = torch.nan
    actual, truth = run(deform_aggregate2d, arguments), run(reference.deform_aggregate2d, arguments)
    expected = torch.zeros(2, 6, 7, 3, 4, dtype=torch.bool, device=device)
    expected[1, 2, 3, 1] = True
    assert torch.equal(actual["out"].isnan(), expected.flatten(3))
    for name in ("grad_offset", "grad_weight", "grad_value"):
        assert_close(actual[name], truth[name], torch.float64, name)
    assert actual["grad_value"].isfinite().all() and actual["grad_weight"].isnan().sum() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_reach_only_the_samples_that_read_them(bad, device):
    arguments = pixel(1.0, 1.0, device)
    arguments["value"][0, 1, 2] = bad  # right of it, with weight 0
    assert deform_aggregate2d(**arguments)[0, 0, 0, 0].item() == 6
    arguments["value"][0, 1, 1] = bad
    assert not deform_aggregate2d(**arguments)[0, 0, 0, 0].isfinite()


@pytest.mark.parametrize("kernels", [PORTABLE, TUNED])
def test_weights_that_are_not_finite_do_what_the_definition_says(kernels):
    arguments = CASE.make("softmax")
    logits = arguments["weight"]
    logits[0, 0, 0, 0, 0], logits[0, 1, 0, 0, 1], logits[0, 2, 0] = -torch.inf, torch.nan, -torch.inf
    logits[0, 3, 0, 1, 2], logits[0, 4, 0, 0, 0] = torch.inf, 700.0
    with cpu_kernels(kernels):
        for softmax in (True, False):
            given = arguments | {"softmax": softmax}
            actual, truth = run(deform_aggregate2d, given), run(reference.deform_aggregate2d, given)
            for name in ("out", "grad_weight"):
                assert_close(actual[name], truth[name], torch.float64, f"{softmax} {name}")


def test_hostile_positions_never_read_out_of_bounds(device):
    torch.manual_seed(0)
    arguments = convert(deform_aggregate2d_arguments((2, 9, 8, 48))(), dtype=torch.float32, device=device)
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, 2.0**63, -(2.0**63), 1e-45, -0.0])
    arguments["offset"] = hostile[torch.randint(len(hostile), arguments["offset"].shape)].to(device)
    actual, expected = run(deform_aggregate2d, arguments), run(reference.deform_aggregate2d, arguments)
    for name in ("out", "grad_value"):
        assert_close(actual[name], expected[name], torch.float32, name)


def test_it_is_the_depthwise_convolution_of_this_package(device):
    """Another operator of ours, with kernels of its own: half values, positions in float32."""
    arguments = convert(CASE.make("rows", device=device), dtype=torch.bfloat16)
    arguments |= {name: arguments[name].float() for name in ("offset", "weight")}
    n, out_h, out_w, groups, taps, _ = arguments["offset"].shape
    ones = torch.ones(15, 1, 2, 4, dtype=torch.bfloat16, device=device)
    planes = arguments["offset"].permute(0, 3, 4, 5, 1, 2).reshape(n, -1, out_h, out_w)
    expected = deform_conv2d(
        arguments["value"].permute(0, 3, 1, 2), planes, ones, stride=(2, 1), padding=(1, 2), dilation=(3, 2),
        mask=arguments["weight"].permute(0, 3, 4, 1, 2).reshape(n, -1, out_h, out_w),
    )  # fmt: skip
    assert_close(deform_aggregate2d(**arguments), expected.permute(0, 2, 3, 1), torch.bfloat16)


# -- the tuned path of the CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("each", [1, 7, 16, 32, 75])
def test_groups_of_any_width_in_vectors_of_any_width(each, dtype, vectors):
    """Kernels of 3x3, which have loops of their own, and of others; packed and apart; on whole pixels, too."""
    torch.manual_seed(0)
    for kernel, packed, wide in (((3, 3), True, False), ((3, 3), False, True), ((2, 3), True, True)):
        made = deform_aggregate2d_arguments((2, 6, 9, 3 * each), kernel=kernel, packed=packed, softmax=wide)()
        arguments = convert(made, dtype=dtype)
        arguments["offset"][:, :2] = arguments["offset"][:, :2].round()
        if wide and dtype not in (torch.float64, torch.float32):
            arguments |= {k: arguments[k].float() for k in ("offset", "weight") if k in arguments}
        truth = run(reference.deform_aggregate2d, convert(arguments, dtype=torch.float64))
        for name, found in run(deform_aggregate2d, arguments).items():
            assert_close(found, truth[name], dtype, f"{kernel} {packed} {name}")


def test_long_rows_of_a_large_map(vectors):
    """Pixels in strips, whose last one ends within a row, and maps in memory of their own."""
    torch.manual_seed(0)
    arguments = convert(deform_aggregate2d_arguments((1, 70, 131, 64), groups=2)(), dtype=torch.float32)
    truth = run(reference.deform_aggregate2d, arguments)
    for name, found in run(deform_aggregate2d, arguments).items():
        assert_close(found, truth[name], torch.float32, name)


@pytest.mark.parametrize("each", [7, 16, 48])
@pytest.mark.parametrize("what", ["value", "weight", "grad"])
def test_what_is_not_finite_changes_no_bit_of_the_rest(what, each, vectors):
    """There only corners with a weight are read, by loops of their own."""
    torch.manual_seed(0)
    arguments = convert(deform_aggregate2d_arguments((1, 9, 20, 2 * each), groups=2)(), dtype=torch.float32)
    grad = torch.randn(1, 9, 20, 2 * each)
    plain = run(deform_aggregate2d, arguments, grad)
    spoiled = {**arguments, "grad": grad}
    spoiled[what] = spoiled[what].clone()
    spoiled[what][0, 4, 5].view(-1)[0] = torch.inf
    found = run(deform_aggregate2d, {k: v for k, v in spoiled.items() if k != "grad"}, spoiled["grad"])
    for name in plain:
        same = found[name].isfinite()
        assert same.float().mean() > 0.9, name
        if name in ("out", "grad_value"):
            assert torch.equal(found[name][same], plain[name][same]), name
        else:
            assert_close(found[name][same], plain[name][same], torch.float32, name)
    assert not all(found[name].isfinite().all() for name in plain)


def test_which_kernels_serve():
    def served(side: int) -> str:
        value, offset = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, side * side, 2)
        deform_aggregate2d(value, offset, kernel_size=side, padding=side // 2)
        return kernels_used()["deform_aggregate2d"]

    assert served(31).startswith("tuned") and served(33) == "portable"  # up to 1024 taps
    with cpu_kernels(PORTABLE):
        assert served(3) == "portable"
    with cpu_kernels(TUNED):
        assert served(3).startswith("tuned")


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(images, dtype):
    torch.manual_seed(0)
    arguments = convert(deform_aggregate2d_arguments((images, 11, 9, 80), groups=5, packed=True)(), dtype=dtype)
    grad = torch.randn(images, 11, 9, 80)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run(deform_aggregate2d, arguments, grad))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(others[name], value) for name, value in found[0].items())
