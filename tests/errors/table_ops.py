"""The public operators."""

import math

import numpy
import torch

from dcn_plugin import ops, reference
from errors.case import Case


def conv(**given):
    arguments = dict(
        input=torch.zeros(2, 4, 6, 6), offset=torch.zeros(2, 18, 6, 6), weight=torch.zeros(6, 4, 3, 3),
        bias=torch.zeros(6), padding=1, mask=torch.zeros(2, 9, 6, 6),
    )  # fmt: skip
    return lambda: ops.deform_conv2d(**arguments | given)


ROIS = torch.tensor([[0.0, 1, 1, 4, 4], [1, 0, 0, 5, 5]])
IMAGE = torch.zeros(2, 4, 6, 6)
ALIGN = dict(input=IMAGE, rois=ROIS, output_size=2)
PS = ALIGN | dict(output_dim=1, group_size=2)


def align(**given):
    return lambda: ops.deform_roi_pool(**ALIGN | given)


def part(**given):
    return lambda: ops.deform_ps_roi_pool(**PS | given)


def pixels(**given):
    return lambda: ops.ps_roi_pool(**PS | given)


def spoilt(call, name, good, shape, text, double="expected torch.float32", image="input"):
    """A tensor that is none, has another shape, another type and is elsewhere."""
    return [
        Case(call(**{name: [1]}), TypeError, f"{name}:", f"expected a tensor {text}", "got list"),
        Case(call(**{name: good.to_sparse()}), TypeError, f"{name}:", "expected a dense tensor", "torch.sparse_coo"),
        Case(call(**{name: good[..., None]}), ValueError, f"{name}:", f"-D tensor {text}", f"got shape {(*shape, 1)}"),
        Case(call(**{name: good.long()}), TypeError, f"{name}:", "expected float64, float32", "got torch.int64"),
        Case(call(**{name: good[1:]}), ValueError, f"{name}:", f"expected shape {shape}", f"got ({shape[0] - 1},"),
        Case(call(**{name: good.double()}), TypeError, f"{name}:", double, "got torch.float64"),
        Case(call(**{name: good.to("meta")}), ValueError, f"{name}:", f"on cpu like {image}", "got meta"),
    ]


def integer(call, name, least=1):
    return [
        *(
            Case(call(**{name: value}), TypeError, name, "expected an integer", f"{value!r} ({type(value).__name__})")
            for value in (1.5, True, 1j)
        ),
        Case(call(**{name: least - 1}), ValueError, name, f"at least {least}", f"got {least - 1}"),
        Case(call(**{name: 2**31}), ValueError, name, "expected at most", f"got {2**31}"),
    ]


def integers(call, name, least=1, lengths="2"):
    return [
        *integer(call, name, least),
        Case(call(**{name: (1, 1.5)}), TypeError, name, "expected an integer", "got 1.5 (float)"),
        Case(call(**{name: (least, least - 1)}), ValueError, name, f"at least {least}", f"got {least - 1}"),
        Case(call(**{name: [1, 1, 1]}), ValueError, name, f"an integer or {lengths} integers", "got 3: [1, 1, 1]"),
        Case(call(**{name: ()}), ValueError, name, f"an integer or {lengths} integers", "got 0: ()"),
        Case(call(**{name: torch.ones(5)}), ValueError, name, f"an integer or {lengths} integers", "got 5: tensor("),
    ]


def number(call, name, positive):
    return [
        *(
            Case(call(**{name: value}), TypeError, name, "expected a number", f"got {value!r} ({type(value).__name__})")
            for value in ("1", True, None)
        ),
        *(
            Case(
                call(**{name: value}),
                ValueError,
                name,
                f"expected a {'positive ' * positive}finite number",
                f"got {value}",
            )
            for value in (math.nan, math.inf, *[0, -0.5] * positive)
        ),
        Case(call(**{name: 10**400}), ValueError, name, "finite", f"got {10**400}"),
    ]


