"""What nvcc makes of the CUDA kernels, interpreted (tests/ptx) on the package's own host code: values and gradients."""

import functools
import re
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from aiming import aim
from cases import (
    BY_NAME,
    assert_close,
    convert,
    deform_aggregate2d_arguments,
    deform_conv2d_arguments,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    ms_deform_attn_arguments,
    ps_roi_pool_arguments,
    run,
    tensors,
)
from ptx import Device, PtxError, compile_ptx

from dcn_plugin.ops._kernels import latest
from dcn_plugin.ops._operator import ORDERED, WANTED

pytestmark = pytest.mark.slow

HALF, SINGLE, BRAIN, DOUBLE = torch.float16, torch.float32, torch.bfloat16, torch.float64
H100 = 227 << 10
FOLDERS = {"deform_roi_pool": "roi_pool", "deform_ps_roi_pool": "roi_pool", "ps_roi_pool": "roi_pool"}


class Problem(NamedTuple):
    operator: str
    make: Any
    dtype: torch.dtype
    positions: torch.dtype
    path: str  # what the log says of forward and backward
    ordered: bool = False
    channels_last: bool = False
    multiprocessors: int = 0
    adds_vectors: bool = True
    shared: int = 99 << 10  # bytes that a block may have
    forward: str | None = None  # what serves the forward, where that is another path


