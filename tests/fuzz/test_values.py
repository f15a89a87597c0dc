"""Every operator on shapes, layouts and values that nobody thought of, against the reference."""

import math

import pytest
import torch
from cases import BY_NAME, CASES, convert, run
from hypothesis import given
from hypothesis import strategies as st

from fuzz.comparison import both, compare, cpu
from fuzz.strategies import LAYOUTS, calls, each_name, fuzz, in_memory, paths


@each_name
def test_any_shape_and_layout_gives_the_reference(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name), LAYOUTS, paths, st.integers(1, 2))
    def check(data, arguments, grad_layout, path, threads):
        arguments = data.draw(in_memory(arguments, case))
        out = case.reference(**convert(arguments, dtype=torch.float64))
        grad = grad_layout(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(arguments[case.image]))
        actual, expected = both(case, arguments, grad, path, threads)
        for k, v in actual.items():
            compare(v, expected[k], k)

    check()


def hostile_values(dtype):
    info = torch.finfo(dtype)
    # Powers low enough for a product of all arguments; a denormal; and values that overflow whatever they meet.
    return [math.nan, math.inf, -math.inf, info.max**0.2, -(info.max**0.2), info.smallest_normal / 4, -0.0]


POSITIONS = {"offset", "sampling_locations"}
FAR = [2.0**24, -(2.0**24), 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 1e19, 1e38, -1e38]


@each_name
def test_hostile_values_do_what_the_reference_does(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name), paths)
    def check(data, arguments, path):
        arguments = data.draw(in_memory(arguments, case))
        out = case.reference(**convert(arguments, dtype=torch.float64))
        arguments["grad"] = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(arguments[case.image])
        tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.numel() and k != "rois"]
        unbounded = False
        for k in data.draw(st.lists(st.sampled_from(tensors), max_size=2, unique=True)) if tensors else []:
            t = arguments[k].clone()
            values = hostile_values(t.dtype) + ([*FAR, torch.finfo(t.dtype).max] if k in POSITIONS else [])
            if k not in POSITIONS and data.draw(st.booleans()):
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
                loose = k != "out" and bool(poisoned - POSITIONS)
                compare(v, expected[k], k, loose)

    check()


def spoil_regions(draw, rois, batch):
    """The regions with values in some places that no region has, or that no map is as large as."""
    info = torch.finfo(rois.dtype)
    anywhere = [
        math.nan,
        math.inf,
        -math.inf,
        info.max,
        -info.max,
        1e38,
        -1e38,
        2.0**31,
        -(2.0**63),
        info.smallest_normal / 4,
        -0.0,
    ]
    rois = rois.clone()
    for _ in range(draw(st.integers(1, 3))):
        row, column = draw(st.integers(0, len(rois) - 1)), draw(st.integers(0, 4))
        rois[row, column] = draw(st.sampled_from([*anywhere, -1.0, 0.5, float(batch)]))
    return rois


def is_sound(roi, batch):
    return roi[0] in range(batch) and all(map(math.isfinite, roi))


each_pool = pytest.mark.parametrize("name", [case.name for case in CASES if case.of_regions])


@each_pool
def test_hostile_regions_are_refused_and_where_nobody_looks_they_give_nan(name):
    case = BY_NAME[name]

    @fuzz
    @given(st.data(), calls(name).filter(lambda arguments: len(arguments["rois"])), paths)
    def check(data, arguments, path):
        arguments = data.draw(in_memory(arguments, case))
        batch = len(arguments["input"])
        drawn = arguments["rois"]
        rois = arguments["rois"] = spoil_regions(data.draw, drawn, batch)
        sound = torch.tensor([is_sound(roi, batch) for roi in rois.tolist()])
        if not sound.all():
            with pytest.raises(ValueError, match=r"^rois: expected .*, got .* in row \d"):
                case.function(**arguments)
        # Where samples of a region lie that is huge, or whose size is no multiple of its bins, is a matter of rounding,
        # so either side of a whole pixel: they must not harm the others.
        near = ~sound | (rois == drawn).all(1)
        out = case.reference(**convert(arguments, dtype=torch.float64))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)) * near[:, None, None, None]
        actual, expected = both(case, arguments, grad.to(arguments["input"]), path, 1, case.compiled)
        assert actual["out"][~sound].isnan().all()
        for k, v in actual.items():
            of_region = k.removeprefix("grad_") in ("out", *case.per_result)
            compare(v[near] if of_region else v, expected[k][near] if of_region else expected[k], k)

    check()


@each_pool
def test_hostile_scales_do_what_the_reference_does(name):
    case = BY_NAME[name]
    scales = [k for k in ("spatial_scale", "gamma", "offset_scale") if k in case.make(case.full)]

    @fuzz
    @given(st.data(), calls(name), paths)
    def check(data, arguments, path):
        arguments = data.draw(in_memory(arguments, case))
        values = [5e-324, 1e-300, 1e-38, 1e19, 1e38, 1e300]
        for k in data.draw(st.lists(st.sampled_from(scales), min_size=1, unique=True)):
            sign = 1 if k == "spatial_scale" else data.draw(st.sampled_from([1, -1]))
            arguments[k] = sign * data.draw(st.sampled_from(values))
        # Beyond the largest float of the type that positions have, which is what the definition is asked for.
        positions = torch.promote_types(arguments["input"].dtype, torch.float32)
        with cpu(path, 1):
            actual = case.function(**arguments)
        compare(actual, case.reference(**convert(arguments, dtype=positions)), "out")

    check()


@each_name
def test_the_reference_takes_an_empty_batch(name):
    case = BY_NAME[name]
    arguments = case.make(case.mixed)
    empty = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    expected, actual = run(case.reference, empty), run(case.function, empty)
    for k, v in expected.items():
        compare(actual[k], v, k)