CONV = [
    *integers(conv, "stride"),
    *integers(conv, "padding", 0, "2 or 4"),
    *integers(conv, "dilation"),
    *spoilt(conv, "offset", torch.zeros(2, 18, 6, 6), (2, 18, 6, 6), "[N, 2 * offset_groups * K, H', W']"),
    *spoilt(conv, "mask", torch.zeros(2, 9, 6, 6), (2, 9, 6, 6), "[N, offset_groups * K, H', W']"),
    *spoilt(conv, "bias", torch.zeros(6), (6,), "[O]"),
    Case(conv(input=1), TypeError, "input:", "expected a tensor [N, C, H, W]", "got int"),
    Case(conv(weight=None), TypeError, "weight:", "expected a tensor [O, C / groups, kernel_h, kernel_w]", "NoneType"),
    Case(conv(weight=torch.zeros(6, 4, 3, 3).double()), TypeError, "weight:", "torch.float32 beside", "torch.float64"),
    Case(conv(weight=torch.zeros(6, 4, 3, 3).to("meta")), ValueError, "weight:", "on cpu like input", "got meta"),
    Case(conv(input=torch.zeros(2, 4, 0, 6)), ValueError, "input:", "channels and pixels", "shape (2, 4, 0, 6)"),
    Case(conv(weight=torch.zeros(0, 4, 3, 3)), ValueError, "weight:", "no empty dimension", "shape (0, 4, 3, 3)"),
    Case(conv(weight=torch.zeros(6, 3, 3, 3)), ValueError, "weight:", "groups dividing C = 4", "shape (6, 3, 3, 3)"),
    Case(conv(weight=torch.zeros(5, 2, 3, 3)), ValueError, "weight:", "groups dividing C = 4 and O", "(5, 2, 3, 3)"),
    Case(conv(offset=torch.zeros(2, 54, 6, 6)), ValueError, "offset:", "dividing C = 4", "shape (2, 54, 6, 6)"),
    Case(conv(offset=torch.zeros(2, 18, 6, 6).half()), TypeError, "offset:", "expected torch.float32", "torch.float16"),
    Case(conv(padding=0, dilation=3), ValueError, "input:", "at least one output pixel", "got output size (0, 0)"),
    Case(conv(offset=torch.zeros(2, 9, 6, 6)), ValueError, "offset:", "2 * offset_groups * 9", "shape (2, 9, 6, 6)"),
]
POOLS = [
    *integers(align, "output_size"),
    *integers(part, "output_size"),
    *integers(pixels, "output_size"),
    *integers(part, "part_size"),
    *number(align, "spatial_scale", True),
    *number(part, "spatial_scale", True),
    *number(pixels, "spatial_scale", True),
    *number(align, "gamma", False),
    *number(part, "offset_scale", False),
    *integer(align, "sampling_ratio", -(2**31)),
    *integer(part, "output_dim"),
    *integer(part, "group_size"),
    *integer(part, "samples_per_part"),
    *integer(pixels, "output_dim"),
    *integer(pixels, "group_size"),
    *spoilt(align, "offset", torch.zeros(2, 2, 2, 2), (2, 2, 2, 2), "[R, 2, P_h, P_w]"),
    *spoilt(align, "mask", torch.zeros(2, 1, 2, 2), (2, 1, 2, 2), "[R, 1, P_h, P_w]"),
    *spoilt(part, "offset", torch.zeros(2, 2, 2, 2), (2, 2, 2, 2), "[R, 2 * classes, part_h, part_w]"),
    *spoilt(part, "mask", torch.zeros(2, 1, 2, 2), (2, 1, 2, 2), "[R, classes, part_h, part_w]"),
    Case(align(aligned=1), TypeError, "aligned:", "expected True or False", "got 1"),
]
for pool, channels in ((align, "C"), (part, "output_dim * group_size ** 2"), (pixels, "output_dim * group_size ** 2")):
    short, other = torch.zeros(2, 4), torch.zeros(2, 5, 6, 6)
    POOLS += [
        Case(pool(input=None), TypeError, "input:", f"expected a tensor [N, {channels}, H, W]", "got NoneType"),
        Case(pool(input=torch.zeros(2, 0, 6, 6)), ValueError, "input:", "channels and pixels", "shape (2, 0, 6, 6)"),
        Case(pool(rois=None), TypeError, "rois:", "[R, 5] (batch index, x1, y1, x2, y2)", "got NoneType"),
        Case(pool(rois=short), ValueError, "rois:", "[R, 5] (batch index, x1, y1, x2, y2)", "got (2, 4)"),
        Case(pool(rois=ROIS.double()), TypeError, "rois:", "expected torch.float32", "got torch.float64"),
        Case(pool(rois=ROIS.to("meta")), ValueError, "rois:", "expected to be on cpu like input", "got meta"),
        Case(pool(rois=[short]), ValueError, "rois:", "expected 2 tensors [L, 4], one for each image", "got 1"),
        Case(pool(rois=[short, None]), TypeError, "rois[1]:", "expected a tensor [L, 4]", "got NoneType"),
        Case(pool(rois=[short, ROIS]), ValueError, "rois[1]:", "[L, 4] (x1, y1, x2, y2)", "got (2, 5)"),
        Case(pool(rois=[short, short.to_sparse()]), TypeError, "rois[1]:", "a dense tensor", "torch.sparse_coo"),
        Case(pool(rois=[short, short.to("meta")]), ValueError, "rois[1]:", "to be on cpu like input", "got meta"),
        Case(pool(rois=ROIS + 1), ValueError, "rois:", "a batch index from 0 to 1", "got [2.0, 1.0, 1.0, 6.0, 6.0]"),
        Case(pool(rois=ROIS * torch.inf), ValueError, "rois:", "a batch index from 0 to 1", "got [nan, inf"),
        Case(pool(rois=ROIS * torch.tensor([1, 1, 1, 1, torch.inf])), ValueError, "rois:", "finite corners", "inf]"),
    ]
    if pool is not align:
        POOLS.append(Case(pool(input=other), ValueError, "input:", "group_size ** 2 = 4 channels", "shape (2, 5, 6"))
