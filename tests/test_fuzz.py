"""Every operator on arguments that nobody thought of: shapes, layouts and values at random, and wrong calls.

A minute of cases that are the same every time; ``DCN_PLUGIN_FUZZ_EXAMPLES=5000`` asks for that many new ones a test.
"""

import contextlib
import math
import os
import re

import pytest
import torch
from cases import CASES, TOLERANCE, convert, run
from conftest import PORTABLE, TUNED

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("DCN_PLUGIN_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
CASE = {case.name: case for case in CASES}
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
each_name = pytest.mark.parametrize("name", CASE)
sizes = st.integers(1, 3)


def plain(t):
    return t.contiguous()


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def strided(t):
    wide = torch.full([2 * s for s in t.shape], torch.nan, dtype=t.dtype)
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else t


def expanded(t):
    return t[:1].expand_as(t) if len(t) else t


def negated(t):
    return torch._neg_view(-t)


def shifted(t):
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)


LAYOUTS = st.sampled_from([plain, channels_last, strided, transposed, expanded, negated, shifted])


# Offsets and corners are multiples of 1/8, and all that they are multiplied with are powers of two: then no position
# is rounded, and borders and whole pixels, where the derivative jumps, are hit often, on the same side in every type.
def eighths(generator, shape, spread):
    return torch.randint(-8 * spread, 8 * spread + 1, shape, generator=generator).double() / 8


