"""What is particular to RoI pooling: other implementations, published numbers, borders, hostile regions, errors."""

import math
import random
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    CONSTANT,
    assert_close,
    convert,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    ps_roi_pool_arguments,
    run,
    tensors,
)
from conftest import PORTABLE, TUNED, cpu_kernels
from roi_loops import loops_of_deform_ps_roi_pool, loops_of_ps_roi_pool

from dcn_plugin import reference
from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool
from dcn_plugin.ops._operator import WANTED

ALIGN, PART, PIXELS = (
    next(c for c in CASES if c.name == n) for n in ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")
)
POOLS = (ALIGN, PART, PIXELS)
each_pool = pytest.mark.parametrize("case", POOLS, ids=lambda c: c.name)


# -- other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", ["plain", "one_channel", "one_pixel", "many_regions"])
def test_without_offsets_it_is_torchvisions_roi_align(config, dtype, sampling_ratio, aligned, device):
    torchvision = pytest.importorskip("torchvision")
    arguments = ALIGN.make(config, dtype, device)
    given = {k: arguments[k] for k in ("input", "rois", "output_size", "spatial_scale")}
    grad = torch.randn(len(given["rois"]), given["input"].shape[1], *given["output_size"], dtype=dtype)
    actual = run(
        lambda **a: deform_roi_pool(**a, sampling_ratio=sampling_ratio, aligned=aligned), given, grad.to(device)
    )

    def theirs(input, rois, output_size, spatial_scale):
        return torchvision.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)

    for name, expected in run(theirs, given, grad.to(device)).items():
        assert_close(actual[name], expected, dtype, name)


# Input, region, output and gradient for an output gradient of ones: the expectations that mmcv publishes with its
# operator (tests/test_ops/test_deform_roi_pool.py). 2 x 2 bins, 2 x 2 samples, fresh offsets.
PUBLISHED = [
    ([[[1, 2], [3, 4]]], [0, 0, 1, 1], [[[1, 1.25], [1.5, 1.75]]], [[[3.0625, 0.4375], [0.4375, 0.0625]]]),
    (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]], [0, 0, 1, 1],
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
    ),
    (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]], [0, 0, 3, 3],
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [[
            [0.47265625, 0.4296875, 0.4296875, 0.04296875], [0.4296875, 0.390625, 0.390625, 0.0390625],
            [0.4296875, 0.390625, 0.390625, 0.0390625], [0.04296875, 0.0390625, 0.0390625, 0.00390625],
        ]],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("image", "box", "out", "grad"), PUBLISHED)
@pytest.mark.parametrize("offset", [False, True])
def test_mmcvs_published_numbers(image, box, out, grad, offset, device):
    arguments = dict(
        input=torch.tensor([image], dtype=torch.float64, device=device),
        rois=torch.tensor([[0.0, *box]], dtype=torch.float64, device=device), output_size=2, sampling_ratio=2,
    )  # fmt: skip
    if offset:
        arguments["offset"] = torch.zeros(1, 2, 2, 2, dtype=torch.float64, device=device)
    result = run(deform_roi_pool, arguments)
    assert torch.equal(result["out"].cpu(), torch.tensor([out], dtype=torch.float64))
    assert_close(result["grad_input"], torch.tensor([grad]), torch.float64)


@pytest.mark.parametrize("config", [k for k in PART.configs if "many" not in k])
def test_deform_ps_roi_pool_equals_the_original_in_loops(config, device):
    arguments = PART.make(config)
    on_device = PART.make(config, device=device)
    assert_close(deform_ps_roi_pool(**on_device), loops_of_deform_ps_roi_pool(**arguments), torch.float64)


@pytest.mark.parametrize("config", [k for k in PIXELS.configs if "many" not in k])
def test_ps_roi_pool_equals_r_fcn_in_loops(config, device):
    arguments = PIXELS.make(config)
    assert_close(ps_roi_pool(**PIXELS.make(config, device=device)), loops_of_ps_roi_pool(**arguments), torch.float64)


