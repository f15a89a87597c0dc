"""Regions that are inside out (x2 < x1 or y2 < y1), as boxes that are predicted may be: pooled as the originals do."""

import functools

import pytest
import torch
from cases import CASES, assert_close, convert, run
from roi_loops import loops_of_deform_ps_roi_pool, loops_of_deform_roi_pool, loops_of_ps_roi_pool
from torch import nn

from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool

ALIGN, PART, PIXELS = (
    next(c for c in CASES if c.name == n) for n in ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")
)
POOLS = (ALIGN, PART, PIXELS)
LOOPS = {
    ALIGN.name: loops_of_deform_roi_pool, PART.name: loops_of_deform_ps_roi_pool, PIXELS.name: loops_of_ps_roi_pool,
}  # fmt: skip
each_pool = pytest.mark.parametrize("case", POOLS, ids=lambda c: c.name)
SMALL = [(c, k) for c in POOLS for k in c.configs if "many" not in k and k != "far"]
each_config = pytest.mark.parametrize(("case", "config"), SMALL, ids=lambda v: v if isinstance(v, str) else v.name)


def turned(arguments, seed=0):
    """The same with its regions inside out along x, along y or both, all of them."""
    rois = arguments["rois"].clone()
    axes = torch.randint(1, 4, (len(rois),), generator=torch.Generator().manual_seed(seed))
    for bit, low, high in ((1, 1, 3), (2, 2, 4)):
        rows = (axes & bit).bool().to(rois.device)
        lower, upper = rois[rows, low].minimum(rois[rows, high]), rois[rows, low].maximum(rois[rows, high])
        rois[rows, low], rois[rows, high] = upper + 0.3, lower - 0.3  # those without size, too
    assert ((rois[:, 3:] < rois[:, 1:3]).any(1)).all()
    return {**arguments, "rois": rois}


@pytest.fixture(params=[True, False], ids=["ordered", "fastest"])
def mode(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


# -- values ---------------------------------------------------------------------------------------------------------


@each_config
def test_values_are_those_of_the_formulas_in_loops(case, config, device):
    arguments = turned(case.make(config))
    expected = LOOPS[case.name](**arguments)
    assert_close(case.function(**convert(arguments, device=device)), expected, torch.float64)
    assert_close(case.reference(**arguments), expected, torch.float64)
    adaptive = case is ALIGN and arguments["sampling_ratio"] == 0 and arguments["aligned"]
    assert expected.any() != adaptive  # no sample at all, or something to compare


@functools.cache
def in_loops(samples):
    """Arguments with that many samples a bin along each axis, and what loops over them give, which takes seconds."""
    arguments = turned(ALIGN.make("modulated")) | {"sampling_ratio": samples}
    return arguments, loops_of_deform_roi_pool(**arguments)


@pytest.mark.parametrize("samples", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_number_of_samples_on_every_path(samples, dtype, vectors):
    """Few of them are found bin by bin, in vectors, and many one by one."""
    arguments, expected = in_loops(samples)
    assert_close(deform_roi_pool(**convert(arguments, dtype=dtype)), expected, dtype)


def test_numbers_worked_out_by_hand(device):
    """On a map of 10 * y + x."""
    y, x = torch.arange(6.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64)
    ramp = (10 * y[:, None] + x)[None, None].to(device)
    rois = torch.tensor([[0.0, 6, 1, 2, 4]], dtype=torch.float64, device=device)  # from x = 6 back to 2

    def of(values):
        return torch.tensor(values, dtype=torch.float64)

    # From x = 5.5 on, bins -2 wide: their centres are at 4.5 and 2.5; that of the row at y = 0.5 + 1.5.
    how = dict(output_size=(1, 2), sampling_ratio=1)
    assert_close(deform_roi_pool(ramp, rois, **how), of([[[[24.5, 22.5]]]]), torch.float64)
    # An offset of 1 along x is gamma * size = 0.1 * -4 pixels: to the left.
    right = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    assert_close(deform_roi_pool(ramp, rois, right, **how), of([[[[24.1, 22.1]]]]), torch.float64)
    # An adaptive number of samples is ceil(-2) along x: none.
    assert_close(deform_roi_pool(ramp, rois, output_size=(1, 2)), of([[[[0.0, 0.0]]]]), torch.float64)
    # Not aligned: at least 1 x 1, from (6, 1) on.
    whole = deform_roi_pool(ramp, rois, output_size=1, sampling_ratio=1, aligned=False)
    assert_close(whole, of([[[[10 * 2.5 + 6.5]]]]), torch.float64)
    # Position-sensitive: 0.1 wide, from x = 5.5 on; 4 high, from y = 0.5 on, with samples at the starts of the halves.
    how = dict(output_dim=1, group_size=1, output_size=1)
    part = deform_ps_roi_pool(ramp, rois, samples_per_part=2, **how)
    assert_close(part, of([[[[10 * (0.5 + 2.5) / 2 + 5.525]]]]), torch.float64)
    # Whole pixels: column 6 alone, rows 1 to 4.
    assert_close(ps_roi_pool(ramp, rois, **how), of([[[[10 * 2.5 + 6]]]]), torch.float64)


def test_a_region_turned_around_is_pooled_from_the_other_end(device, mode):
    """Without offsets its bins are those of the region as it should be, in the opposite order; gradients too."""
    arguments = ALIGN.make("plain", device=device)
    arguments["rois"][:, 3:] += 0.5  # none without size
    grad = torch.randn_like(deform_roi_pool(**arguments))
    expected = run(deform_roi_pool, arguments, grad)
    back = arguments | {"rois": arguments["rois"][:, [0, 3, 4, 1, 2]]}
    actual = run(deform_roi_pool, back, grad.flip(2, 3))
    assert_close(actual["out"], expected["out"].flip(2, 3), torch.float64)
    assert_close(actual["grad_input"], expected["grad_input"], torch.float64)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(1, True), (3, True), (2, False), (0, False)])