def normal(generator, shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def deform_conv2d(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, groups, offset_groups = draw(st.integers(0, 3)), draw(sizes), draw(sizes)
    channels = math.lcm(groups, offset_groups) * draw(st.sampled_from([1, 2, 3, 8, 17, 70]))
    out_channels = groups * draw(st.sampled_from([1, 2, 3, 16, 33]))
    kernel, stride, dilation = ([draw(sizes), draw(sizes)] for _ in range(3))
    padding = draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [padding[i] + padding[2 + i] for i in (0, 1)]
    size = [max(1, spans[i] - pads[i]) + draw(st.integers(0, 9)) for i in (0, 1)]
    out_size = [(size[i] + pads[i] - spans[i]) // stride[i] + 1 for i in (0, 1)]
    taps = kernel[0] * kernel[1]
    spread = draw(st.sampled_from([0, 1, 4, 30]))
    arguments = {
        "input": normal(generator, (n, channels, *size)),
        "offset": eighths(generator, (n, 2 * offset_groups * taps, *out_size), spread),
        "weight": normal(generator, (out_channels, channels // groups, *kernel)),
        "bias": normal(generator, (out_channels,)),
        "stride": stride, "padding": padding, "dilation": dilation,
        "mask": normal(generator, (n, offset_groups * taps, *out_size)),
    }  # fmt: skip
    return without(draw, arguments, "bias", "mask")


def without(draw, arguments, *names):
    return {k: v for k, v in arguments.items() if k not in names or draw(st.booleans())}


def regions(draw, generator, shape, steps, whole):
    """Regions whose bins are ``steps`` samples long, each 1/8, 1/4, ... or 2 pixels from the next."""
    n, _, height, width = shape
    count = draw(st.integers(0, 5)) if n else 0
    rois = torch.zeros(count, 5, dtype=torch.float64)
    rois[:, 0] = torch.randint(max(n, 1), (count,), generator=generator)
    for i, (step, extent) in enumerate(zip(steps[::-1], (width, height), strict=True)):
        start = torch.randint(-16, 8 * extent + 8, (count,), generator=generator).double() / 8
        size = step * 2.0 ** torch.randint(0 if whole else -3, 2, (count,), generator=generator)
        rois[:, 1 + i] = start.floor() if whole else start
        rois[:, 3 + i] = rois[:, 1 + i] + size - int(whole)
    return rois


@st.composite
def roi_pool(draw, name):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    group = 1 if name == "deform_roi_pool" else draw(sizes)
    classes = draw(sizes) if name == "deform_ps_roi_pool" else 1
    outputs = classes * draw(st.sampled_from([1, 2, 5, 17, 40]))
    shape = (draw(sizes), outputs * group**2, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    bins, samples = [draw(sizes), draw(sizes)], draw(sizes)
    whole = name != "deform_roi_pool"
    each = 1 if name == "ps_roi_pool" else samples
    scale = draw(st.sampled_from([0.25, 1.0]))
    rois = regions(draw, generator, shape, [b * each for b in bins], whole)
    if not whole:
        rois[:, 1:] /= scale
    arguments = {
        "input": normal(generator, shape), "rois": rois, "output_size": bins, "spatial_scale": scale,
    }  # fmt: skip
    if name != "deform_roi_pool":
        arguments |= {"output_dim": outputs, "group_size": group}
    parts = bins
    if name == "deform_ps_roi_pool":
        parts = draw(st.sampled_from([bins, [draw(sizes), draw(sizes)]]))
        arguments |= {"part_size": parts, "samples_per_part": samples, "offset_scale": 0.125}
    if name == "deform_roi_pool":
        # Unaligned regions are at least one pixel, which would make bins of a third.
        aligned = True if bins != [1, 1] else draw(st.booleans())
        arguments |= {"sampling_ratio": samples, "gamma": 0.125, "aligned": aligned}
    if name != "ps_roi_pool":
        spread = draw(st.sampled_from([0, 1, 8, 30]))
        arguments["offset"] = eighths(generator, (len(rois), 2 * classes, *parts), spread)
        arguments["mask"] = normal(generator, (len(rois), classes, *parts))
    return without(draw, arguments, "offset", "mask")


def calls(name):
    return deform_conv2d() if name == "deform_conv2d" else roi_pool(name)


@st.composite
def in_memory(draw, arguments, case):
    """Give the arguments a type, and each tensor a layout."""
    dtype, wide = draw(DTYPES), draw(st.booleans())
    types = {k: torch.float32 if wide and k in case.float32_beside_half else dtype for k in arguments}
    if dtype == torch.float64:
        types = dict.fromkeys(arguments, dtype)
    laid_out = {}
    for k, v in arguments.items():
        tensor = isinstance(v, torch.Tensor)
        laid_out[k] = draw(LAYOUTS)(v.to(types[k])) if tensor else v
    return laid_out


@contextlib.contextmanager
def cpu(path, threads):
    before = torch.ops.dcn_plugin._set_cpu_path(path), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.ops.dcn_plugin._set_cpu_path(before[0])
        torch.set_num_threads(before[1])


def compare(actual, expected, name, loose=False):
    """Every value that is not finite is the same one; the others differ by no more than the type's tolerance.

    ``loose``: what is finite on one side alone is left out.
    """
    tolerance = TOLERANCE[actual.dtype]
    assert actual.shape == expected.shape, name
    rounded = expected.to(actual.dtype).double()
    actual = actual.double()
    finite = rounded.isfinite() & actual.isfinite()
    for what in () if loose else (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(actual), what(rounded)), f"{name}: {what.__name__} in other places"
    if finite.any():
        scale = max(rounded[finite].abs().max().item(), 1e-3)
        error = (actual - rounded)[finite].abs().max().item()
        assert error <= tolerance * scale, f"{name}: error {error:.3g} on a scale of {scale:.3g}"


def both(case, arguments, grad, path, threads):
    """Value and gradients of the operator, and of the reference in float64."""
    with cpu(path, threads):
        actual = run(case.function, arguments, grad)
    for k, v in actual.items():
        assert v.dtype == arguments[k.removeprefix("grad_") if k != "out" else "input"].dtype, k
    exact = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return actual, run(case.reference, convert(exact, dtype=torch.float64), grad)


paths = st.sampled_from([PORTABLE, 1, 3, TUNED])


@each_name
def test_any_shape_and_layout_gives_the_reference(name):
    case = CASE[name]

    @fuzz
    @given(st.data(), calls(name), LAYOUTS, paths, st.integers(1, 2))
    def check(data, arguments, grad_layout, path, threads):
        arguments = data.draw(in_memory(arguments, case))
        out = case.reference(**convert(arguments, dtype=torch.float64))
        grad = grad_layout(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(arguments["input"]))
        actual, expected = both(case, arguments, grad, path, threads)
        for k, v in actual.items():
            compare(v, expected[k], k)

    check()


def hostile_values(dtype):
    info = torch.finfo(dtype)
    # Powers low enough for a product of all arguments; a denormal; and values that overflow whatever they meet.
    return [math.nan, math.inf, -math.inf, info.max**0.2, -(info.max**0.2), info.smallest_normal / 4, -0.0]


FAR = [2.0**24, -(2.0**24), 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 1e19, 1e38, -1e38]


@each_name
def test_hostile_values_do_what_the_reference_does(name):
    case = CASE[name]

    @fuzz
    @given(st.data(), calls(name), paths)
    def check(data, arguments, path):
        arguments = data.draw(in_memory(arguments, case))
        out = case.reference(**convert(arguments, dtype=torch.float64))
        arguments["grad"] = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(arguments["input"])
        tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.numel() and k != "rois"]
        unbounded = False
        for k in data.draw(st.lists(st.sampled_from(tensors), max_size=2, unique=True)) if tensors else []:
            t = arguments[k].clone()
            values = hostile_values(t.dtype) + ([*FAR, torch.finfo(t.dtype).max] if k == "offset" else [])
            if k != "offset" and data.draw(st.booleans()):
                values, unbounded = [torch.finfo(t.dtype).max, -torch.finfo(t.dtype).max, 1e38], True
            for value in data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)):
                # By its indices: the clone may have any layout.
                where = data.draw(st.integers(0, t.numel() - 1))
                t[tuple(int(i) for i in torch.unravel_index(torch.tensor(where), t.shape))] = value
            arguments[k] = t
        poisoned = {k for k in tensors if not arguments[k].isfinite().all()}
        grad = arguments.pop("grad")
        actual, expected = both(case, arguments, grad, path, 1)
        for k, v in actual.items():
            if unbounded:
                # Sums overflow in one order and not in another: what is asked is that nothing else happens.
                assert v.shape == expected[k].shape
            else:
                # A factor that is not finite may meet a derivative of 0 (of a sample outside, at a corner of weight 0),
                # or be left out with it.
                loose = k != "out" and bool(poisoned - {"offset"})
                compare(v, expected[k], k, loose)

    check()


HUGE = [2**30 + 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, 10**400]
# A size that no address space holds: a tensor that repeats one value may have it, what is made for it may not.
ENDLESS = 2**46
WRONG_INTEGERS = st.sampled_from([-1, -(2**31), -(2**63), *HUGE])
WRONG_TYPES = st.sampled_from([None, "1", 1.5, 1j, [1, 1, 1], [], [[1, 1]], {}, object()])
# A size of 0 or less takes as many samples as a bin has pixels, and either is a truth value.
FREE = ("sampling_ratio", "aligned")


def spoil_tensor(draw, t):
    """The tensor with another number of dimensions, size, type or device, or no tensor at all."""
    how = draw(st.sampled_from(["more", "fewer", "longer", "shorter", "empty", "repeated", "type", "device", "none"]))
    if how == "none":
        return draw(WRONG_TYPES)
    if how == "type":
        others = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float64, torch.float16, torch.bfloat16]
        return t.to(draw(st.sampled_from(others)))
    if how == "device":
        return t.to("meta")
    if how == "more":
        return t[None] if draw(st.booleans()) else t[..., None]
    if how == "fewer":
        return t.flatten() if t.dim() > 1 else t.sum()
    d = draw(st.integers(0, t.dim() - 1))
    if how == "repeated":
        return t.new_zeros([1] * t.dim()).expand([ENDLESS if i == d else s for i, s in enumerate(t.shape)])
    change = {"longer": 1, "shorter": -1, "empty": -t.shape[d]}[how]
    return t.new_zeros([max(s + change * (i == d), 0) for i, s in enumerate(t.shape)])


def names_an_argument(error, case, arguments):
    known = "|".join([*arguments, "bias", "mask", "offset"])
    return re.match(rf"({known})(\[\d\])?(:| must)", str(error))


@each_name
def test_wrong_arguments_are_refused_by_name(name):
    case = CASE[name]

    @fuzz
    @given(st.data(), calls(name))
    def check(data, arguments):
        arguments = convert(arguments, dtype=torch.float32)
        chosen = data.draw(st.sampled_from(sorted(arguments)))
        value = arguments[chosen]
        spoiled = dict(arguments)
        if isinstance(value, torch.Tensor):
            spoiled[chosen] = spoil_tensor(data.draw, value)
        elif isinstance(value, list) and data.draw(st.booleans()):
            spoiled[chosen] = [data.draw(WRONG_INTEGERS) if data.draw(st.booleans()) else v for v in value]
        elif isinstance(value, float):
            spoiled[chosen] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 10**400, "1", None, 1j]))
        else:
            spoiled[chosen] = data.draw(WRONG_INTEGERS | WRONG_TYPES)
        endless = any(ENDLESS in v.shape for v in spoiled.values() if isinstance(v, torch.Tensor))
        own = not isinstance(value, torch.Tensor) and spoiled[chosen] != value and chosen not in FREE
        own = own and not (chosen == "part_size" and spoiled[chosen] is None)
        try:
            out = case.function(**spoiled)
        except (ValueError, TypeError) as error:
            assert names_an_argument(error, case, arguments), error
            assert not own or str(error).startswith(chosen), error
            return
        except RuntimeError as error:
            assert endless and re.search("alloc|overflow", str(error)), error
            return
        # What was not refused was right after all (a mask left out, one region fewer): then there is a value for it.
        assert not own, f"{chosen} = {spoiled[chosen]} was taken"
        if out.device.type != "meta" and not endless:
            compare(out.detach(), case.reference(**convert(spoiled, dtype=torch.float64)), "out")

    check()


