"""Calls of every operator at random: shapes, sizes, types and layouts.

A minute of cases that are the same every time; `DCN_PLUGIN_FUZZ_EXAMPLES=5000` asks for that many new ones a test.
"""

import math
import os

import pytest
import torch
from cases import BY_NAME
from conftest import BASELINE, PAIRS, PORTABLE, TUNED, V3

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("DCN_PLUGIN_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
each_name = pytest.mark.parametrize("name", BY_NAME)
sizes = st.integers(1, 3)
paths = st.sampled_from([PORTABLE, BASELINE, V3, TUNED, PAIRS])


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


# channels_last twice: it has kernels of its own.
LAYOUTS = st.sampled_from([plain, channels_last, channels_last, strided, transposed, expanded, negated, shifted])


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


def regions(draw, generator, shape, steps, whole, least, turns):
    """Regions whose bins are `steps` samples long, each 2 ** `least`, ... or 2 pixels from the next.

    Where it `turns`, some are inside out, and these as large (`whole`: of any size, which makes no difference).
    """
    n, _, height, width = shape
    count = draw(st.integers(0, 5)) if n else 0
    rois = torch.zeros(count, 5, dtype=torch.float64)
    rois[:, 0] = torch.randint(max(n, 1), (count,), generator=generator)
    for i, (step, extent) in enumerate(zip(steps[::-1], (width, height), strict=True)):
        start = torch.randint(-16, 8 * extent + 8, (count,), generator=generator).double() / 8
        size = step * 2.0 ** torch.randint(least, 2, (count,), generator=generator)
        rois[:, 1 + i] = start.floor() if whole else start
        rois[:, 3 + i] = rois[:, 1 + i] + size - int(whole)
        if turns and draw(st.booleans()):
            turned = torch.randint(2, (count,), generator=generator).bool()
            back = -torch.randint(1, 20, (count,), generator=generator).double() if whole else -size
            rois[turned, 3 + i] = (rois[:, 1 + i] + back)[turned]
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
    aligned = whole or draw(st.booleans())
    # Unaligned regions are at least one pixel, which would make bins or steps of a third.
    thirds = not aligned and 3 in (*bins, samples)
    least = 0 if whole or thirds else -3
    rois = regions(draw, generator, shape, [b * each for b in bins], whole, least, not thirds)
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
        ratio = draw(st.sampled_from([samples, samples, 0, -1]))
        arguments |= {"sampling_ratio": ratio, "gamma": 0.125, "aligned": aligned}
    if name != "ps_roi_pool":
        spread = draw(st.sampled_from([0, 1, 8, 30]))
        offset = arguments["offset"] = eighths(generator, (len(rois), 2 * classes, *parts), spread)
        if whole:
            # The least size, 0.1, is no multiple of anything: these stay away from borders and whole pixels.
            offset[(rois[:, 3:] < rois[:, 1:3]).any(1)] /= 64
        arguments["mask"] = normal(generator, (len(rois), classes, *parts))
    return without(draw, arguments, "offset", "mask")


@st.composite
def ms_deform_attn(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, heads, queries, numbers = draw(st.integers(0, 3)), draw(sizes), draw(st.integers(0, 9)), draw(NUMBERS)
    # Locations are divided by the size of the map, boxes by the number of points: powers of two, then nothing is
    # rounded.
    side = st.sampled_from([1, 2, 4, 8, 16]) if numbers != 2 else st.integers(1, 12)
    levels = draw(st.lists(st.tuples(side, side).map(list), min_size=1, max_size=3))
    points = draw(
        st.lists(st.sampled_from([1, 2, 4]) if numbers == 4 else st.integers(1, 5), min_size=len(levels),
                 max_size=len(levels))
    )  # fmt: skip
    spread, softmax = draw(st.sampled_from([0, 1, 4, 20])), draw(st.booleans())
    of_levels = draw(st.sampled_from([1, len(levels)]))
    near = torch.randint(0, 9, (n, queries, of_levels, max(numbers, 2)), generator=generator).double() / 8
    if numbers == 4:
        near[..., 2:] = 2.0 ** torch.randint(-2, 2, near[..., 2:].shape, generator=generator)
    given = []
    for size, count in zip(levels, points, strict=True):
        at = eighths(generator, (n, queries, heads, count, 2), spread)
        given.append(at if numbers else (at + 0.5) / torch.tensor(size[::-1]))
    shape = (n, queries, heads, sum(points))
    arguments = {
        "value": normal(generator, (n, sum(h * w for h, w in levels), heads, draw(st.sampled_from([1, 2, 8, 17, 40])))),
        "spatial_shapes": levels, "sampling_locations": torch.cat(given, 3), "points": points,
        "attention_weights": normal(generator, shape), "softmax": softmax, "offset_scale": 0.5,
    }  # fmt: skip
    if numbers:
        arguments["reference_points"] = near
    return arguments if softmax else without(draw, arguments, "attention_weights")


@st.composite
def deform_aggregate2d(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, groups = draw(st.integers(0, 3)), draw(sizes)
    remove = draw(st.booleans())
    kernel = [3, 3] if remove else [draw(sizes), draw(sizes)]
    stride, dilation = ([draw(sizes), draw(sizes)] for _ in range(2))
    padding = draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [padding[i] + padding[2 + i] for i in (0, 1)]
    size = [max(1, spans[i] - pads[i]) + draw(st.integers(0, 9)) for i in (0, 1)]
    out_size = [(size[i] + pads[i] - spans[i]) // stride[i] + 1 for i in (0, 1)]
    taps, spread = kernel[0] * kernel[1] - remove, draw(st.sampled_from([0, 1, 4, 30]))
    value = normal(generator, (n, *size, groups * draw(st.sampled_from([1, 2, 8, 16, 17, 32, 40]))))
    offset = eighths(generator, (n, *out_size, groups, taps, 2), spread)
    weight = normal(generator, (n, *out_size, groups, taps))
    options = {
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
        "offset_scale": draw(st.sampled_from([1.0, 0.5, 2.0])), "remove_center": remove,
        "official_order": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        packed = torch.cat([offset.flatten(4), weight], 4)
        return {"value": value, "offset": packed, **options, "softmax": draw(st.booleans())}
    arguments = {"value": value, "offset": offset, "weight": weight, **options}
    if draw(st.booleans()):
        return arguments | {"softmax": True}
    return without(draw, arguments, "weight")


NUMBERS = st.sampled_from([0, 2, 4])
POOLS = ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")
CALLS = {
    "deform_aggregate2d": deform_aggregate2d(),
    "deform_conv2d": deform_conv2d(),
    "ms_deform_attn": ms_deform_attn(),
    **{name: roi_pool(name) for name in POOLS},
}


def calls(name):
    """Arguments of an operator."""
    return CALLS[name]


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
