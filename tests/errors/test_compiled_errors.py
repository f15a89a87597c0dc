"""Every check of the compiled operators is met by a call that it refuses, and names the operator and the argument.

Callers of torch.ops.dcn_plugin.* and exported graphs have not passed through Python's checks. The checks are found in
the source of the operators; a case says which one it is about by the beginning of its condition.
"""

import re
from pathlib import Path

import pytest
import torch
from cases import BY_NAME
from conftest import PORTABLE, cpu_kernels

from dcn_plugin.ops._operator import ORDERED

OPS = torch.ops.dcn_plugin
OPERATORS = "|".join(BY_NAME)
SOURCE = Path(__file__).resolve().parents[2] / "csrc"
# Read by the CUDA operators alone; tests/ops/test_emulated_cuda.py has its error.
CUDA_ONLY = ("runtime/kernels.h",)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def closing(text, start):
    """Where the parenthesis that opens at `start` closes."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise AssertionError(text[start : start + 80])


def checks():
    """(file, arguments) of every call of `check`, but not its definition and not what hands its arguments on."""
    found = []
    for path in sorted([*SOURCE.rglob("*.h"), *SOURCE.rglob("*.cpp")]):
        file = str(path.relative_to(SOURCE))
        if file in CUDA_ONLY or "/cuda/" in file:
            continue
        text = path.read_text()
        for match in re.finditer(r"(?<!void )\bcheck\(", text):
            arguments = text[match.end() : closing(text, match.end() - 1)]
            if "parts..." not in arguments:
                found.append((file, " ".join(arguments.split())))
    return found


def on_cpu(op, arguments):
    """The CPU's own kernel: torch would send a call with a tensor that is elsewhere to that place."""
    return op.default.redispatch(CPU, *arguments)


CONV = dict(
    input=torch.zeros(2, 4, 6, 6), offset=torch.zeros(2, 18, 4, 4), weight=torch.zeros(6, 4, 3, 3),
    bias=torch.zeros(6), mask=torch.zeros(2, 9, 4, 4), stride=[1, 1], padding=[0] * 4, dilation=[1, 1],
)  # fmt: skip
ALIGN = dict(
    input=torch.zeros(2, 4, 6, 6), rois=torch.zeros(3, 5), offset=torch.zeros(3, 2, 2, 2), mask=torch.zeros(3, 1, 2, 2),
    output_size=[2, 2], spatial_scale=1.0, sampling_ratio=2, gamma=0.1, aligned=True,
)  # fmt: skip
PART = dict(
    input=torch.zeros(2, 4, 6, 6), rois=torch.zeros(3, 5), offset=torch.zeros(3, 2, 2, 2), mask=torch.zeros(3, 1, 2, 2),
    output_dim=1, group_size=2, output_size=[2, 2], part_size=[2, 2], samples_per_part=2, spatial_scale=1.0,
    offset_scale=0.1,
)  # fmt: skip


def conv(**changes):
    return on_cpu(OPS.deform_conv2d, (CONV | changes).values())


def conv_backward(grad_output=None, **changes):
    grad_output = torch.zeros(2, 6, 4, 4) if grad_output is None else grad_output
    arguments = {name: value for name, value in (CONV | changes).items() if name != "bias"}
    return on_cpu(OPS.deform_conv2d_backward, [grad_output, *arguments.values(), 15])


def align(**changes):
    return on_cpu(OPS.deform_roi_pool, (ALIGN | changes).values())


def part(**changes):
    return on_cpu(OPS.deform_ps_roi_pool, (PART | changes).values())


def align_backward(grad_output):
    return on_cpu(OPS.deform_roi_pool_backward, [grad_output, *ALIGN.values(), 15])


ATTEND = dict(
    value=torch.zeros(2, 16, 3, 4), sampling_locations=torch.zeros(2, 5, 3, 6, 2),
    attention_weights=torch.zeros(2, 5, 3, 6), reference_points=torch.zeros(2, 5, 2, 4), spatial_shapes=[3, 4, 2, 2],
    points=[4, 2], softmax=True, offset_scale=0.5,
)  # fmt: skip


def attend(**changes):
    return on_cpu(OPS.ms_deform_attn, (ATTEND | changes).values())


def attend_backward(grad_output):
    return on_cpu(OPS.ms_deform_attn_backward, [grad_output, *ATTEND.values(), 240])