@each_name
def test_the_compiled_operators_refuse_wrong_arguments(name):
    case = CASE[name]
    forward, backward = (getattr(torch.ops.dcn_plugin, n) for n in (case.op, f"{case.op}_backward"))

    @fuzz
    @given(st.data(), calls(name), st.booleans())
    def check(data, arguments, gradients):
        arguments = convert(arguments, dtype=torch.float32)
        given = list(case.to_op(**arguments))
        op = forward
        if gradients:
            out = forward(*given)
            without_bias = [v for i, v in enumerate(given) if name != "deform_conv2d" or i != 3]
            given, op = [torch.ones_like(out), *without_bias, data.draw(st.integers(0, 15))], backward
        for i in data.draw(st.lists(st.integers(0, len(given) - 1), min_size=1, max_size=2, unique=True)):
            if isinstance(given[i], torch.Tensor):
                given[i] = spoil_tensor(data.draw, given[i])
            elif isinstance(given[i], list):
                given[i] = data.draw(st.lists(WRONG_INTEGERS | st.integers(0, 3), max_size=5) | WRONG_TYPES)
            elif isinstance(given[i], float):
                given[i] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 5e-324, -1.0, 0.0]))
            else:
                given[i] = data.draw(WRONG_INTEGERS | WRONG_TYPES)
        on_meta = any(isinstance(v, torch.Tensor) and v.device.type == "meta" for v in given)
        # A tensor without memory goes to the shape rules, which are those of the Python functions.
        refusals = (RuntimeError, ValueError, TypeError) if on_meta else RuntimeError
        try:
            result = op(*given)
        except refusals:
            return
        for t in result if isinstance(result, tuple) else [result]:
            assert t.numel() == 0 or t.device.type == "meta" or t.reshape(-1)[-1] is not None

    check()