def test_ps_roi_pool_against_torchvisions(device):
    """The two round differently; where corners are multiples of the stride, torchvision's end is one pixel later."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    image = torch.randn(2, 3 * 4, 12, 16, dtype=torch.float64, device=device)
    boxes = torch.tensor([[0.0, 8, 4, 40, 36], [1, 0, 0, 32, 24], [0, 20, 12, 36, 28]], device=device).double()
    ours = partial(ps_roi_pool, image, output_dim=3, group_size=2, output_size=2, spatial_scale=0.25)
    theirs = torchvision.ops.ps_roi_pool(image, boxes, 2, 0.25)
    assert_close(ours(boxes - torch.tensor([0.0, 0, 0, 1, 1], device=device)), theirs, torch.float64)
    assert not torch.allclose(ours(boxes), theirs)


# -- where samples lie ----------------------------------------------------------------------------------------------


def ramp(height: int = 6, width: int = 8, device: str = "cpu") -> torch.Tensor:
    """10 * y + x."""
    y, x = torch.arange(height, device=device).double(), torch.arange(width, device=device).double()
    return (10 * y[:, None] + x)[None, None]


def test_offsets_are_y_then_x_in_units_of_gamma_times_the_size(device):
    rois = torch.tensor([[0.0, 2, 1, 6, 4]], device=device).double()  # 4 wide, 3 high
    zero = torch.zeros(1, 2, 1, 1, device=device).double()
    how = dict(output_size=1, sampling_ratio=1, gamma=0.1)
    start = deform_roi_pool(ramp(device=device), rois, zero, **how)
    down, right = zero.clone(), zero.clone()
    down[:, 0], right[:, 1] = 1, 1
    assert_close(deform_roi_pool(ramp(device=device), rois, down, **how) - start, zero[:, :1] + 3.0, torch.float64)
    assert_close(deform_roi_pool(ramp(device=device), rois, right, **how) - start, zero[:, :1] + 0.4, torch.float64)
    how = dict(output_dim=1, group_size=1, output_size=1, samples_per_part=1, offset_scale=0.1)
    start = deform_ps_roi_pool(ramp(device=device), rois, zero, **how)  # 5 wide, 4 high: the last pixel belongs to it
    assert_close(deform_ps_roi_pool(ramp(device=device), rois, down, **how) - start, zero[:, :1] + 4.0, torch.float64)
    assert_close(deform_ps_roi_pool(ramp(device=device), rois, right, **how) - start, zero[:, :1] + 0.5, torch.float64)


@pytest.mark.parametrize(
    ("shift", "value", "slope"),
    [
        (-2.51, 0, 0),
        (-2.5, 1, 0),
        (-1.75, 1, 0),
        (-1.25, 1.25, 1),
        (2.25, 4.75, 1),
        (2.5, 5, 0),
        (3.5, 5, 0),
        (3.51, 0, 0),
    ],
)  # fmt: skip
def test_the_closed_square_in_which_samples_count(shift, value, slope, device):
    """[-1, H]: mmcv's and torchvision's. Outer pixels extend to its edge, without a derivative."""
    column = torch.arange(1.0, 6.0, dtype=torch.float64, device=device).reshape(1, 1, 5, 1)
    rois = torch.tensor([[0.0, 0, 1.5, 1, 2.5]], dtype=torch.float64, device=device)  # samples y = 1.5
    offset = torch.tensor([shift, 0.0], dtype=torch.float64, device=device).reshape(1, 2, 1, 1)
    result = run(
        deform_roi_pool, dict(input=column, rois=rois, offset=offset, output_size=1, sampling_ratio=1, gamma=1.0)
    )
    assert_close(result["out"], torch.full((1, 1, 1, 1), float(value)), torch.float64)
    assert_close(result["grad_offset"][:, :1], torch.full((1, 1, 1, 1), float(slope)), torch.float64)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_a_region_without_size(sampling_ratio, device):
    rois = torch.tensor([[0.0, 3, 2, 3, 2]], device=device).double()
    aligned = deform_roi_pool(ramp(device=device), rois, output_size=2, sampling_ratio=sampling_ratio)
    # As in mmcv: no samples, so 0; with a fixed number of them, all at the same place.
    expected = 0.0 if sampling_ratio == 0 else ramp()[0, 0, 1:3, 2:4].mean().item()
    assert_close(aligned, torch.full((1, 1, 2, 2), expected), torch.float64)
    unaligned = deform_roi_pool(ramp(device=device), rois, output_size=1, sampling_ratio=1, aligned=False)
    assert_close(unaligned, torch.full((1, 1, 1, 1), 10 * 2.5 + 3.5), torch.float64)  # at least 1 x 1


def test_rounding_is_half_away_from_zero(device):
    image = torch.randn(1, 1, 9, 9, dtype=torch.float64, device=device)
    for pool, more in ((ps_roi_pool, {}), (deform_ps_roi_pool, {"samples_per_part": 3})):
        half, whole = (
            pool(
                image,
                torch.tensor([[0.0, *box]], device=device).double(),
                output_dim=1,
                group_size=1,
                output_size=3,
                **more,
            )
            for box in ((0.5, 1.5, 2.5, 4.5), (1.0, 2.0, 3.0, 5.0))
        )
        assert torch.equal(half, whole)


def test_a_part_covers_several_bins_and_classes_have_offsets_of_their_own(device):
    torch.manual_seed(0)
    image = torch.randn(1, 4, 9, 9, dtype=torch.float64, device=device)
    rois = torch.tensor([[0.0, 1, 1, 7, 6]], dtype=torch.float64, device=device)
    offset = torch.randn(1, 2 * 2, 2, 1, dtype=torch.float64, device=device)
    how = dict(group_size=1, output_size=(4, 3))
    both = deform_ps_roi_pool(image, rois, offset, output_dim=4, part_size=(2, 1), **how)
    for c in range(2):
        repeated = offset[:, 2 * c : 2 * c + 2].repeat_interleave(2, 2).repeat_interleave(3, 3)
        alone = deform_ps_roi_pool(image[:, 2 * c : 2 * c + 2], rois, repeated, output_dim=2, **how)
        assert_close(both[:, 2 * c : 2 * c + 2], alone, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bins", [3, 5, 6, 7])
def test_edges_on_whole_pixels_stay_there(bins, dtype, device):
    """A bin of whole pixels is just these, however the processor rounds."""
    image = torch.arange(40.0 * 40, dtype=dtype, device=device).reshape(1, 1, 40, 40)
    for start in (0, 1, 9):
        end = start + 4 * bins - 1  # the last pixel belongs to the region
        rois = torch.tensor([[0, start, start, end, end]], dtype=dtype, device=device)
        actual = ps_roi_pool(image, rois, output_dim=1, group_size=1, output_size=bins)
        expected = image[..., start : end + 1, start : end + 1].reshape(1, 1, bins, 4, bins, 4).mean((3, 5))
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("seed", range(24))
def test_random_geometries_equal_the_reference(seed, device):
    """Numbers of everything drawn at random: sides of one pixel, scales that are no power of two, and so on."""
    generator = random.Random(seed)
    pick, below = generator.choice, generator.randint
    torch.manual_seed(seed)
    batch, height, width, regions = below(1, 3), below(1, 20), below(1, 20), below(2, 12)
    scale, bins = pick([1.0, 0.5, 0.25, 0.0625, 0.3, 2.0]), (below(1, 6), below(1, 6))
    common = dict(regions=regions, bins=bins, spatial_scale=scale)
    classes, group_size = below(1, 3), below(1, 4)
    output_dim = classes * below(1, 20)
    channels = output_dim * group_size**2
    sensitive = dict(output_dim=output_dim, group_size=group_size, **common)
    shifts = dict(offset=pick([True, False]), mask=pick([True, False]), spread=pick([0.5, 3.0, 30.0]))
    parts, samples = (below(1, 5), below(1, 5)), below(1, 4)
    for case, make in (
        (ALIGN, deform_roi_pool_arguments(
            (batch, below(1, 70), height, width), sampling_ratio=below(0, 3), aligned=pick([True, False]),
            **shifts, **common,
        )),
        (PART, deform_ps_roi_pool_arguments(
            (batch, channels, height, width), parts=parts, samples_per_part=samples, classes=classes,
            **shifts, **sensitive,
        )),
        (PIXELS, ps_roi_pool_arguments((batch, channels, height, width), **sensitive)),
    ):  # fmt: skip
        arguments = make()
        expected = run(case.reference, arguments)
        for name, value in run(case.function, convert(arguments, device=device)).items():
            assert_close(value, expected[name], torch.float64, f"{case.name}: {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 4, 8, 9, 13])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 11, 16, 21, 64, 65, 79, 130])
def test_every_width_of_vectors_takes_any_number_of_channels_and_samples(channels, samples, dtype, vectors):
    """Blocks of 64, 16, 8, 4 channels and what is left of them; few samples, found bin by bin, and many."""
    torch.manual_seed(channels)
    common = dict(regions=3, bins=(3, 2), spread=1.0)
    for case, make in (
        (ALIGN, deform_roi_pool_arguments((2, channels, 9, 11), sampling_ratio=samples, **common)),
        (PART, deform_ps_roi_pool_arguments(
            (1, channels * 4, 7, 9), output_dim=channels, samples_per_part=samples, parts=(2, 2), **common,
        )),
    ):  # fmt: skip
        arguments = make()
        expected = run(case.reference, arguments)
        for name, value in run(case.function, convert(arguments, dtype=dtype)).items():
            assert_close(value, expected[name], dtype, f"{case.name}: {name}")


@pytest.mark.parametrize("case", [ALIGN, PART], ids=lambda c: c.name)
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_an_offset_that_is_not_a_number_does_not_spoil_the_gradients_of_others(case, offset, device):
    """It shows in the gradient of its own part alone."""
    arguments = case.make(case.full, device=device)
    arguments["offset"] = torch.full_like(arguments["offset"], offset)
    arguments["offset"][0, 0, 0, 0] = torch.nan
    actual, expected = run(case.function, arguments), run(case.reference, arguments)
    broken = actual["grad_offset"].isnan()
    assert broken[0, :, 0, 0].any() and not broken[1:].any()
    assert_close(actual["grad_offset"][1:], expected["grad_offset"][1:], torch.float64)


# -- regions that are not sound -------------------------------------------------------------------------------------

UNSOUND = [
    ([2, 0, 0, 4, 4], r"a batch index from 0 to 1, got \[2"),
    ([-1, 0, 0, 4, 4], "a batch index from 0 to 1, got"),
    ([0.5, 0, 0, 4, 4], r"a batch index from 0 to 1, got \[0.5"),
    ([math.nan, 0, 0, 4, 4], r"a batch index from 0 to 1, got \[nan"),
    ([1e30, 0, 0, 4, 4], "a batch index from 0 to 1, got"),
    ([0, math.nan, 0, 4, 4], "finite corners, got"),
    ([0, 0, -math.inf, 4, 4], "finite corners, got"),
    ([0, 0, 0, math.inf, 4], "finite corners, got"),
    ([0, 5, 0, 4, -math.inf], r"finite corners, got \[0.0, 5.0, 0.0, 4.0, -inf\] in row 2"),
]


@each_pool
@pytest.mark.parametrize(("roi", "message"), UNSOUND, ids=lambda v: str(v) if isinstance(v, list) else "")
def test_an_unsound_region_is_refused_and_where_nobody_looks_it_gives_nan(case, roi, message, device):
    arguments = case.make(case.full, torch.float32, device)
    sound = run(case.function, arguments)
    arguments["rois"][2] = torch.tensor(roi)
    if device != "cuda":
        with pytest.raises(ValueError, match=f"rois: expected {message}"):
            case.function(**arguments)
    result = run(case.compiled, arguments)
    assert result["out"][2].isnan().all()
    others = [i for i in range(len(arguments["rois"])) if i != 2]
    for name in ("out", "grad_offset", "grad_mask"):
        if name in result:
            assert_close(result[name][others], sound[name][others], torch.float32, name)
    without = {k: v[others] if k in case.per_result else v for k, v in arguments.items()}
    assert_close(result["grad_input"], run(case.function, without)["grad_input"], torch.float32)


@each_pool
def test_a_compiled_graph_does_not_read_out_of_bounds(case):
    arguments = case.make(case.full, torch.float32)
    arguments["rois"][2, 0] = 7
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    assert compiled(**arguments)[2].isnan().all()


@each_pool
@pytest.mark.parametrize("corner", [300, 1e9, 1e18, 1e30, 3e38])
def test_regions_far_larger_than_the_map(case, corner, device):
    """They take no longer than others, and read nothing out of bounds."""
    arguments = case.make(case.bare, torch.float32, device)
    arguments["rois"][0] = torch.tensor([0.0, -corner, -corner, corner, corner])
    arguments["rois"][1] = torch.tensor([0.0, corner / 2, corner / 2, corner, corner])
    if "sampling_ratio" in arguments:
        arguments["sampling_ratio"] = 0
    result = run(case.function, arguments)
    assert result["out"].shape[0] == len(arguments["rois"]) and result["grad_input"].isfinite().all()
    if corner == 300:  # the reference takes every sample
        expected = run(case.reference, convert(arguments, dtype=torch.float64))
        for name, value in result.items():
            assert_close(value, expected[name], torch.float32, name)


@pytest.mark.parametrize("case", [ALIGN, PART], ids=lambda c: c.name)
def test_offsets_that_are_not_finite(case, device):
    arguments = case.make(case.full, torch.float32, device)
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, -(2.0**63), 1e-45])
    picked = torch.randint(len(hostile), arguments["offset"].shape, generator=torch.Generator().manual_seed(0))
    arguments["offset"] = hostile[picked].to(device)
    arguments["rois"][:, 3:] += 4  # no region of size 0, whose 0 * inf is NaN
    actual, expected = run(case.function, arguments), run(case.reference, arguments)
    for name in ("out", "grad_input", "grad_mask"):
        assert_close(actual[name], expected[name], torch.float32, name)


@each_pool
def test_a_bad_pixel_reaches_only_the_bins_that_read_it(case, device):
    arguments = case.make(case.full, device=device)
    arguments["input"][0, 1, 3, 4] = torch.nan
    actual, expected = run(case.function, arguments), run(case.reference, arguments)
    assert torch.equal(actual["out"].isnan(), expected["out"].isnan()) and not actual["out"].isnan().all()
    assert_close(actual["grad_input"], expected["grad_input"], torch.float64)


# -- numbers of regions, images, elements ---------------------------------------------------------------------------


@each_pool
def test_no_regions_and_no_images(case, device):
    arguments = case.make(case.mixed, torch.float32, device)
    no_regions = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    no_boxes = [torch.zeros(0, 4, device=device)] * len(arguments["input"])
    for empty in (
        no_regions,
        {**no_regions, "rois": no_boxes},
        {**no_regions, "input": arguments["input"][:0]},
        {**no_regions, "input": arguments["input"][:0], "rois": []},
    ):
        result = run(case.function, empty)
        assert result["out"].shape == (0, *case.function(**arguments).shape[1:])
        for name, value in tensors(empty).items():
            assert result[f"grad_{name}"].shape == value.shape and not result[f"grad_{name}"].any()


@each_pool
def test_boxes_of_each_image_in_a_list(case, device):
    arguments = case.make(case.full, device=device)
    rois = arguments["rois"][arguments["rois"][:, 0].argsort(stable=True)]
    listed = [rois[rois[:, 0] == n, 1:] for n in range(len(arguments["input"]))]
    expected = case.function(**{**arguments, "rois": rois})
    assert torch.equal(case.function(**{**arguments, "rois": listed}), expected)
    assert torch.equal(case.function(**{**arguments, "rois": tuple(listed)}), expected)


@each_pool
def test_regions_may_be_mapped_over(case):
    """vmap over regions too, alone and under grad: how many samples a bin has may then not be looked up."""
    first, second = (case.make(case.mixed, seed=seed) for seed in (0, 1))
    names = [k for k, v in first.items() if isinstance(v, torch.Tensor)]
    stacked = [torch.stack([first[k], second[k]]) for k in names]

    def call(*values):
        return case.function(**{**first, **dict(zip(names, values, strict=True))})

    mapped = torch.func.vmap(call)(*stacked)
    grads = torch.func.vmap(torch.func.grad(lambda *values: call(*values).sum()))(*stacked)
    for i, arguments in enumerate((first, second)):
        assert_close(mapped[i], case.function(**arguments), torch.float64)
        assert_close(grads[i], run(case.function, arguments)["grad_input"], torch.float64)


def test_no_gradient_flows_to_regions(device):
    arguments = ALIGN.make(ALIGN.full, device=device)
    arguments["rois"].requires_grad_()
    arguments["input"].requires_grad_()
    out = deform_roi_pool(**arguments)
    assert torch.autograd.grad(out.sum(), [arguments["rois"]], allow_unused=True) == (None,)
    assert CONSTANT == ("rois",)


@pytest.mark.parametrize("kernels", [PORTABLE, TUNED])
def test_more_than_2_to_the_31_elements(kernels):
    # Untouched pages cost nothing: only what is written and read becomes real memory. channels_last is read in place.
    side = 46400
    image = torch.empty(1, 1, side, side)
    assert image.numel() > 2**31
    image[0, 0, -4:, -4:] = 7.0
    rois = torch.tensor([[0.0, side - 3, side - 3, side - 1, side - 1]])
    with cpu_kernels(kernels):
        out = deform_roi_pool(image, rois, output_size=2, sampling_ratio=2)
    assert torch.equal(out, torch.full((1, 1, 2, 2), 7.0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [12, 60, 160])
def test_portions_do_not_show(size, layout):
    # Some images, some rows of groups, or one row are held as rows of channels at a time (1 MiB). Parts lie in several.
    torch.manual_seed(0)
    image = torch.randn(5, 72, size, size).to(memory_format=layout)
    rois = torch.tensor([[n, 10.0 * n, 5.0, 90.0 + n, 120.0] for n in (4, 0, 2, 2, 3)])
    rois[:, 1:] *= size / 160
    offset = torch.randn(5, 2, 2, 2)
    how = dict(output_dim=8, group_size=3, output_size=(5, 4), part_size=2)
    whole = run(lambda **a: deform_ps_roi_pool(**a, **how), dict(input=image, rois=rois, offset=offset))
    for i, n in enumerate((4, 0, 2, 2, 3)):
        one = deform_ps_roi_pool(
            image[n : n + 1], torch.cat([torch.zeros(1, 1), rois[i : i + 1, 1:]], 1), offset[i : i + 1], **how
        )
        assert_close(whole["out"][i : i + 1], one, torch.float32)
    expected = run(
        lambda **a: reference.deform_ps_roi_pool(**a, **how),
        dict(input=image.double(), rois=rois.double(), offset=offset.double()),
    )
    for name, value in whole.items():
        assert_close(value, expected[name], torch.float32, name)


@each_pool
def test_equal_bits_on_any_number_of_threads(case):
    """Channels and regions are shared out, never sums: on the CPU the number of threads does not show at all."""
    arguments = case.make("many_regions", torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case.function, arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


# -- errors ---------------------------------------------------------------------------------------------------------


# What Python refuses with a message (errors/table_ops.py), as far as torch lets it through to the compiled operators.
BAD = [
    (POOLS, "input", lambda a: a["input"][0]),
    (POOLS, "input", lambda a: a["input"].long()),
    (POOLS, "input", lambda a: a["input"].numpy()),
    (POOLS, "input", lambda a: a["input"][..., :0]),
    (POOLS, "rois", lambda a: a["rois"][:, :4]),
    (POOLS, "rois", lambda a: a["rois"][0]),
    (POOLS, "rois", lambda a: a["rois"].long()),
    (POOLS, "rois", lambda a: a["rois"].double()),
    (POOLS, "rois", lambda a: a["rois"].to("meta")),
    (POOLS, "output_size", (1, 2, 3)),
    (POOLS, "spatial_scale", 0.0),
    (POOLS, "spatial_scale", -0.25),
    (POOLS, "spatial_scale", math.inf),
    (POOLS, "spatial_scale", math.nan),
    ((ALIGN,), "offset", lambda a: a["offset"][:5]),
    ((ALIGN,), "offset", lambda a: a["offset"][:, :1]),
    ((ALIGN,), "offset", lambda a: a["offset"].double()),
    ((ALIGN,), "offset", lambda a: a["offset"].to("meta")),
    ((ALIGN,), "mask", lambda a: a["offset"]),
    ((ALIGN,), "mask", lambda a: a["mask"][:, 0]),
    ((PART, PIXELS), "output_dim", 3),
    ((PART, PIXELS), "group_size", 3),
    ((PART, PIXELS), "group_size", 0),
    ((PART,), "offset", lambda a: a["offset"][:, :1]),
    ((PART,), "offset", lambda a: a["offset"].repeat(1, 3, 1, 1)),
    ((PART,), "offset", lambda a: a["offset"][1:]),
    ((PART,), "offset", lambda a: a["offset"][..., :1]),
    ((PART,), "mask", lambda a: a["mask"].repeat(1, 2, 1, 1)),
    ((PART,), "part_size", (3, 3)),
    ((PART,), "part_size", (0, 1)),
    ((PART,), "samples_per_part", 0),
]
BAD = [(case, *rest) for cases, *rest in BAD for case in cases]


@pytest.mark.parametrize(("case", "name", "value"), BAD, ids=[f"{i}-{b[0].name}-{b[1]}" for i, b in enumerate(BAD)])
def test_the_compiled_operators_protect_memory_by_themselves(case, name, value):
    """Callers from C++ or exported graphs skip the Python checks; forward and backward name the operator then."""
    arguments = case.make(case.full, torch.float32)
    grad = torch.ones_like(case.function(**arguments))
    bad = {name: value(arguments) if callable(value) else value}
    with pytest.raises((RuntimeError, ValueError), match=f"{case.name}|expected to be on cpu"):
        case.op(*(case.to_op(**arguments) | bad).values())
    with pytest.raises((RuntimeError, ValueError), match=f"{case.name}|expected to be on cpu"):
        case.backward_op(*(case.to_backward(grad, sum(WANTED.values()), **arguments) | bad).values())


@each_pool
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g[0], "expected shape"),
        (lambda g: g[:1], "expected shape"),
        (lambda g: g[..., 1:], "expected shape"),
        (lambda g: g.double(), "expected Float like input, got Double"),
    ],
)
def test_the_compiled_backward_checks_the_gradient_it_is_given(case, spoil, message):
    arguments = case.make(case.full, torch.float32)
    grad = torch.ones_like(case.function(**arguments))
    with pytest.raises(RuntimeError, match=f"grad_output: {message}"):
        case.backward_op(*case.to_backward(spoil(grad), sum(WANTED.values()), **arguments).values())