POOLS += [
    Case(part(offset=torch.zeros(2, 3, 2, 2)), ValueError, "offset:", "2 * classes channels", "shape (2, 3, 2, 2)"),
    Case(part(mask=torch.zeros(2, 3, 2, 2)), ValueError, "mask:", "dividing output_dim = 1", "shape (2, 3, 2, 2)"),
]
VALUE, AT = torch.zeros(2, 16, 3, 4), torch.zeros(2, 5, 3, 2, 3, 2)
LOGITS, BOXES = torch.zeros(2, 5, 3, 2, 3), torch.zeros(2, 5, 2, 4)
ATTEND = dict(
    value=VALUE, spatial_shapes=[(3, 4), (2, 2)], sampling_locations=AT, attention_weights=LOGITS,
    reference_points=BOXES, softmax=True,
)  # fmt: skip


def attend(**given):
    return lambda: ops.ms_deform_attn(**ATTEND | given)


def merged(**given):
    """Points of all levels side by side."""
    return attend(**{"sampling_locations": AT.flatten(3, 4), "attention_weights": LOGITS.flatten(3)} | given)


def on_meta(**given):
    """The compiled operator's rule for shapes."""
    arguments = dict(
        value=VALUE.to("meta"), sampling_locations=AT.flatten(3, 4).to("meta"), attention_weights=None,
        reference_points=None, spatial_shapes=[3, 4, 2, 2], points=[3, 3], softmax=False, offset_scale=0.5,
    )  # fmt: skip
    return lambda: torch.ops.dcn_plugin.ms_deform_attn(*(arguments | given).values())


def a_table_for_each_sample():
    return torch.vmap(lambda table: attend(spatial_shapes=table)())(torch.tensor([[[3, 4], [2, 2]]] * 2))