def test_sizes_whose_product_overflows_are_refused():
    one = torch.zeros(1)
    with pytest.raises(RuntimeError, match="output_dim"):
        torch.ops.dcn_plugin.ps_roi_pool(one.expand(1, 4, 4, 4), torch.zeros(0, 5), 2**62 + 1, 2, [1, 1], 1.0)
    weight, offset = one.expand(1, 1, 2**31, 2**31), one.expand(1, 2**32, 1, 1)
    how = [1, 1], [0, 0, 0, 0], [1, 1]
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.dcn_plugin.deform_conv2d(one.expand(1, 1, 2**31, 2**31), offset, weight, None, None, *how)


@pytest.mark.parametrize("value", [2**31, 2**70])
def test_integers_too_large_for_the_compiled_operators_are_refused_by_name(value):
    input, rois = torch.zeros(1, 1, 4, 4), torch.zeros(1, 5)
    with pytest.raises(ValueError, match=f"stride must be at most .* got {value}"):
        CASE["deform_conv2d"].function(input, torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 1, 1), stride=value)
    with pytest.raises(ValueError, match=f"output_size must be at most .* got {value}"):
        CASE["deform_roi_pool"].function(input, rois, output_size=value)
    with pytest.raises(ValueError, match="gamma must be finite"):
        CASE["deform_roi_pool"].function(input, rois, output_size=1, gamma=10**400)


@each_name
def test_the_reference_takes_an_empty_batch(name):
    case = CASE[name]
    arguments = case.make(case.mixed)
    empty = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    expected, actual = run(case.reference, empty), run(case.function, empty)
    for k, v in expected.items():
        compare(actual[k], v, k)
