"""RoI pooling's gradients in torch's deterministic mode: right, and equal bits from run to run."""

import math
import random
import warnings
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    Calls,
    assert_close,
    convert,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    leaves,
    ps_roi_pool_arguments,
    run,
    tensors,
)
from coverings import cover
from torch.library import opcheck

from dcn_plugin.ops._operator import ORDERED, WANTED

ALIGN, PART, PIXELS = (
    next(c for c in CASES if c.name == n) for n in ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")
)
POOLS = (ALIGN, PART, PIXELS)
CONFIGS = [(case, config) for case in POOLS for config in case.configs]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = {"ordered": True, "fastest": False}
each_pool = pytest.mark.parametrize("case", POOLS, ids=lambda c: c.name)


@pytest.fixture(params=MODES)
def mode(request):
    torch.use_deterministic_algorithms(MODES[request.param])
    yield MODES[request.param]
    torch.use_deterministic_algorithms(False)


only_ordered = pytest.mark.parametrize("mode", ["ordered"], indirect=True)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equals_reference(case, arguments, dtype=torch.float64, device="cpu"):
    """Value and gradients, for a gradient of the result that is drawn."""
    truth = convert(arguments, dtype=torch.float64, device="cpu")
    grad = torch.randn(case.reference(**truth).shape, dtype=torch.float64).to(dtype)
    expected = run(case.reference, truth, grad)
    for name, value in run(case.function, arguments, grad.to(device)).items():
        assert_close(value, expected[name], dtype, f"{case.name}: {name}")


# -- the gradients are the reference's ------------------------------------------------------------------------------


@only_ordered
@cover("problem, dtype, layout", CONFIGS, DTYPES, LAYOUTS)
def test_ordered_gradients_equal_the_reference(problem, layout, dtype, mode, device):
    case, config = problem
    arguments = case.make(config, dtype, device)
    arguments["input"] = arguments["input"].contiguous(memory_format=layout)
    assert_equals_reference(case, arguments, dtype, device)


def spread_out(image):
    """Every other pixel of every third channel of something larger."""
    n, c, h, w = image.shape
    large = image.new_zeros(n, 3 * c, h, 2 * w)
    large[:, ::3, :, ::2] = image
    return large[:, ::3, :, ::2]


def transposed(image):
    return image.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def images_last(image):
    return image.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def expanded(image):
    return image[:1, :, :1].expand(image.shape)


@cover("case, lay, mode", POOLS, [spread_out, transposed, images_last, expanded], MODES, indirect=["mode"])
def test_any_strides(case, lay, mode, device):
    arguments = case.make(case.mixed, device=device)
    arguments["input"] = lay(arguments["input"])
    assert_equals_reference(case, arguments, device=device)


@cover("seed, mode", range(16), MODES, indirect=["mode"])
def test_random_geometries(seed, mode, device):
    """Rows longer than what one thread adds to, regions on top of each other, many samples in a bin, sides of 1."""
    generator = random.Random(seed)
    pick, below = generator.choice, generator.randint
    torch.manual_seed(seed)
    batch, height, width, regions = below(1, 3), below(1, 20), pick([1, 15, 16, 17, 33, 70]), below(2, 30)
    scale, bins = pick([1.0, 0.5, 0.0625, 0.3, 2.0]), (below(1, 6), below(1, 6))
    common = dict(regions=regions, bins=bins, spatial_scale=scale)
    classes, group_size = below(1, 3), below(1, 4)
    # More outputs in a class than there are slices of them.
    output_dim = classes * pick([1, 5, 16, 21])
    channels = output_dim * group_size**2
    sensitive = dict(output_dim=output_dim, group_size=group_size, **common)
    shifts = dict(offset=pick([True, False]), mask=pick([True, False]), spread=pick([0.5, 3.0, 30.0]))
    layout = pick(LAYOUTS)
    for case, make in (
        (ALIGN, deform_roi_pool_arguments(
            (batch, below(1, 40), height, width), sampling_ratio=below(0, 9), aligned=pick([True, False]),
            **shifts, **common,
        )),
        (PART, deform_ps_roi_pool_arguments(
            (batch, channels, height, width), parts=(below(1, 5), below(1, 5)), samples_per_part=below(1, 9),
            classes=classes, **shifts, **sensitive,
        )),
        (PIXELS, ps_roi_pool_arguments((batch, channels, height, width), **sensitive)),
    ):  # fmt: skip
        arguments = convert(make(), device=device)
        arguments["input"] = arguments["input"].contiguous(memory_format=layout)
        assert_equals_reference(case, arguments, device=device)