_BOXES = "[N, Q, L or 1, 2 or 4]"
_AT, _LOGITS = "[N, Q, M, L, P, 2] or [N, Q, M, K, 2]", "[N, Q, M, L, P] or [N, Q, M, K]"
ATTENTION = [
    *spoilt(merged, "attention_weights", LOGITS.flatten(3), (2, 5, 3, 6), _LOGITS, image="value")[:2],
    *spoilt(merged, "attention_weights", LOGITS.flatten(3), (2, 5, 3, 6), _LOGITS, image="value")[3:],
    *spoilt(attend, "reference_points", BOXES, (2, 5, 2, 4), _BOXES, image="value"),
    Case(attend(value=3), TypeError, "value:", "expected a tensor [N, S, M, D]", "got int"),
    Case(attend(value=VALUE[0]), ValueError, "value:", "a 4-D tensor [N, S, M, D]", "got shape (16, 3, 4)"),
    Case(attend(value=VALUE.int()), TypeError, "value:", "expected float64, float32", "got torch.int32"),
    Case(attend(value=VALUE.to_sparse()), TypeError, "value:", "expected a dense tensor", "torch.sparse_coo"),
    Case(attend(value=VALUE[..., :0]), ValueError, "value:", "heads and channels", "got shape (2, 16, 3, 0)"),
    Case(attend(value=VALUE[:, :, :2]), ValueError, "sampling_locations:", "shape (2, 5, 2, 2, 3, 2)", "got (2, 5, 3,"),
    Case(attend(value=VALUE[:1]), ValueError, "sampling_locations:", "shape (1, 5, 3, 2, 3, 2)", "(2, 5, 3, 2, 3, 2)"),
    Case(attend(sampling_locations=None), TypeError, "sampling_locations:", f"a tensor {_AT}", "got NoneType"),
    Case(attend(sampling_locations=AT[..., 0, 0]), ValueError, "sampling_locations:", f"5-D tensor {_AT}", "(2, 5, 3"),
    Case(attend(sampling_locations=AT[..., :1]), ValueError, "sampling_locations:", "(2, 5, 3, 2, 3, 2)", "2, 3, 1)"),
    Case(attend(sampling_locations=AT[:, :, :, :1]), ValueError, "sampling_locations:", "with L = 2", "3, 1, 3, 2)"),
    Case(attend(sampling_locations=AT.double()), TypeError, "sampling_locations:", "a value of torch.float32", "64"),
    Case(attend(sampling_locations=AT.to("meta")), ValueError, "sampling_locations:", "cpu like value", "got meta"),
    Case(attend(sampling_locations=AT.to_sparse()), TypeError, "sampling_locations:", "a dense tensor", "sparse_coo"),
    Case(merged(sampling_locations=AT.flatten(3, 4)[:, :, :, :5]), ValueError, "sampling_locations:",
         "a multiple of 2 points", "got shape (2, 5, 3, 5, 2)"),
    *(Case(call, ValueError, "sampling_locations:", f"{_AT} with 1 point or more", got) for call, got in (
        (attend(sampling_locations=AT[..., :0, :], attention_weights=LOGITS[..., :0]), "(2, 5, 3, 2, 0, 2)"),
        (merged(sampling_locations=AT.flatten(3, 4)[:, :, :, :0]), "(2, 5, 3, 0, 2)"),
        (merged(sampling_locations=AT.flatten(3, 4)[:, :, :, :0], points=[1, 2]), "(2, 5, 3, 0, 2)"),
    )),
    Case(merged(attention_weights=LOGITS, points=[2, 4]), ValueError, "attention_weights:",
         "expected [N, Q, M, K], since levels have different numbers of points ([2, 4])", "got shape (2, 5, 3, 2, 3)"),
    Case(attend(attention_weights=LOGITS[:, :, :, :1]), ValueError, "attention_weights:", "with L = 2", "3, 1, 3)"),
    Case(attend(attention_weights=LOGITS[:, :4]), ValueError, "attention_weights:", "(2, 5, 3, 2, 3)", "(2, 4, 3, 2"),
    *(
        Case(lambda given=given: ops.ms_deform_attn(VALUE, [(3, 4), (2, 2)], *given), TypeError, "ms_deform_attn:",
             "expected (value, spatial_shapes, sampling_locations, attention_weights)",
             f"got {len(given) + 2} arguments; level_start_index and im2col_step")
        for given in (([0, 12], AT, LOGITS, 64), ([0, 12], AT, LOGITS))
    ),
    Case(attend(attention_weights=None), ValueError, "attention_weights:", "logits for softmax=True", "got None"),
    Case(attend(reference_points=BOXES[..., :3]), ValueError, "reference_points:", f"{_BOXES} with L = 2", "5, 2, 3)"),
    Case(attend(reference_points=torch.zeros(2, 5, 3, 2)), ValueError, "reference_points:", "with L = 2", "5, 3, 2)"),
    Case(attend(points=[3, 2]), ValueError, "points:", "expected 3 for each level", "got [3, 2]"),
    Case(merged(points=[3, 2]), ValueError, "points:", "expected 6 together", "got [3, 2]"),
    Case(merged(points=[3, 2, 1]), ValueError, "points:", "an integer or 2 integers", "got 3: [3, 2, 1]"),
    Case(merged(points=[6, 0]), ValueError, "points:", "expected at least 1", "got 0"),
    Case(merged(points=[3.0, 3]), TypeError, "points:", "expected an integer", "got 3.0 (float)"),
    Case(attend(softmax=1), TypeError, "softmax:", "expected True or False", "got 1"),
    *number(attend, "offset_scale", False),
    *(
        Case(attend(spatial_shapes=table), error, "spatial_shapes:", expected, got)
        for table, error, expected, got in (
            (None, TypeError, "a pair (H, W) for each level", "got None"),
            (16, TypeError, "a pair (H, W) for each level", "got 16"),
            (numpy.array(16), TypeError, "a pair (H, W) for each level", "got array(16)"),
            ({(3, 4): 0, (2, 2): 1}, TypeError, "a pair (H, W) for each level", "got {(3, 4): 0, (2, 2): 1}"),
            ({(3, 4), (2, 2)}, TypeError, "a pair (H, W) for each level", "got {("),
            ([], ValueError, "1 to 16 levels", "got 0"),
            ([(1, 1)] * 17, ValueError, "1 to 16 levels", "got 17"),
            ([3, 4, 2, 2], ValueError, "a pair (H, W) for each level", "got 3 as number 0"),
            ([(3, 4), (2, 2, 1)], ValueError, "a pair (H, W)", "got (2, 2, 1) as number 1"),
            ([(3, 4), (2, 2.0)], TypeError, "expected an integer", "got 2.0 (float)"),
            ([(3, 4), (4, 0)], ValueError, "expected at least 1", "got 0"),
            ([(3, 4), (2, 3)], ValueError, "the S = 16 pixels of value together", "got 18 in [(3, 4), (2, 3)]"),
            (torch.tensor([[3.0, 4], [2, 2]]), TypeError, "expected integers", "got torch.float32"),
            (torch.tensor([3, 4, 2, 2]), ValueError, "expected shape [L, 2]", "got (4,)"),
            (torch.tensor([[3, 4], [2, 1]]), ValueError, "the S = 16 pixels", "got 14 in [(3, 4), (2, 1)]"),
            (torch.zeros(2, 2, dtype=torch.long, device="meta"), ValueError, "pairs (H, W)", "numbers are not known"),
        )
    ),
    Case(a_table_for_each_sample, ValueError, "spatial_shapes:", "numbers are not known (of", "of vmap, on meta), got"),
]  # fmt: skip
NHWC, SHIFTS, FACTORS = torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 5, 3, 9, 2), torch.zeros(2, 4, 5, 3, 9)