conv, aggregate, attend = deform_conv2d_arguments, deform_aggregate2d_arguments, ms_deform_attn_arguments
LEVELS = ((6, 8), (3, 4), (1, 2))
PROBLEMS = {
    "conv": Problem("deform_conv2d", conv((2, 6, 7, 9), groups=2, offset_groups=3), SINGLE, SINGLE, "portable"),
    # In large cells, the last of which has the last chunk.
    "conv_of_two_places": Problem(
        "deform_conv2d", lambda: aim(conv((1, 6, 5, 9))(), [(1.0, 2.0), (3.0, 2.0)]), SINGLE, SINGLE, "portable"
    ),
    "conv_depthwise": Problem(
        "deform_conv2d", conv((2, 24, 7, 9), 24, groups=24, offset_groups=3), SINGLE, SINGLE, "portable",
        channels_last=True,
    ),
    "conv_depthwise_odd": Problem("deform_conv2d", conv((2, 6, 7, 9), 6, groups=6), HALF, SINGLE, "portable"),
    "conv_double": Problem("deform_conv2d", conv((1, 4, 6, 5), stride=2), DOUBLE, DOUBLE, "portable"),
    "conv_half": Problem(
        "deform_conv2d", conv((2, 4, 7, 6), mask=False, bias=False), HALF, HALF, "portable", channels_last=True
    ),
    "conv_far": Problem("deform_conv2d", conv((1, 4, 9, 7), spread=20.0), BRAIN, SINGLE, "portable"),
    "fused_128x64": Problem(
        "deform_conv2d", conv((2, 32, 11, 13), 40, offset_groups=2), BRAIN, SINGLE, "fused 128x64", channels_last=True
    ),
    "fused_128x128": Problem("deform_conv2d", conv((1, 24, 9, 7), 100), HALF, HALF, "fused 128x128"),
    "fused_64x256": Problem(
        "deform_conv2d", conv((1, 72, 9, 9), 200, stride=2, mask=False), HALF, SINGLE, "fused 64x256",
        channels_last=True,
    ),
    "fused_128x256": Problem(
        "deform_conv2d", conv((1, 24, 11, 13), 150, offset_groups=3), BRAIN, SINGLE, "fused 128x256", shared=H100
    ),
    "tf32_128x256": Problem(
        "deform_conv2d", conv((2, 20, 9, 7), 140), SINGLE, SINGLE, "fused tf32 128x256", channels_last=True, shared=H100
    ),
    "tf32_128x128": Problem(
        "deform_conv2d", conv((1, 72, 9, 9), 100, offset_groups=9), SINGLE, SINGLE, "fused tf32 128x128"
    ),
    "tf32_64x64": Problem(
        "deform_conv2d", conv((2, 24, 7, 9), 26, groups=2, mask=False), SINGLE, SINGLE, "fused tf32 64x64",
        multiprocessors=1000, channels_last=True,
    ),
    "fused_64x64": Problem(
        "deform_conv2d", conv((2, 32, 7, 9), 26, groups=2, spread=9.0), BRAIN, BRAIN, "fused 64x64",
        multiprocessors=1000,
    ),
    "fused_backward_of_float": Problem(
        "deform_conv2d", conv((2, 40, 7, 6), 12, offset_groups=10), SINGLE, SINGLE, "fused", channels_last=True,
        forward="portable",
    ),
    "depthwise": Problem(
        "deform_conv2d", conv((2, 48, 7, 6), 48, groups=48, offset_groups=3), BRAIN, SINGLE, "fused depthwise",
        channels_last=True,
    ),
    "depthwise_planes": Problem(
        "deform_conv2d", conv((1, 16, 9, 8), 16, kernel=(5, 5), padding=2, groups=16, mask=False), HALF, HALF,
        "fused depthwise", multiprocessors=1000,
    ),
    "roi": Problem("deform_roi_pool", deform_roi_pool_arguments(sampling_ratio=0), SINGLE, SINGLE, "portable"),
    "roi_ordered": Problem(
        "deform_roi_pool", deform_roi_pool_arguments(), HALF, SINGLE, "portable", ordered=True, channels_last=True
    ),
    "roi_vectors": Problem(
        "deform_roi_pool", deform_roi_pool_arguments((2, 24, 7, 9)), BRAIN, SINGLE, "portable", channels_last=True
    ),
    "roi_vectors_of_float": Problem(
        "deform_roi_pool", deform_roi_pool_arguments((2, 12, 7, 9)), SINGLE, SINGLE, "portable", channels_last=True
    ),
    "ps": Problem("deform_ps_roi_pool", deform_ps_roi_pool_arguments(classes=2), SINGLE, SINGLE, "portable"),
    "ps_ordered": Problem(
        "deform_ps_roi_pool", deform_ps_roi_pool_arguments(bins=(2, 2), parts=(5, 3)), BRAIN, SINGLE, "portable",
        ordered=True,
    ),
    "pixels": Problem("ps_roi_pool", ps_roi_pool_arguments(), SINGLE, SINGLE, "portable"),
    "pixels_ordered": Problem("ps_roi_pool", ps_roi_pool_arguments(), DOUBLE, DOUBLE, "portable", ordered=True),
    "attend": Problem(
        "ms_deform_attn", attend((2, 3, 5), LEVELS, points=(3, 1, 2), reference=4, softmax=True, merged=True), SINGLE,
        SINGLE, "portable",
    ),
    "attend_ordered": Problem(
        "ms_deform_attn", attend((2, 2, 6), points=4, reference=2), HALF, SINGLE, "portable", ordered=True
    ),
    "attend_double": Problem("ms_deform_attn", attend(softmax=True), DOUBLE, DOUBLE, "portable"),
    "fused_attend": Problem(
        "ms_deform_attn", attend((2, 3, 32), LEVELS, points=4, reference=2, softmax=True), SINGLE, SINGLE, "fused"
    ),
    "fused_attend_half": Problem(
        "ms_deform_attn", attend((1, 2, 40), LEVELS, 11, points=(1, 7, 3), merged=True), HALF, HALF, "fused",
        adds_vectors=False,
    ),
    "fused_attend_ordered": Problem(
        "ms_deform_attn", attend((2, 2, 96), LEVELS, 3, reference=4, one_reference=True), BRAIN, SINGLE, "fused",
        ordered=True,
    ),
    "aggregate": Problem("deform_aggregate2d", aggregate(softmax=True), SINGLE, SINGLE, "portable"),
    "aggregate_packed": Problem(
        "deform_aggregate2d", aggregate((2, 5, 4, 8), 2, packed=True, official_order=True), BRAIN, SINGLE, "portable"
    ),
    "aggregate_ordered": Problem(
        "deform_aggregate2d", aggregate((1, 6, 5, 48), 3, remove_center=True), HALF, HALF, "portable", ordered=True
    ),
    "fused_aggregate": Problem(
        "deform_aggregate2d", aggregate((2, 6, 7, 48), 3, offset_scale=2.0, softmax=True), SINGLE, SINGLE, "fused"
    ),
    "fused_aggregate_packed": Problem(
        "deform_aggregate2d", aggregate((1, 7, 5, 64), 4, packed=True, official_order=True), BRAIN, SINGLE, "fused",
        adds_vectors=False,
    ),
    "fused_aggregate_ordered": Problem(
        "deform_aggregate2d", aggregate((1, 6, 5, 48), 2, (5, 5), 2, 2, remove_center=True), HALF, HALF, "fused",
        ordered=True,
    ),
}  # fmt: skip