def too_many_points():
    """2^31 points of a query, all of which are one value."""
    one = torch.zeros(1)
    arguments = ATTEND | dict(
        value=one.expand(1, 1, 2, 1), sampling_locations=one.expand(1, 1, 2, 2**30, 2), attention_weights=None,
        reference_points=None, spatial_shapes=[1, 1], points=[2**30], softmax=False,
    )  # fmt: skip
    with cpu_kernels(PORTABLE):
        on_cpu(OPS.ms_deform_attn_backward, [torch.zeros(1, 1, 2), *arguments.values(), 16 | ORDERED])


def too_many_samples():
    """A kernel of 2^31 taps, all of which are one value."""
    one = torch.zeros(1, 1, 1, 1)
    large = one.expand(1, 1, 2**16, 2**15)
    with cpu_kernels(PORTABLE):
        conv_backward(one, input=large, weight=large, offset=one.expand(1, 2**32, 1, 1), mask=None)


GATHER = dict(
    value=torch.zeros(2, 4, 5, 6), offset=torch.zeros(2, 4, 5, 3, 9, 2), weight=torch.zeros(2, 4, 5, 3, 9),
    kernel_size=[3, 3], stride=[1, 1], padding=[1] * 4, dilation=[1, 1], offset_scale=1.0, remove_center=False,
    softmax=True, official_order=False,
)  # fmt: skip


def gather(**changes):
    return on_cpu(OPS.deform_aggregate2d, (GATHER | changes).values())


def gather_backward(grad_output):
    return on_cpu(OPS.deform_aggregate2d_backward, [grad_output, *GATHER.values(), 22])


def too_many_taps():
    """A kernel of 2^31 taps, all of which are one value."""
    one = torch.zeros(1)
    arguments = GATHER | dict(
        value=one.expand(1, 2**16, 2**15, 1), offset=one.expand(1, 1, 1, 1, 2**31, 2), weight=None,
        kernel_size=[2**16, 2**15], padding=[0] * 4, softmax=False,
    )  # fmt: skip
    with cpu_kernels(PORTABLE):
        on_cpu(OPS.deform_aggregate2d_backward, [torch.zeros(1, 1, 1, 1), *arguments.values(), 16 | ORDERED])


def too_many_pixels():
    """2^60 pixels, all of which are one value."""
    one, side = torch.zeros(1), 2**30
    return gather(
        value=one.expand(1, side, side, 1), offset=one.expand(1, side, side, 1, 1, 2), weight=None,
        kernel_size=[1, 1], padding=[0] * 4, softmax=False,
    )  # fmt: skip


def huge():
    return torch.zeros(1).expand(1, 4, 2**30 + 1, 6)


