"""Calls that must be refused: by name in Python, and before memory is touched in the compiled operators."""

import inspect
import math
import re

import pytest
import torch
from cases import BY_NAME, CASES, convert
from hypothesis import given
from hypothesis import strategies as st

from dcn_plugin.ops._operator import WANTED
from fuzz.comparison import compare
from fuzz.strategies import calls, each_name, fuzz

HUGE = [2**30 + 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, 10**400]
# A size that no address space holds: a tensor that repeats one value may have it, what is made for it may not.
ENDLESS = 2**46
WRONG_INTEGERS = st.sampled_from([-1, -(2**31), -(2**63), *HUGE])
# Sizes that are legal in an image, and too large in a region.
WRONG_COUNTS = WRONG_INTEGERS | st.sampled_from([2**20 + 1, 2**30])
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


def names_an_argument(error, case):
    known = "|".join(inspect.signature(case.function).parameters)
    return re.match(rf"({known})(\[\d\])?: ", str(error))


@each_name
def test_wrong_arguments_are_refused_by_name(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name))
    def check(data, arguments):
        arguments = convert(arguments, dtype=torch.float32)
        chosen = data.draw(st.sampled_from(sorted(arguments)))
        value = arguments[chosen]
        wrong_integers = WRONG_COUNTS if case.of_regions and chosen != "output_dim" else WRONG_INTEGERS
        spoiled = dict(arguments)
        if isinstance(value, torch.Tensor):
            spoiled[chosen] = spoil_tensor(data.draw, value)
        elif isinstance(value, list) and data.draw(st.booleans()):
            spoiled[chosen] = [data.draw(wrong_integers) if data.draw(st.booleans()) else v for v in value]
        elif isinstance(value, float):
            spoiled[chosen] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 10**400, "1", None, 1j]))
        else:
            spoiled[chosen] = data.draw(wrong_integers | WRONG_TYPES)
        endless = any(ENDLESS in v.shape for v in spoiled.values() if isinstance(v, torch.Tensor))
        own = not isinstance(value, torch.Tensor) and spoiled[chosen] != value and chosen not in FREE
        own = own and not (chosen in ("part_size", "points") and spoiled[chosen] is None)
        try:
            out = case.function(**spoiled)
        except (ValueError, TypeError) as error:
            assert names_an_argument(error, case), error
            assert not own or str(error).startswith(chosen), error
            return
        except (RuntimeError, MemoryError) as error:  # the oldest torch hands on what C++ says of an endless batch
            assert endless and re.search("alloc|overflow", str(error)), error
            return
        # What was not refused was right after all (a mask left out, one region fewer): then there is a value for it.
        assert not own, f"{chosen} = {spoiled[chosen]} was taken"
        if out.device.type != "meta" and not endless:
            compare(out.detach(), case.reference(**convert(spoiled, dtype=torch.float64)), "out")

    check()


@each_name
def test_the_compiled_operators_refuse_wrong_arguments(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name), st.booleans())
    def check(data, arguments, gradients):
        arguments = convert(arguments, dtype=torch.float32)
        given, op = list(case.to_op(**arguments).values()), case.op
        if gradients:
            grad, wanted = torch.ones_like(case.op(*given)), data.draw(st.integers(0, sum(WANTED.values())))
            given, op = list(case.to_backward(grad, wanted, **arguments).values()), case.backward_op
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
        refusals = (RuntimeError, ValueError, TypeError) if on_meta else (RuntimeError, MemoryError)
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
    for large, name in ((weight, "input"), (one.expand(1, 1, 2, 2), "weight")):
        with pytest.raises(RuntimeError, match=f"{name}: expected .* rows and columns"):
            torch.ops.dcn_plugin.deform_conv2d(large, offset, weight, None, None, *how)


def limits():
    """(operator, option, what it is at most) of every option that is an integer, or several."""
    for case in CASES:
        for option in case.op._schema.arguments:
            if str(option.type) in ("int", "List[int]") and option.name != "output_dim":  # which has to fit the input
                yield case.name, option.name, 2**20 if case.of_regions else 2**30


@pytest.mark.parametrize("more", [1, 2**30, 2**31, 2**70])
@pytest.mark.parametrize(("name", "argument", "most"), list(limits()))
def test_integers_too_large_for_the_compiled_operators_are_refused_by_name(name, argument, most, more):
    case = BY_NAME[name]
    arguments = case.make(case.full)
    value: object = [[most + more, 1], *arguments[argument][1:]] if argument == "spatial_shapes" else most + more
    with pytest.raises(ValueError, match=f"^{argument}: expected at most {most}, got {most + more}$"):
        case.function(**arguments | {argument: value})
    if more == 1:  # the limit is the compiled operator's own
        given = case.to_op(**arguments)
        one = given[argument]
        given[argument] = [most + more, *one[1:]] if isinstance(one, list) else most + more
        with pytest.raises(RuntimeError, match=f"from [01] to {most}, got {most + more}$"):
            case.op(*given.values())


@pytest.mark.parametrize(("name", "argument"), [("deform_roi_pool", "gamma"), ("deform_ps_roi_pool", "offset_scale")])
def test_an_integer_beyond_every_float_is_refused_by_name(name, argument):
    case = BY_NAME[name]
    with pytest.raises(ValueError, match=f"{argument}: expected a finite number"):
        case.function(**(case.make(case.full) | {argument: 10**400}))
