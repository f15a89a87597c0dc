"""RoI pooling on the CPU as CUDA runs it: channels in vectors, both widths of numbers, and the order of elements."""

import emulation
import pytest
import torch
from cases import (
    BY_NAME,
    assert_close,
    convert,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    ps_roi_pool_arguments,
    run,
    tensors,
)
from coverings import pairwise, word

from dcn_plugin.ops._kernels import latest
from dcn_plugin.ops._operator import ORDERED, WANTED

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# The most that numbers of elements may be: those that need more are of 64 bits.
ORDERS = {"any_order": 0, "in_order": ORDERED}  # in which gradients are added up
INDICES = {"32_bits": 2**31 - 1, "64_bits": 0}
align, part, pixels = deform_roi_pool_arguments, deform_ps_roi_pool_arguments, ps_roi_pool_arguments
FORMS = {
    "one_vector": ("deform_roi_pool", align((2, 8, 7, 9))),
    "two_lanes": ("deform_roi_pool", align((2, 16, 7, 9))),
    "a_lane_more_than_others": ("deform_roi_pool", align((1, 72, 5, 6), sampling_ratio=3)),
    "many_slices": ("deform_roi_pool", align((1, 136, 5, 6), 3)),
    "channels_of_odd_number": ("deform_roi_pool", align((2, 21, 7, 9))),
    "one_channel": ("deform_roi_pool", align((3, 1, 9, 8), 12)),
    "adaptive": ("deform_roi_pool", align((2, 16, 7, 9), sampling_ratio=0, aligned=False)),
    "adaptive_and_far": ("deform_roi_pool", align((2, 8, 7, 9), sampling_ratio=0, spread=200.0)),
    "no_offsets": ("deform_roi_pool", align((2, 16, 7, 9), offset=False, mask=False)),
    "one_group": ("deform_ps_roi_pool", part((2, 16, 7, 9), output_dim=16, group_size=1, classes=2)),
    "groups": ("deform_ps_roi_pool", part((2, 48, 7, 9), output_dim=12, group_size=2, classes=2)),
    "other_parts": ("deform_ps_roi_pool", part(bins=(5, 3), parts=(2, 4))),
    "more_parts_than_bins": ("deform_ps_roi_pool", part(bins=(2, 2), parts=(5, 3))),
    "pixels": ("ps_roi_pool", pixels((2, 40, 7, 9), output_dim=10)),
    "pixels_of_one_group": ("ps_roi_pool", pixels((2, 16, 7, 9), output_dim=16, group_size=1, bins=(3, 2))),
}  # fmt: skip


@pytest.fixture(params=INDICES.values(), ids=INDICES)
def indices(request):
    emulation.load().set_portable(None, request.param)
    yield
    emulation.load().set_portable()


def laid_out(value, layout):
    return value.contiguous(memory_format=layout) if torch.is_tensor(value) and value.dim() == 4 else value


def problem(form, dtype):
    """Operator, arguments and gradient of the result; the float64 truth of both."""
    name, make = FORMS[form]
    case = BY_NAME[name]
    torch.manual_seed(0)
    beside = dtype if dtype in (torch.float64, torch.float32) else torch.float32
    arguments = {
        k: v.to(beside if k in case.float32_beside_half else dtype) if torch.is_tensor(v) else v
        for k, v in make().items()
    }
    exact = convert(arguments, dtype=torch.float64)
    grad = torch.randn(case.reference(**exact).shape).to(dtype)
    return case, arguments, grad, run(case.reference, exact, grad)


def check(case, arguments, grad, truth, order=0):
    operators, dtype = emulation.load(), grad.dtype
    found = getattr(operators, case.name)(*case.to_op(**arguments).values())
    assert_close(found, truth["out"], dtype, "out")
    assert found.is_contiguous(
        memory_format=torch.channels_last if arguments["input"].stride(1) == 1 else torch.contiguous_format
    )
    wanted = sum(WANTED[name] for name in tensors(arguments)) | order
    gradients = getattr(operators, f"{case.name}_backward")(*case.to_backward(grad, wanted, **arguments).values())
    returned = [r.name for r in case.backward_op._schema.returns]
    gradients = [gradients] if torch.is_tensor(gradients) else gradients
    compared = {name: value for name, value in zip(returned, gradients, strict=True) if name in truth}
    assert "grad_input" in compared
    for name, value in compared.items():
        assert_close(value, truth[name], dtype, name)
    used = latest(operators.kernels_used())
    assert used[case.name] == "portable"
    assert used[f"{case.name}_backward"] == ("portable ordered" if order else "portable")


@pytest.mark.parametrize(
    ("form", "dtype", "layout", "order"), pairwise(list(FORMS), TYPES, list(FORMATS), list(ORDERS)), ids=word
)
def test_results_and_gradients(form, dtype, layout, order, indices):
    case, arguments, grad, truth = problem(form, dtype)
    arguments = {k: laid_out(v, FORMATS[layout]) for k, v in arguments.items()}
    check(case, arguments, laid_out(grad, FORMATS[layout]), truth, ORDERS[order])


@pytest.mark.parametrize("dtype", TYPES, ids=word)
@pytest.mark.parametrize("first", [0, 1, 8])
def test_maps_that_begin_anywhere(first, dtype, indices):
    """Slices of the channels of a map, whose pixels are further apart than their channels; a gradient of one value."""
    for layout in FORMATS.values():
        case, arguments, grad, _ = problem("two_lanes", dtype)
        whole = torch.randn(2, 24, 7, 9).to(dtype).contiguous(memory_format=layout)
        arguments["input"] = whole[:, first : first + 16]
        grad = grad[:, :, :1, :1].expand_as(grad)
        check(case, arguments, grad, run(case.reference, convert(arguments, dtype=torch.float64), grad))


@pytest.mark.parametrize("layout", FORMATS)
def test_values_beside_the_corners_do_not_count(layout, indices):
    """A corner without weight is not counted, so that infinity there gives no NaN."""
    image = torch.randn(1, 16, 6, 6)
    image[:, :, 0, 3] = image[:, :, 2, 3] = float("inf")
    # Bins whose only sample lies on row 1, in columns 1 and 2.
    rois = torch.tensor([[0.0, 0.5, 0.5, 2.5, 1.5]])
    found = emulation.load().deform_roi_pool(
        laid_out(image, FORMATS[layout]), rois, None, None, [1, 2], 1.0, 1, 0.1, False
    )
    assert torch.equal(found[0, :, 0], image[0, :, 1, 1:3])


def test_invalid_regions_are_nan(indices):
    image = torch.randn(1, 16, 6, 6)
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 0, 0, 4, 4], [-1.0, 0, 0, 4, 4], [0.0, 0, 0, float("inf"), 4]])
    found = emulation.load().deform_roi_pool(image, rois, None, None, [2, 2], 1.0, 2, 0.1, True)
    assert found[0].isfinite().all() and found[1:].isnan().all()