def gather(**given):
    return lambda: ops.deform_aggregate2d(**dict(value=NHWC, offset=SHIFTS, weight=FACTORS) | given)


def packed(**given):
    return gather(**dict(offset=torch.zeros(2, 4, 5, 3, 27), weight=None) | given)


def gather_on_meta(**given):
    """The compiled operator's rule for shapes."""
    arguments = dict(
        value=NHWC.to("meta"), offset=SHIFTS.to("meta"), weight=None, kernel_size=[3, 3], stride=[1, 1],
        padding=[1] * 4, dilation=[1, 1], offset_scale=1.0, remove_center=False, softmax=False, official_order=False,
    )  # fmt: skip
    return lambda: torch.ops.dcn_plugin.deform_aggregate2d(*(arguments | given).values())


_SHIFTS = "[N, H', W', G, K, 2], or [N, H', W', G, 3K] without weight"
AGGREGATION = [
    *integers(gather, "kernel_size"),
    *integers(gather, "stride"),
    *integers(gather, "padding", 0, "2 or 4"),
    *integers(gather, "dilation"),
    *number(gather, "offset_scale", False),
    *(
        Case(gather(**{name: 1}), TypeError, f"{name}:", "expected True or False", "got 1")
        for name in ("remove_center", "softmax", "official_order")
    ),
    *spoilt(gather, "offset", SHIFTS, (2, 4, 5, 3, 9, 2), _SHIFTS, image="value"),
    *spoilt(gather, "weight", FACTORS, (2, 4, 5, 3, 9), "[N, H', W', G, K]", image="value"),
    Case(gather(value=3), TypeError, "value:", "expected a tensor [N, H, W, C]", "got int"),
    Case(gather(value=NHWC[0]), ValueError, "value:", "a 4-D tensor [N, H, W, C]", "got shape (4, 5, 6)"),
    Case(gather(value=NHWC.int()), TypeError, "value:", "expected float64, float32", "got torch.int32"),
    Case(gather(value=NHWC[:, :0]), ValueError, "value:", "pixels and channels", "got shape (2, 0, 5, 6)"),
    Case(gather(value=NHWC[..., :5]), ValueError, "offset:", "groups dividing C = 5", "got shape (2, 4, 5, 3, 9, 2)"),
    Case(gather(offset=SHIFTS[:, :, :, :0]), ValueError, "offset:", "dividing C = 6", "got shape (2, 4, 5, 0, 9, 2)"),
    Case(gather(offset=SHIFTS[..., 0]), ValueError, "offset:", "expected a 6-D tensor", "got shape (2, 4, 5, 3, 9)"),
    Case(gather(padding=0), ValueError, "offset:", "shape (2, 2, 3, 3, 9, 2)", "got (2, 4, 5, 3, 9, 2)"),
    Case(gather(padding=0, dilation=3), ValueError, "value:", "at least one output pixel", "size (-2, -1)"),
    Case(gather(weight=None, softmax=True), ValueError, "weight:", "logits for softmax=True", "got None"),
    *(
        Case(gather(kernel_size=size, remove_center=True), ValueError, "remove_center:", "odd square kernel", f"{size}")
        for size in ((3, 5), (4, 4), (1, 1))
    ),
    Case(gather(remove_center=True), ValueError, "offset:", "shape (2, 4, 5, 3, 8, 2)", "got (2, 4, 5, 3, 9, 2)"),
    Case(packed(kernel_size=5, padding=2), ValueError, "offset:", "shape (2, 4, 5, 3, 75)", "got (2, 4, 5, 3, 27)"),
    Case(packed(softmax=True, offset=SHIFTS.flatten(4)), ValueError, "offset:", "(2, 4, 5, 3, 27)", "(2, 4, 5, 3, 18)"),
]
# Without memory there is only the rule for the shape of the result, which tracing asks as well.
META = [
    Case(
        lambda: torch.ops.dcn_plugin.ps_roi_pool(torch.zeros(4, 6, 6).to("meta"), ROIS.to("meta"), 1, 2, [2, 2], 1.0),
        ValueError, "input:", "expected a 4-D tensor [N, C, H, W]", "shape (4, 6, 6)",
    ),
    Case(
        lambda: torch.ops.dcn_plugin.deform_conv2d(
            IMAGE.to("meta"), torch.zeros(2, 18, 6, 6).to("meta"), torch.zeros(6, 4, 3, 3).to("meta"), None, None, [],
            [1] * 4, [1, 1],
        ),
        ValueError, "stride", "an integer or 2 integers", "got 0: []",
    ),
    *(
        Case(gather_on_meta(**{name: [1]}), ValueError, name, f"an integer or {count} integers", "got 1: [1]")
        for name, count in (("kernel_size", 2), ("stride", 2), ("padding", 4), ("dilation", 2))
    ),
    Case(on_meta(points=[]), ValueError, "points:", "1 to 16 levels", "got 0"),
    Case(on_meta(points=[6, 0]), ValueError, "points:", "expected at least 1", "got 0"),
    Case(on_meta(spatial_shapes=[3, 4, 2]), ValueError, "spatial_shapes:", "an integer or 4 integers", "got 3: [3,"),
    Case(on_meta(sampling_locations=AT.to("meta")), ValueError, "sampling_locations:", "5-D", "got shape (2, 5, 3, 2"),
    Case(on_meta(attention_weights=LOGITS.to("meta")), ValueError, "attention_weights:", "4-D", "(2, 5, 3, 2, 3)"),
]  # fmt: skip
DEFINITIONS = [
    Case(
        lambda: reference.bilinear_sample(IMAGE, ROIS, ROIS.to_mkldnn()), TypeError, "x:", "a dense tensor", "_mkldnn"
    ),
]
KERNELS = [
    Case(lambda: ops.kernels_used("gpu"), ValueError, "device:", "expected 'cpu', 'cuda' or None", "got 'gpu'"),
]
CASES = CONV + POOLS + ATTENTION + AGGREGATION + META + DEFINITIONS + KERNELS