def test_without_offsets_it_is_torchvisions_roi_align(sampling_ratio, aligned, device, mode):
    torchvision = pytest.importorskip("torchvision")
    arguments = turned(ALIGN.make("plain", device=device)) | {"sampling_ratio": sampling_ratio, "aligned": aligned}
    given = {k: arguments[k] for k in ("input", "rois", "output_size", "spatial_scale")}
    grad = torch.randn_like(deform_roi_pool(**arguments))

    def theirs(input, rois, output_size, spatial_scale):
        return torchvision.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)

    torch.use_deterministic_algorithms(False)  # in which it computes other things
    expected = run(theirs, given, grad)
    torch.use_deterministic_algorithms(mode)
    actual = run(deform_roi_pool, arguments, grad)
    for name, value in expected.items():
        assert_close(actual[name], value, torch.float64, name)


# -- gradients ------------------------------------------------------------------------------------------------------


@each_config
def test_gradients_equal_finite_differences_and_the_reference(case, config, device, mode):
    arguments = turned(case.make(config, device=device))
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and k != "rois"]
    leaves = [arguments[k].clone().requires_grad_() for k in names]

    def call(*values):
        return case.function(**arguments | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    expected = run(case.reference, convert(arguments, device="cpu"))
    for name, value in run(case.function, arguments).items():
        assert_close(value, expected[name], torch.float64, name)


@each_pool
def test_second_gradients_equal_finite_differences(case):
    arguments = turned(case.make(case.full))
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and k != "rois"]
    leaves = [arguments[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradgradcheck(
        lambda *t: case.function(**arguments | dict(zip(names, t, strict=True))), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@each_pool
def test_types_and_layouts(case, layout, dtype, device, mode):
    arguments = turned(case.make(case.mixed, dtype, device))
    arguments["input"] = arguments["input"].contiguous(memory_format=layout)
    expected = run(case.reference, convert(arguments, dtype=torch.float64, device="cpu"))
    for name, value in run(case.function, arguments).items():
        assert_close(value, expected[name], dtype, name)


# -- everything that torch does with an operator --------------------------------------------------------------------


class Call(nn.Module):
    def __init__(self, case, arguments):
        super().__init__()
        self.case, self.options = case, {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}

    def forward(self, **tensors):
        return self.case.function(**tensors, **self.options)


@pytest.mark.parametrize(
    ("case", "config"),
    [(ALIGN, "modulated"), (ALIGN, "adaptive"), (ALIGN, "unaligned"), (PART, "modulated"), (PIXELS, "square")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_graphs_and_transforms_give_what_eager_code_gives(case, config):
    arguments = turned(case.make(config))
    expected = case.function(**arguments)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    model = Call(case, arguments)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(**tensors), expected)
    assert torch.equal(torch.export.export(model, (), tensors).module()(**tensors), expected)
    two = {k: torch.stack([v, v.flip(0) if k == "input" else v]) for k, v in tensors.items()}
    mapped = torch.func.vmap(lambda t: model(**t))(two)
    assert_close(mapped[0], expected, torch.float64)
    assert_close(mapped[1], model(**{k: v[1] for k, v in two.items()}), torch.float64)
    others = {k: v for k, v in tensors.items() if k != "input"}
    grad = torch.func.grad(lambda x: model(input=x, **others).sum())(tensors["input"])
    assert_close(grad, run(case.function, arguments)["grad_input"], torch.float64)
    tangent = torch.func.jvp(lambda x: model(input=x, **others), (tensors["input"],), (tensors["input"],))[1]
    assert_close(tangent, expected, torch.float64)  # it is linear in its input


# -- sizes that are huge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "samples"),
    [(ALIGN, 0), (ALIGN, 2), (ALIGN, 30), (PART, 2), (PIXELS, 0)],
    ids=lambda v: str(v) if isinstance(v, int) else v.name,
)
@pytest.mark.parametrize("corner", [300, 1e18, 1.5e38, 3e38])
def test_regions_far_larger_than_the_map(case, samples, corner, device, mode):
    """They take no longer than others, and read nothing out of bounds; one that overflows gives NaN or nothing."""
    arguments = case.make(case.full, torch.float32, device)
    arguments["rois"][0] = torch.tensor([0.0, corner, corner, -corner, -corner])
    arguments["rois"][1] = torch.tensor([0.0, -corner / 2, corner, -corner, 4.0])
    if case is ALIGN:
        arguments["sampling_ratio"] = samples
    elif case is PART:
        arguments["samples_per_part"] = samples
    result = run(case.function, arguments)
    assert result["grad_input"].isfinite().all() and result["out"][2:].isfinite().all()
    positions = run(case.reference, convert(arguments, device="cpu"))
    assert torch.equal(result["out"].isnan().cpu(), positions["out"].isnan())
    if corner == 300:
        for name, value in run(case.reference, convert(arguments, dtype=torch.float64, device="cpu")).items():
            assert_close(result[name], value, torch.float32, name)