UNSOUND = [
    [2, 0, 0, 4, 4],
    [-1, 0, 0, 4, 4],
    [0.5, 0, 0, 4, 4],
    [math.nan, 0, 0, 4, 4],
    [0, math.nan, 0, 4, 4],
    [0, 0, -math.inf, 4, 4],
    [0, 5, 0, 4, -math.inf],
]


@cover("case, roi, mode", POOLS, UNSOUND, MODES, indirect=["mode"])
def test_an_unsound_region_adds_nothing(case, roi, mode, device):
    arguments = case.make(case.full, device=device)
    others = [i for i in range(len(arguments["rois"])) if i != 2]
    without = {k: v[others] if k in case.per_result else v for k, v in arguments.items()}
    expected = run(case.reference, convert(without, device="cpu"))["grad_input"]
    arguments["rois"][2] = torch.tensor(roi, dtype=torch.float64)
    result = run(case.compiled, arguments)
    assert_close(result["grad_input"], expected, torch.float64)


@cover("case, corner, mode", POOLS, [300, 1e9, 1e18, 1e30, 3e38], MODES, indirect=["mode"])
def test_regions_far_larger_than_the_map(case, corner, mode, device):
    """They take no longer than others, and are added where the reference, which takes every sample, adds them."""
    arguments = case.make(case.bare, torch.float32, device)
    arguments["rois"][0] = torch.tensor([0.0, -corner, -corner, corner, corner])
    arguments["rois"][1] = torch.tensor([0.0, corner / 2, corner / 2, corner, corner])
    if "sampling_ratio" in arguments:
        arguments["sampling_ratio"] = 0
    assert run(case.function, arguments)["grad_input"].isfinite().all()
    if corner == 300:
        assert_equals_reference(case, arguments, torch.float32, device)


@cover("case, samples, mode", [ALIGN, PART], [0, 3, 40], MODES, indirect=["mode"])
def test_offsets_that_are_not_finite(case, samples, mode, device):
    arguments = case.make(case.full, torch.float32, device)
    arguments["sampling_ratio" if case is ALIGN else "samples_per_part"] = max(samples, int(case is PART))
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, -(2.0**63), 1e-45, 0.5, -0.5])
    picked = torch.randint(len(hostile), arguments["offset"].shape, generator=torch.Generator().manual_seed(0))
    arguments["offset"] = hostile[picked].to(device)
    arguments["rois"][:, 3:] += 4  # no region of size 0, whose 0 * inf is NaN
    actual, expected = run(case.function, arguments), run(case.reference, convert(arguments, device="cpu"))
    for name in ("grad_input", "grad_mask"):
        assert_close(actual[name], expected[name], torch.float32, name)


@cover("case, mode", POOLS, MODES, indirect=["mode"])
def test_no_regions_and_no_images(case, mode, device):
    arguments = case.make(case.mixed, torch.float32, device)
    no_regions = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    for empty in (no_regions, {**no_regions, "input": arguments["input"][:0]}):
        for name, value in tensors(empty).items():
            grad = run(case.function, empty)[f"grad_{name}"]
            assert grad.shape == value.shape and not grad.any()


# -- equal bits -----------------------------------------------------------------------------------------------------