T = "runtime/tensor.h"
C, CO, P = (f"ops/deform_conv2d/{name}.h" for name in ("arguments", "operator", "portable"))
R, RO = (f"ops/roi_pool/{name}.h" for name in ("arguments", "operator"))
A, AO = (f"ops/ms_deform_attn/{name}.h" for name in ("arguments", "operator"))
G, GO = (f"ops/deform_aggregate2d/{name}.h" for name in ("arguments", "operator"))
RA = "runtime/attention.h"
# File, how the condition begins, a call, what the message names.
CASES = [
    (C, "t.dim() == 4", lambda: conv(input=torch.zeros(4, 6, 6)), "input"),
    (C, "t.dim() == 4", lambda: conv(offset=torch.zeros(18, 4, 4)), "offset"),
    (C, "t.dim() == 4", lambda: conv(weight=torch.zeros(4, 3, 3)), "weight"),
    (C, "t.dim() == 4", lambda: conv(mask=torch.zeros(9, 4, 4)), "mask"),
    (C, "v.size() == count", lambda: conv(stride=[1]), "stride"),
    (C, "v.size() == count", lambda: conv(padding=[0, 0]), "padding"),
    (C, "v.size() == count", lambda: conv(dilation=[1, 1, 1]), "dilation"),
    (C, "value >= smallest", lambda: conv(stride=[0, 1]), "stride"),
    (C, "value >= smallest", lambda: conv(padding=[0, 0, 0, -1]), "padding"),
    (C, "value >= smallest", lambda: conv(dilation=[1, 2**30 + 1]), "dilation"),
    (C, "t.size(1) > 0", lambda: conv(input=torch.zeros(2, 4, 0, 6)), "input"),
    (C, "t.size(1) > 0", lambda: conv(weight=torch.zeros(6, 4, 0, 3)), "weight"),
    (C, "t.size(1) > 0", lambda: conv(input=huge()), "input"),
    (C, "g.channels % a.weight.size(1)", lambda: conv(weight=torch.zeros(6, 3, 3, 3)), "input"),
    (C, "g.out_channels > 0", lambda: conv(weight=torch.zeros(5, 2, 3, 3)), "weight"),
    (C, "g.out_channels > 0", lambda: conv(weight=torch.zeros(0, 4, 3, 3)), "weight"),
    (C, "last_row >= 0", lambda: conv(dilation=[3, 3]), "input"),
    (C, "a.offset.size(1) > 0", lambda: conv(offset=torch.zeros(2, 9, 4, 4)), "offset"),
    (C, "g.channels % g.offset_groups", lambda: conv(offset=torch.zeros(2, 54, 4, 4)), "input"),
    (C, "t.size(0) == g.batch", lambda: conv(offset=torch.zeros(1, 18, 4, 4)), "offset"),
    (C, "t.size(0) == g.batch", lambda: conv(mask=torch.zeros(2, 9, 4, 3)), "mask"),
    (C, "a.bias->dim() == 1", lambda: conv(bias=torch.zeros(5)), "bias"),
    (T, "is_supported(t.", lambda: conv(input=torch.zeros(2, 4, 6, 6).long()), "input"),
    *(
        (T, "t.scalar_type() == type", lambda name=name: conv(**{name: CONV[name].double()}), name)
        for name in ("weight", "bias", "offset", "mask")
    ),
    *(
        (T, "t.device() == first.device()", lambda name=name: conv(**{name: CONV[name].to("meta")}), name)
        for name in ("weight", "bias", "offset", "mask")
    ),
    (P, "countable > 0", too_many_samples, "offset"),
    (CO, "grad_output.dim() == 4", lambda: conv_backward(torch.zeros(2, 6, 4, 3)), "grad_output"),
    (T, "t.scalar_type() == type", lambda: conv_backward(torch.zeros(2, 6, 4, 4).half()), "grad_output"),
    (T, "t.device() == first.device()", lambda: conv_backward(torch.zeros(2, 6, 4, 4, device="meta")), "grad_output"),
    (R, "a.input.dim() == 4", lambda: align(input=torch.zeros(4, 6, 6)), "input"),
    (R, "a.rois.dim() == 2", lambda: align(rois=torch.zeros(3, 4)), "rois"),
    (R, "g.channels > 0", lambda: align(input=torch.zeros(2, 4, 0, 6)), "input"),
    (R, "value >= min && value <= max", lambda: align(output_size=[0, 2]), "output_size"),
    (R, "value >= min && value <= max", lambda: part(part_size=[2, 2**20 + 1]), "part_size"),
    (R, "value >= min && value <= max", lambda: part(group_size=0), "group_size"),
    (R, "value >= min && value <= max", lambda: align(sampling_ratio=-1), "sampling_ratio"),
    (R, "value >= min && value <= max", lambda: part(samples_per_part=0), "samples_per_part"),
    (R, "g.spatial_scale > 0", lambda: align(spatial_scale=float("nan")), "spatial_scale"),
    (R, "g.outputs > 0", lambda: part(output_dim=2), "input"),
    (R, "g.classes > 0", lambda: part(offset=torch.zeros(3, 4, 2, 2)), "offset"),
    (R, "g.classes > 0", lambda: part(offset=None, mask=torch.zeros(3, 2, 2, 2)), "mask"),
    (T, "is_supported(t.", lambda: align(input=torch.zeros(2, 4, 6, 6).long()), "input"),
    *(
        (T, "t.scalar_type() == type", lambda name=name: align(**{name: ALIGN[name].double()}), name)
        for name in ("rois", "offset", "mask")
    ),
    *(
        (T, "t.device() == first.device()", lambda name=name: align(**{name: ALIGN[name].to("meta")}), name)
        for name in ("rois", "offset", "mask")
    ),
    (R, "t.dim() == 4 &&", lambda: align(offset=torch.zeros(2, 2, 2, 2)), "offset"),
    (R, "t.dim() == 4 &&", lambda: align(mask=torch.zeros(3, 2, 2, 2)), "mask"),
    (RO, "grad_output.dim() == 4", lambda: align_backward(torch.zeros(3, 4, 2, 3)), "grad_output"),
    (T, "t.scalar_type() == type", lambda: align_backward(torch.zeros(3, 4, 2, 2).half()), "grad_output"),
    (T, "t.device() == first.device()", lambda: align_backward(torch.zeros(3, 4, 2, 2, device="meta")), "grad_output"),
    (R, "output_size.size() == 2", lambda: align(output_size=[2]), "output_size"),
    (R, "part_size.size() == 2", lambda: part(part_size=[2, 2, 2]), "part_size"),
    (A, "t.dim() == count", lambda: attend(value=torch.zeros(16, 3, 4)), "value"),
    (A, "t.dim() == count", lambda: attend(sampling_locations=torch.zeros(2, 5, 3, 2, 3, 2)), "sampling_locations"),
    (A, "g.heads > 0", lambda: attend(value=torch.zeros(2, 16, 3, 0)), "value"),
    (A, "g.heads > 0", lambda: attend(value=torch.zeros(1).expand(2, 16, 3, 2**30 + 1)), "value"),
    (A, "a.locations.size(0)", lambda: attend(sampling_locations=torch.zeros(2, 5, 4, 6, 2)), "sampling_locations"),
    (A, "a.locations.size(0)", lambda: attend(sampling_locations=torch.zeros(2, 5, 3, 6, 3)), "sampling_locations"),
    (A, "g.levels >= 1", lambda: attend(points=[]), "points"),
    (A, "g.levels >= 1", lambda: attend(points=[1] * 17), "points"),
    (A, "o.spatial_shapes.size()", lambda: attend(spatial_shapes=[3, 4, 2]), "spatial_shapes"),
    (A, "value >= 1 && value <= limit", lambda: attend(spatial_shapes=[-3, -4, 2, 2]), "spatial_shapes"),
    (A, "value >= 1 && value <= limit", lambda: attend(points=[6, 0]), "points"),
    (A, "height * width <= g.rows - rows", lambda: attend(spatial_shapes=[2**30, 2**30] * 2), "spatial_shapes"),
    (A, "height * width <= g.rows - rows", lambda: attend(spatial_shapes=[3, 4, 2, 3]), "spatial_shapes"),
    (A, "rows == g.rows", lambda: attend(spatial_shapes=[3, 4, 1, 2]), "spatial_shapes"),
    (A, "points == g.points", lambda: attend(points=[4, 3]), "points"),
    (A, "points == g.points", lambda: attend(points=[4, 1]), "points"),
    (
        A,
        "t.dim() == 4 && t.size(0) == g.batch && t.size(1) == g.queries && t.size(2) == g.heads",
        lambda: attend(attention_weights=torch.zeros(2, 5, 3, 5)),
        "attention_weights",
    ),
    (A, "a.weights || !o.softmax", lambda: attend(attention_weights=None), "attention_weights"),
    *(
        (
            A,
            "t.dim() == 4 && t.size(0) == g.batch && t.size(1) == g.queries && (t.size(2)",
            lambda shape=shape: attend(reference_points=torch.zeros(shape)),
            "reference_points",
        )
        for shape in ((2, 5, 2, 3), (2, 5, 3, 2), (2, 4, 2, 2))
    ),
    (T, "is_supported(t.", lambda: attend(value=torch.zeros(2, 16, 3, 4).int()), "value"),
    *(
        (T, "t.scalar_type() == type", lambda name=name: attend(**{name: ATTEND[name].double()}), name)
        for name in ("sampling_locations", "attention_weights", "reference_points")
    ),
    *(
        (T, "t.device() == first.device()", lambda name=name: attend(**{name: ATTEND[name].to("meta")}), name)
        for name in ("sampling_locations", "attention_weights", "reference_points")
    ),
    (AO, "grad_output.dim() == 3", lambda: attend_backward(torch.zeros(2, 5, 13)), "grad_output"),
    (T, "t.scalar_type() == type", lambda: attend_backward(torch.zeros(2, 5, 12).half()), "grad_output"),
    (RA, "countable > 0", too_many_points, "points"),
    (RA, "countable > 0", too_many_taps, "offset"),
    (G, "v.size() == count", lambda: gather(kernel_size=[3]), "kernel_size"),
    (G, "v.size() == count", lambda: gather(stride=[1]), "stride"),
    (G, "v.size() == count", lambda: gather(padding=[1, 1]), "padding"),
    (G, "v.size() == count", lambda: gather(dilation=[1, 1, 1]), "dilation"),
    (G, "value >= smallest", lambda: gather(kernel_size=[3, 0]), "kernel_size"),
    (G, "value >= smallest", lambda: gather(stride=[0, 1]), "stride"),
    (G, "value >= smallest", lambda: gather(padding=[0, 0, 0, -1]), "padding"),
    (G, "value >= smallest", lambda: gather(dilation=[1, 2**30 + 1]), "dilation"),
    (G, "a.value.dim() == 4", lambda: gather(value=torch.zeros(4, 5, 6)), "value"),
    (G, "a.value.size(d) > 0", lambda: gather(value=torch.zeros(2, 0, 5, 6)), "value"),
    (G, "a.value.size(d) > 0", lambda: gather(value=torch.zeros(1).expand(2, 2**30 + 1, 5, 6)), "value"),
    (G, "!o.remove_center", lambda: gather(remove_center=True, kernel_size=[3, 5]), "remove_center"),
    (G, "!o.remove_center", lambda: gather(remove_center=True, kernel_size=[1, 1]), "remove_center"),
    (G, "last >= 0", lambda: gather(padding=[0] * 4, dilation=[3, 1]), "value"),
    (G, "a.offset.dim() == 6", lambda: gather(offset=torch.zeros(2, 4, 5, 3, 27)), "offset"),
    (G, "a.offset.dim() == 6", lambda: gather(offset=torch.zeros(2, 4, 5, 81), weight=None), "offset"),
    (G, "is_of_pixels(a.offset)", lambda: gather(offset=torch.zeros(2, 4, 4, 3, 9, 2)), "offset"),
    (G, "is_of_pixels(a.offset)", lambda: gather(offset=torch.zeros(2, 4, 5, 3, 8, 2)), "offset"),
    (G, "is_of_pixels(a.offset)", lambda: gather(offset=torch.zeros(2, 4, 5, 3, 26), weight=None), "offset"),
    (G, "g.heads > 0", lambda: gather(offset=torch.zeros(2, 4, 5, 4, 9, 2)), "value"),
    (G, "g.heads > 0", lambda: gather(offset=torch.zeros(2, 4, 5, 0, 9, 2)), "value"),
    (G, "g.batch <= limit", too_many_pixels, "value"),
    (G, "t.dim() == 5 && is_of_pixels(t)", lambda: gather(weight=torch.zeros(2, 4, 5, 3, 8)), "weight"),
    (G, "found.has_weights(a)", lambda: gather(weight=None), "weight"),
    (T, "is_supported(t.", lambda: gather(value=torch.zeros(2, 4, 5, 6).int()), "value"),
    *(
        (T, "t.scalar_type() == type", lambda name=name: gather(**{name: GATHER[name].double()}), name)
        for name in ("offset", "weight")
    ),
    *(
        (T, "t.device() == first.device()", lambda name=name: gather(**{name: GATHER[name].to("meta")}), name)
        for name in ("offset", "weight")
    ),
    (GO, "grad_output.dim() == 4", lambda: gather_backward(torch.zeros(2, 4, 5, 5)), "grad_output"),
    (T, "t.scalar_type() == type", lambda: gather_backward(torch.zeros(2, 4, 5, 6).half()), "grad_output"),
]


@pytest.mark.parametrize(("file", "condition", "call", "name"), CASES, ids=[f"{i}-{c[3]}" for i, c in enumerate(CASES)])
def test_message_is_that_of_the_check_and_names_operator_and_argument(file, condition, call, name):
    (arguments,) = [text for where, text in checks() if where == file and text.startswith(condition)]
    with pytest.raises(RuntimeError) as raised:
        call()
    said = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    message = str(raised.value)
    assert re.search(".*".join(map(re.escape, said)), message), (said, message)
    grammar = rf"({OPERATORS})(_backward)?: {name}: expected .+, got .+"
    assert re.search(grammar, message), message


def test_every_check_has_a_case():
    named = [(file, text) for file, text in checks() if any(c[0] == file and text.startswith(c[1]) for c in CASES)]
    assert [check for check in checks() if check not in named] == []
    assert len(checks()) >= 25