@functools.cache
def ptx_of(operator: str) -> str:
    folder = FOLDERS.get(operator, operator)
    try:
        (path,) = compile_ptx([f"csrc/ops/{folder}/{folder}.cu"])
    except LookupError as without:
        pytest.skip(str(without))
    return path.read_text()


@functools.cache
def device_of(operator: str) -> Device:
    return Device([ptx_of(operator)])


def arguments_of(problem: Problem) -> dict[str, Any]:
    torch.manual_seed(0)
    exact, case = problem.make(), BY_NAME[problem.operator]
    arguments = {
        k: v.to(problem.positions if k in case.float32_beside_half else problem.dtype)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in exact.items()
    }
    if problem.operator == "deform_conv2d":
        # Near whole pixels, where the derivative jumps, rounding would decide on the side.
        offset = arguments["offset"].floor() + 0.25 + 0.5 * torch.rand(arguments["offset"].shape)
        arguments["offset"] = offset.to(problem.positions)
    return arguments


def laid_out(value: Any, channels_last: bool) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return value
    return value.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check(problem: Problem, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and all gradients are those of the reference in float64."""
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", problem.path.split()[0])
    emulation.load().set_schedule(0, False, False, problem.multiprocessors, problem.adds_vectors, problem.shared)
    tf32 = "tf32" in problem.path
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    case, arguments = BY_NAME[problem.operator], arguments_of(problem)
    exact = convert(arguments, dtype=torch.float64)
    torch.manual_seed(1)
    grad = torch.randn(case.reference(**exact).shape).to(problem.dtype)
    truth = run(case.reference, exact, grad)
    arguments = {k: laid_out(v, problem.channels_last) for k, v in arguments.items()}
    # TF32 has the digits of float16.
    found = device.call(case.name, *case.to_op(**arguments).values())
    assert_close(found, truth["out"], HALF if tf32 else problem.dtype, "out")
    # Bias has a gradient in closed form, which no kernel finds.
    names = [name for name in tensors(arguments) if name != "bias"]
    wanted = sum(WANTED[name] for name in names) | (ORDERED if problem.ordered else 0)
    grad = laid_out(grad, problem.channels_last)
    found = device.call(f"{case.name}_backward", *case.to_backward(grad, wanted, **arguments).values())
    returned = [r.name for r in case.backward_op._schema.returns]
    for name, value in zip(returned, [found] if isinstance(found, torch.Tensor) else found, strict=True):
        if name in truth:
            assert_close(value.reshape(truth[name].shape), truth[name], problem.dtype, name)
    used = latest(emulation.load().kernels_used())
    assert used[case.name].startswith(problem.forward or problem.path)
    assert used[f"{case.name}_backward"].startswith(problem.path.split()[0])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code_does_what_the_reference_says(problem, monkeypatch):
    check(PROBLEMS[problem], device_of(PROBLEMS[problem].operator), monkeypatch)


# What is changed in the text of the PTX, and a problem that must not survive it.
MUTANTS = {
    "no_wait": ("fused_128x64", r"cp\.async\.wait_group\s+\d+;", ""),
    "no_barrier": ("fused_128x64", r"bar\.sync\s+0;", ""),
    "swapped_operands": ("fused_128x128", r"(mma\.sync[^;]*?\{[^}]*\},\s*\{)([^,]*),([^,]*),", r"\1\3,\2,"),
    "other_direction": ("fused_attend", r"shfl\.sync\.bfly\.b32", "shfl.sync.down.b32"),
    "no_atomic": ("pixels", r"atom\.global\.add\.f32\s+%f\d+,", "st.global.f32"),
    "swapped_channels": ("roi_vectors_of_float", r"(ld\.global\.v4\.\w+\s+\{)(%\w+), (%\w+),", r"\1\3, \2,"),
    "other_direction_of_conv": ("fused_128x64", r"shfl\.sync\.bfly\.b32", "shfl.sync.down.b32"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_machine_code_is_found(mutant, monkeypatch):
    name, pattern, replacement = MUTANTS[mutant]
    problem = PROBLEMS[name]
    text, changes = re.subn(pattern, replacement, ptx_of(problem.operator))
    assert changes
    with pytest.raises((AssertionError, PtxError)):
        check(problem, Device([text]), monkeypatch)