def crowded(case, dtype, device):
    """Many regions on few pixels, which the portable path adds to on several threads at the same time."""
    torch.manual_seed(0)
    make = {
        ALIGN.name: partial(deform_roi_pool_arguments, (2, 40, 9, 37), 200, (7, 7), sampling_ratio=0, spread=1.0),
        PART.name: partial(
            deform_ps_roi_pool_arguments, (2, 72, 9, 37), 200, 18, 2, (7, 7), parts=(3, 3), classes=2, spread=1.0
        ),
        PIXELS.name: partial(ps_roi_pool_arguments, (2, 72, 9, 37), 200, 18, 2, (7, 7)),
    }[case.name]
    return convert(make()(), dtype=dtype, device=device)


@only_ordered
@cover("case, dtype", POOLS, DTYPES)
def test_equal_bits_from_run_to_run_on_any_number_of_threads(case, dtype, mode, device, set_threads):
    arguments = crowded(case, dtype, device)
    grad = torch.randn_like(case.function(**arguments))
    set_threads(1)
    first = run(case.function, arguments, grad)
    for _ in range(5):
        set_threads(2)
        for name, value in run(case.function, arguments, grad).items():
            assert torch.equal(value, first[name]), name


@only_ordered
@each_pool
def test_deterministic_mode_neither_raises_nor_warns(case, mode, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(case.function, case.make(case.full, device=device))


# -- what torch traces ----------------------------------------------------------------------------------------------


@each_pool
def test_the_mode_of_the_time_reaches_the_operator(case):
    """Also in a compiled graph, which is made anew when the mode changes."""
    torch._dynamo.reset()
    arguments = leaves(case.make(case.full, torch.float32))
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    gradients = sum(WANTED[name] for name in tensors(arguments))
    try:
        for ordered in (False, True, False):
            torch.use_deterministic_algorithms(ordered)
            for function in (case.function, compiled):
                out = function(**arguments)
                with Calls(case.backward_op) as calls:
                    torch.autograd.grad(out.sum(), list(tensors(arguments).values()))
                assert [wanted for *_, wanted in calls.found] == [gradients | ORDERED * ordered]
    finally:
        torch.use_deterministic_algorithms(False)


@only_ordered
@each_pool
def test_opcheck(case, mode, device):
    """Of every configuration in tests/test_contracts.py; the mode is one bit more, whatever the arguments are."""
    for layout in LAYOUTS:
        arguments = leaves(case.make(case.full, device=device))
        arguments["input"] = arguments["input"].detach().contiguous(memory_format=layout).requires_grad_()
        opcheck(case.op, tuple(case.to_op(**arguments).values()))


@only_ordered
@cover("case, asked", POOLS, [(), ("input",), ("input", "offset", "mask")])
def test_the_backward_operator_gives_what_is_asked_for_alone(case, asked, mode, device):
    """The ordered bit asks for no gradient."""
    arguments = case.make(case.full, device=device)
    wanted = sum(WANTED[name] for name in asked) | ORDERED
    grad = torch.ones_like(case.compiled(**arguments))
    found = case.backward_op(*case.to_backward(grad, wanted, **arguments).values())
    found = (found,) if isinstance(found, torch.Tensor) else found
    expected = run(case.reference, convert(arguments, device="cpu"))
    for name, value in zip(("input", "offset", "mask"), found, strict=False):
        if name in asked:
            assert_close(value, expected[f"grad_{name}"], torch.float64, name)
        else:
            assert value.shape == (0,)


@only_ordered
@each_pool
def test_second_gradients(case, mode):
    arguments = leaves(case.make(case.mixed))
    names, values = list(tensors(arguments)), list(tensors(arguments).values())
    assert torch.autograd.gradgradcheck(
        lambda *t: case.function(**{**arguments, **dict(zip(names, t, strict=True))}), values, fast_mode=True
    )
