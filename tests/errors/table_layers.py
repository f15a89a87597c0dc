"""The layers, in what they are constructed with, made from, and called with."""

import math
import warnings
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from dcn_plugin import layers
from dcn_plugin.detection import MultiScaleDeformRoIPool
from dcn_plugin.layers import (
    DCNv1,
    DCNv2,
    DeformConv2d,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    MMCVMultiScaleDeformableAttention,
    ModulatedDeformRoIPoolPack,
    MSDeformAttn,
    PSRoIPool,
)
from errors.case import Case
from errors.table_ops import ROIS, integer, integers, number

CONV = dict(in_channels=4, out_channels=6, kernel_size=3)
POOL = dict(output_size=2)
PACK = POOL | dict(output_channels=4, deform_fc_channels=4)
PS = POOL | dict(output_dim=2, group_size=2)
PS_PACK = PS | dict(deform_fc_channels=4)
IMAGE = torch.zeros(2, 4, 8, 8)
PYRAMID = dict(featmap_names=["0"], output_size=2, sampling_ratio=2, in_channels=4, deform_fc_channels=4)


def of(layer, good):
    """What constructs the layer with something else than what is good."""
    return lambda **given: lambda: layer(**good | given)


def choices(call, options):
    """Arguments that are truth values, types or names."""
    flags = [
        Case(call(**{name: 1}), TypeError, name, "expected True or False", "got 1")
        for name in ("modulated", "aligned")
        if name in options
    ]
    if "dtype" in options:
        flags += [
            Case(call(dtype=dtype), ValueError, "dtype", "expected a real floating-point dtype", f"got {dtype}")
            for dtype in (torch.int64, torch.complex64)
        ]
        flags += [
            Case(call(dtype=dtype), TypeError, "dtype", "expected a torch.dtype or None", f"got {dtype!r}")
            for dtype in (float, "float16")
        ]
    if "mask_activation" in options:
        flags += [
            Case(
                call(mask_activation=value), ValueError, "mask_activation", "expected '2*sigmoid' or", f"got {value!r}"
            )
            for value in ("softmax", None, 2, ["sigmoid"])
        ]
    return flags


def script(layer, good):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated
        torch.jit.script(nn.Sequential(layer(**good)))


def convolutions():
    for layer in (DeformConv2d, DCNv1, DCNv2):
        call = of(layer, CONV)
        for name in ("in_channels", "out_channels", "groups", "offset_groups"):
            yield from integer(call, name)
        for name in ("kernel_size", "stride", "dilation"):
            yield from integers(call, name)
            yield Case(call(**{name: "8"}), TypeError, name, "expected an integer", "got '8' (str)")
        yield from integers(call, "padding", 0, "2 or 4")
        yield Case(call(padding="full"), ValueError, "padding", "expected 'same', 'valid' or integers", "got 'full'")
        yield Case(call(padding="same", stride=2), ValueError, "stride", "expected 1 with padding='same'", "got (2, 2)")
        yield Case(call(groups=3), ValueError, "in_channels", "expected a multiple of groups", "got 4 and 3")
        yield Case(call(groups=4), ValueError, "out_channels", "expected a multiple of groups", "got 6 and 4")
        yield Case(call(offset_groups=3), ValueError, "in_channels", "a multiple of offset_groups", "got 4 and 3")
        yield Case(call(padding_mode="circular"), ValueError, "padding_mode", "expected 'zeros'", "got 'circular'")
        yield from choices(call, ("dtype",))
    for layer in (DCNv1, DCNv2):
        yield from integer(of(layer, CONV), "offset_channels")
        for value in (0, -2.0, math.inf, math.nan):
            call = of(layer, CONV)(offset_bound=value)
            yield Case(call, ValueError, "offset_bound", "expected a positive and finite", f"got {value}")
        for value in ("2", True):
            call = of(layer, CONV)(offset_bound=value)
            yield Case(call, TypeError, "offset_bound", "expected a number of pixels or None", f"got {value!r}")
        for value in ("rotation", 6, ["affine"]):
            call = of(layer, CONV)(offset_form=value)
            yield Case(call, ValueError, "offset_form:", "expected 'affine', 'similarity' or None", f"got {value!r}")
        for shape in ((4, 8, 8), (1, 3, 8, 8), (1, 4, 8), (1, 4, 8, 8, 1)):
            call = lambda layer=layer, shape=shape: layer(4, 6, 3)(torch.zeros(shape))  # noqa: E731
            yield Case(call, ValueError, "input", "expected [N, 4, H, W]", f"got {list(shape)}")
        call = lambda layer=layer: layer(4, 6, 3)(IMAGE.to("meta"))  # noqa: E731
        yield Case(call, ValueError, "input", "expected to be on cpu like the layer's parameters", "got meta")
        call = lambda layer=layer: layer(4, 6, 3)(IMAGE.to_sparse())  # noqa: E731
        yield Case(call, TypeError, "input", "expected a dense tensor", "torch.sparse_coo")
    yield from choices(of(DCNv2, CONV), ("mask_activation",))
    for dtype in (torch.int64, torch.uint8, torch.complex64):
        call = lambda dtype=dtype: DCNv2(4, 6, 3)(torch.zeros(1, 4, 8, 8, dtype=dtype))  # noqa: E731
        yield Case(call, TypeError, "input", "a real floating-point tensor", f"got {dtype}")
    call = lambda: DCNv2(4, 6, 3)([torch.zeros(1, 4, 8, 8)])  # noqa: E731
    yield Case(call, TypeError, "input", "a tensor [N, 4, H, W]", "got list")
    for layer, good in ((DCNv2, CONV), (DeformRoIPoolPack, PACK), (PSRoIPool, PS), (MultiScaleDeformRoIPool, PYRAMID)):
        call, got = partial(script, layer, good), f"got {layer.__name__}"
        yield Case(call, NotImplementedError, "torch.jit.script", "TorchScript can compile", got)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class MoreState(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.ones(1))


def conv(**options):
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def altered(name, value):
    made = conv()
    setattr(made, name, value)
    return made


def hooked(kind):
    def my_hook(*args):
        return None

    made = conv()
    getattr(made, kind)(my_hook)
    return made


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv())


REPEAT = "a deformable layer would not repeat another"
PERMANENT = "make it permanent first"
FROM_CONV = [
    Case(lambda make=make: DCNv2.from_conv(make()), TypeError, name, expected, got)
    for make, name, expected, got in (
        (lambda: nn.ConvTranspose2d(4, 4, 3), "conv", "expected an nn.Conv2d", "got ConvTranspose2d"),
        (lambda: nn.Conv1d(4, 4, 3), "conv", "expected an nn.Conv2d", "got Conv1d"),
        (lambda: nn.BatchNorm2d(4), "conv", "expected an nn.Conv2d", "got BatchNorm2d"),
        (lambda: DCNv2(4, 4, 3), "conv", "expected an nn.Conv2d", "got DCNv2"),
        (lambda: nn.LazyConv2d(4, 3), "conv:", "run the model once", "got LazyConv2d, still lazy"),
        (lambda: OwnForward(4, 4, 3), "conv:", REPEAT, "got OwnForward with a forward of its own"),
        (lambda: OwnConvForward(4, 4, 3), "conv:", REPEAT, "got OwnConvForward with a forward of its own"),
        (lambda: altered("forward", print), "conv:", REPEAT, "got Conv2d whose forward has been replaced"),
        (lambda: MoreState(4, 4, 3), "conv:", "expected weight and bias alone", "got MoreState that also holds scale"),
        (
            lambda: conv(padding_mode="reflect"),
            "conv:",
            "pads with zeros only",
            "got Conv2d with padding_mode='reflect'",
        ),
        (
            lambda: parametrizations.weight_norm(conv()),
            "conv:",
            "remove_parametrizations",
            "got ParametrizedConv2d with",
        ),
        (old_weight_norm, "conv:", PERMANENT, "got Conv2d that computes its weight from weight_g, weight_v"),
        (lambda: spectral_norm(conv()), "conv:", PERMANENT, "that computes its weight from weight_orig"),
        (lambda: prune.l1_unstructured(conv(), "weight", 0.5), "conv:", PERMANENT, "its weight from weight_orig"),
        (
            lambda: hooked("register_forward_hook"),
            "conv:",
            "convert first, hook afterwards",
            "got Conv2d with hooked.<locals>.my_hook",
        ),
        (
            lambda: hooked("register_forward_pre_hook"),
            "conv:",
            "convert first, hook afterwards",
            "got Conv2d with hooked.<locals>.my_hook",
        ),
        (
            lambda: hooked("register_full_backward_hook"),
            "conv:",
            "convert first, hook afterwards",
            "got Conv2d with hooked.<locals>.my_hook",
        ),
    )
]
FROM_CONV += [
    # Whatever has been done to a convolution by hand.
    Case(lambda name=name: DCNv2.from_conv(altered(name, (1, 0))), ValueError, name, "expected at least 1", "got 0")
    for name in ("kernel_size", "stride", "dilation")
]
FROM_CONV += [
    Case(
        lambda: DCNv1.from_conv(conv(), mask_activation="sigmoid"),
        TypeError, "DCNv1:", "options out of offset_groups, offset_bound", "got 'mask_activation'",
    ),
]  # fmt: skip


def pools():
    for layer, good, more in (
        (DeformRoIPool, POOL, ()),
        (DeformRoIPoolPack, PACK, ("dtype",)),
        (ModulatedDeformRoIPoolPack, PACK, ("dtype",)),
    ):
        call = of(layer, good)
        yield from integers(call, "output_size")
        yield from number(call, "spatial_scale", True)
        yield from integer(call, "sampling_ratio", -1)
        yield from number(call, "gamma", True)
        if "output_channels" in good:
            yield from integer(call, "output_channels")
            yield from integer(call, "deform_fc_channels")
        yield from choices(call, more)
    for layer, good in ((PSRoIPool, PS), (DeformPSRoIPool, PS), (DeformPSRoIPoolPack, PS_PACK)):
        call = of(layer, good)
        yield from integer(call, "output_dim")
        yield from integer(call, "group_size")
        yield from integers(call, "output_size")
        yield from number(call, "spatial_scale", True)
        if layer is not PSRoIPool:
            yield from integers(call, "part_size")
            yield from integer(call, "samples_per_part")
            yield from number(call, "offset_scale", True)
    call = of(DeformPSRoIPoolPack, PS_PACK)
    yield from integer(call, "deform_fc_channels")
    yield from integer(call, "offset_classes")
    yield from choices(call, ("modulated", "dtype", "mask_activation"))
    yield Case(call(offset_classes=3), ValueError, "output_dim", "a multiple of offset_classes", "got 2 and 3")
    call = of(MultiScaleDeformRoIPool, PYRAMID)
    for value in ([], "0", None, [0]):
        wanted = "expected a sequence of names of feature maps"
        yield Case(call(featmap_names=value), TypeError, "featmap_names", wanted, f"got {value!r}")
    yield from integers(call, "output_size")
    yield from integer(call, "sampling_ratio", -1)
    yield from integer(call, "canonical_level", 0)
    for name in ("canonical_scale", "in_channels", "deform_fc_channels"):
        yield from integer(call, name)
    yield from number(call, "gamma", True)
    yield from choices(call, ("modulated", "aligned", "dtype", "mask_activation"))


BOXES = [ROIS[:, 1:]] * 2


def pyramid(x=None, boxes=BOXES):
    maps = {"0": IMAGE} if x is None else x
    return lambda: MultiScaleDeformRoIPool(**PYRAMID)(maps, boxes, [(8, 8)] * 2)


MAP = torch.zeros(2, 6, 8, 8)


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Claims(nn.Module):
    offset_branches = ["a"]  # noqa: RUF012


class Misspelt(layers.SamplingModule):
    offset_branches = {"mvoe": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.move = nn.Parameter(torch.zeros(2))


def reading(channels):
    layer = DCNv2(4, 6, 3, padding=1, offset_channels=channels)
    return lambda feature: layer(IMAGE, feature)


def branched(branch):
    layer = DCNv2(4, 6, 3, padding=1)
    layer.conv_offset = branch
    return lambda: layer(IMAGE)


CALLS = [
    Case(
        lambda: layers.DCNv2Pack(4, 6, 3, offset_groups=2, deform_groups=2),
        TypeError, "offset_groups:", "expected it under one of its names", "got offset_groups=2, deform_groups=2",
    ),
    Case(
        lambda: layers.DeformConv2d(4, 6, 3).offsets(IMAGE),
        NotImplementedError, "offsets:", "expected a layer that predicts them", "got DeformConv2d",
    ),
    Case(
        lambda: DCNv1(**CONV).regions(None),
        NotImplementedError, "regions:", "expected a layer that pools regions", "got DCNv1",
    ),
    Case(
        lambda: DCNv1(**CONV).register_sampling_hook("print"),
        TypeError, "hook:", "expected a function of the layer and its samples", "got 'print'",
    ),
    Case(
        lambda: DeformRoIPoolPack(2, 8, 4)(IMAGE, ROIS),
        ValueError, "input", "expected [N, 8, H, W]", "got [2, 4, 8, 8]",
    ),
    *(
        Case(lambda o=offset: DeformRoIPool(2)(IMAGE, ROIS, o), ValueError, "offset", "expected [R, 2, P_h, P_w]", got)
        for offset, got in ((torch.zeros(3, 4, 2, 2), "got [3, 4, 2, 2]"), ([0, 0], "got list"))
    ),
    Case(lambda: DeformRoIPool(2)(IMAGE, ROIS, IMAGE.to_mkldnn()), TypeError, "offset:", "a dense tensor", "_mkldnn"),
    Case(
        lambda: DeformRoIPoolPack(2, 4, 4)(IMAGE.to("meta"), ROIS),
        ValueError, "input", "expected to be on cpu like the layer's parameters", "got meta",
    ),
    *(
        Case(partial(reading(channels), feature), error, name, expected, got)
        for feature, channels, error, name, expected, got in (
            (None, 6, ValueError, "feature:", "a map [N, 6, H, W] that offsets are predicted", "got None"),
            (MAP[:, :5], 6, ValueError, "feature:", "expected [N, 6, H, W]", "got [2, 5, 8, 8]"),
            (MAP, None, ValueError, "feature:", "expected [N, 4, H, W]", "got [2, 6, 8, 8]"),
            ([MAP], 6, TypeError, "feature:", "expected a tensor [N, 6, H, W]", "got list"),
            (MAP.double(), 6, TypeError, "feature:", "expected torch.float32", "got torch.float64"),
            (MAP.long(), 6, TypeError, "feature:", "real floating-point tensor", "got torch.int64"),
            (MAP.to("meta"), 6, ValueError, "feature:", "on cpu like the layer's parameters", "got meta"),
            (
                MAP[:, :, :7], 6, ValueError, "feature:",
                "[2, 27, 8, 8] follow from, as the input is [2, 4, 8, 8]", "got [2, 6, 7, 8], which [2, 27, 7,",
            ),
            (MAP[:1], 6, ValueError, "feature:", "[2, 27, 8, 8] follow from", "got [1, 6, 8, 8], which [1,"),
        )
    ),
    *(
        Case(branched(branch), error, "conv_offset:", f"expected a module that returns {expected}", got)
        for branch, error, expected, got in (
            (nn.Conv2d(4, 18, 3, padding=1), ValueError, "[N, 27, H', W']", "got [2, 18, 8, 8]"),
            (nn.Flatten(), ValueError, "[N, 27, H', W']", "got [2, 256]"),
            (nn.Conv2d(4, 27, 3), ValueError, "[2, 27, 8, 8] for this input", "got [2, 27, 6, 6]"),
            (Nothing(), TypeError, "a tensor", "got NoneType"),
        )
    ),
    Case(
        lambda: layers.PrefixPredictor(nn.Conv2d(4, 6, 3)),
        TypeError, "layer:", "expected a DCNv1 or DCNv2", "got Conv2d",
    ),
    Case(
        lambda: layers.PrefixPredictor(branched_by_flatten()),
        TypeError, "layer.conv_offset:", "expected a convolution", "got Flatten",
    ),
    Case(
        lambda: layers.offset_rates(Claims()),
        TypeError, "offset_branches:", "expected a mapping of names to learning rates in the class Claims", "got ['a']",
    ),
    Case(
        lambda: layers.reset_offsets(Misspelt()),
        ValueError, "offset_branches:", "expected names of submodules or parameters of Misspelt", "got 'mvoe'",
    ),
    Case(lambda: layers.offset_parameters({}), TypeError, "model", "expected an nn.Module", "got dict"),
    Case(pyramid({"p2": IMAGE}), ValueError, "x", "expected feature maps named ['0']", "got ['p2']"),
    Case(pyramid({"0": IMAGE[:, :3]}), ValueError, "x", "feature maps [N, 4, H, W]", "got [2, 3, 8, 8]"),
    Case(pyramid({"0": IMAGE.to_sparse()}), TypeError, "x['0']:", "expected a dense tensor", "torch.sparse_coo"),
    Case(
        lambda: MultiScaleDeformRoIPool(**PYRAMID | dict(featmap_names=["0", "1"]))(
            {"0": IMAGE, "1": IMAGE.to("meta")}, BOXES, [(8, 8)] * 2
        ),
        ValueError, "x['1']:", "expected to be on cpu", "got meta",
    ),
    Case(pyramid({"0": IMAGE[0]}), ValueError, "x['0']:", "a 4-D tensor [N, 4, H, W]", "got shape (4, 8, 8)"),
    Case(pyramid(boxes=[BOXES[0], ROIS]), ValueError, "boxes[1]:", "[L, 4] (x1, y1, x2, y2)", f"got {(*ROIS.shape,)}"),
    Case(pyramid(boxes=[BOXES[0], None]), TypeError, "boxes[1]:", "expected a tensor [L, 4]", "got NoneType"),
    Case(pyramid(boxes=[BOXES[0], BOXES[0].to("meta")]), ValueError, "boxes[1]:", "on cpu like input", "got meta"),
    Case(pyramid(boxes=BOXES[:1]), ValueError, "boxes", "2 tensors [L, 4], one for each image", "got 1"),
]  # fmt: skip


ATTENTION = dict(d_model=8, n_levels=2, n_heads=2, n_points=3)
MMCV_ATTENTION = dict(embed_dims=8, num_heads=2, num_levels=2, num_points=3)
ATTENDED = dict(query=torch.zeros(2, 5, 8), reference_points=torch.zeros(2, 5, 2, 2))
LEVELS = [(4, 6), (2, 3)]


def attend(**given):
    good = ATTENDED | dict(input_flatten=torch.zeros(2, 30, 8), input_spatial_shapes=LEVELS)
    return lambda: MSDeformAttn(**ATTENTION)(**good | given)


def attend_as_mmcv(batch_first=True, **given):
    good = ATTENDED | dict(value=torch.zeros(2, 30, 8), spatial_shapes=LEVELS)
    return lambda: MMCVMultiScaleDeformableAttention(**MMCV_ATTENTION, batch_first=batch_first)(**good | given)


def attention():
    for layer, good in ((MSDeformAttn, ATTENTION), (MMCVMultiScaleDeformableAttention, MMCV_ATTENTION)):
        call = of(layer, good)
        for name in good:
            yield from integer(call, name)
        yield from choices(call, ("dtype",))
    yield Case(of(MSDeformAttn, ATTENTION)(n_heads=3), ValueError, "d_model", "a multiple of n_heads", "got 8 and 3")
    for value in ([3], [1, 2, 3]):
        call = of(MSDeformAttn, ATTENTION)(n_points=value)
        yield Case(call, ValueError, "n_points", "expected a number for each of 2 levels", f"got {value}")
    yield Case(of(MSDeformAttn, ATTENTION)(n_points=[1, 0]), ValueError, "n_points", "expected at least 1", "got 0")
    yield Case(of(MSDeformAttn, ATTENTION)(n_points="3"), TypeError, "n_points", "expected an integer", "got '3' (str)")
    call = of(MMCVMultiScaleDeformableAttention, MMCV_ATTENTION)
    yield Case(call(num_heads=3), ValueError, "embed_dims", "a multiple of num_heads", "got 8 and 3")
    yield Case(call(batch_first=1), TypeError, "batch_first", "expected True or False", "got 1")
    yield from number(call, "value_proj_ratio", True)
    for value, got in ((0.9, "which gives 7"), (0.01, "which gives 0")):
        yield Case(call(value_proj_ratio=value), ValueError, "value_proj_ratio", "a multiple of 2 channels", got)
    yield from number(call, "dropout", False)
    for value in (-0.1, 1.5):
        yield Case(call(dropout=value), ValueError, "dropout", "expected a part from 0 to 1", f"got {value}")
    for layer, good, name in (
        (MSDeformAttn, ATTENTION, "n_levels"),
        (MMCVMultiScaleDeformableAttention, MMCV_ATTENTION, "num_levels"),
    ):
        yield Case(of(layer, good)(**{name: 17}), ValueError, name, "expected at most 16", "got 17")
    yield from attended()
    for name in ("identity", "query_pos"):
        for given, error, got in (
            ([0], TypeError, "got list"),
            (torch.zeros(2, 4, 8), ValueError, "got [2, 4, 8]"),
            (torch.zeros(3, 5, 8), ValueError, "got [3, 5, 8]"),
            (torch.zeros(1, 2, 5, 8), ValueError, "got [1, 2, 5, 8]"),
        ):
            yield Case(attend_as_mmcv(**{name: given}), error, name, "[N, Q, C] like query", got)
        swapped = dict(query=torch.zeros(5, 2, 8), value=torch.zeros(30, 2, 8), spatial_shapes=LEVELS)
        call = attend_as_mmcv(False, **swapped, **{name: torch.zeros(2, 5, 8)})
        yield Case(call, ValueError, name, "expected [Q, N, C] like query, [5, 2, 8]", "got [2, 5, 8]")
        call = attend_as_mmcv(query=[0], **{name: torch.zeros(2, 5, 8)})
        yield Case(call, TypeError, "query", "expected a tensor [N, Q, C]", "got list")
    got = "got [5, 2, 6]"
    call = attend_as_mmcv(False, query=torch.zeros(5, 2, 6), value=torch.zeros(30, 2, 8))
    yield Case(call, ValueError, "query", "expected [Q, N, 8]", got)
    yield Case(attend_as_mmcv(False, query=[0]), TypeError, "query", "expected a tensor [Q, N, 8]", "got list")
    swapped = "(batch_first=False reads [S, N, C])"
    both = dict.fromkeys(("query", "value"), torch.zeros(1, 30, 8))
    call = attend_as_mmcv(False, **both)
    yield Case(call, ValueError, "spatial_shapes", "add up to the 1 pixels of value, got 30", swapped)
    call = attend_as_mmcv(False, **both | dict(query=torch.zeros(1, 5, 8)))
    yield Case(call, ValueError, "value", "expected 5 images like query, got 30", swapped)
    call = attend_as_mmcv(False, **both | dict(query=torch.zeros(5, 1, 8)))
    yield Case(call, ValueError, "value", "expected 1 images like query, got 30", swapped)
    call = attend_as_mmcv(value=torch.zeros(30, 2, 8))
    yield Case(call, ValueError, "value", "expected 2 images like query, got 30", "(the layer reads [N, S, C])")
    call = attend_as_mmcv(reference_points=None)
    yield Case(call, TypeError, "reference_points", "expected a tensor [N, Q, 2, 2 or 4]", "got NoneType")
    yield Case(attend_as_mmcv(spatial_shapes=None), ValueError, "spatial_shapes", "expected 2 pairs (H, W)", "got None")
    call = attend_as_mmcv(level_start_index=torch.tensor([0, 20]))
    yield Case(call, ValueError, "level_start_index", "expected [0, 24]", "got [0, 20]")
    call = attend_as_mmcv(key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    yield Case(call, ValueError, "key_padding_mask", "expected [2, 30]", "got [2, 5]")


def attended():
    """What a call is given, one thing wrong with it."""
    zeros, wrong = torch.zeros, ValueError
    for name, given, error, expected, got in (
        ("query", [0], TypeError, "expected a tensor [N, Q, 8]", "got list"),
        ("query", zeros(5, 8), wrong, "expected a 3-D tensor [N, Q, 8]", "got shape (5, 8)"),
        ("query", zeros(2, 5, 6), wrong, "expected [N, Q, 8]", "got [2, 5, 6]"),
        ("query", zeros(2, 5, 8).long(), TypeError, "expected float64, float32", "got torch.int64"),
        ("query", zeros(2, 5, 8).to("meta"), wrong, "expected to be on cpu like the layer's parameters", "got meta"),
        ("input_flatten", zeros(2, 30, 7), wrong, "expected [N, S, 8]", "got [2, 30, 7]"),
        ("input_flatten", zeros(1, 30, 8), wrong, "expected 2 images like query", "got 1"),
        ("input_spatial_shapes", [(4, 6), (2, 4)], wrong, "add up to the 30 pixels of input_flatten", "got 32 from [("),
        ("input_spatial_shapes", torch.tensor([[4, 6], [6, 4]]), wrong, "add up to the 30 pixels", "got 48 from [("),
        ("input_spatial_shapes", [(30, 1)], wrong, "expected 2 pairs (H, W)", "got [(30, 1)]"),
        ("input_spatial_shapes", [24, 6], wrong, "expected 2 pairs (H, W)", "got [24, 6]"),
        ("input_spatial_shapes", [(4, 6, 1), (2, 3, 1)], wrong, "expected 2 pairs (H, W)", "got [(4, 6, 1)"),
        ("input_spatial_shapes", [(-4, -6), (2, 3)], wrong, "expected at least 1", "got -4"),
        ("input_spatial_shapes", [(4.0, 6), (2, 3)], TypeError, "expected an integer", "got 4.0"),
        ("input_spatial_shapes", zeros(2, 2), wrong, "expected integers [2, 2]", "got torch.float32 [2, 2]"),
        ("input_spatial_shapes", zeros(3, 2).long(), wrong, "expected integers [2, 2]", "got torch.int64 [3, 2]"),
        ("input_spatial_shapes", {(4, 6), (2, 3)}, wrong, "expected 2 pairs (H, W)", "got {("),
        ("input_spatial_shapes", zeros(2, 2).long().to("meta"), wrong, "numbers are not known", "(2, 2)"),
        ("input_level_start_index", 24, wrong, "expected [0, 24], where the levels begin", "got 24"),
        ("input_level_start_index", np.array([0, 6]), wrong, "expected [0, 24], where the levels begin", "got [0 6]"),
        ("input_level_start_index", [0, 6], wrong, "expected [0, 24], where the levels begin", "got [0, 6]"),
        ("input_level_start_index", torch.tensor([24, 0]), wrong, "expected [0, 24]", "got [24, 0]"),
        ("input_level_start_index", torch.tensor([0]), wrong, "expected integers [2]", "got torch.int64 [1]"),
        ("reference_points", zeros(2, 5, 2, 3), wrong, "2 (x, y) or 4 (x, y, w, h)", "got [2, 5, 2, 3]"),
        ("reference_points", zeros(2, 5, 3, 2), wrong, "expected [2, 5, 2 or 1,", "got [2, 5, 3, 2]"),
        ("reference_points", zeros(2, 4, 2, 2), wrong, "expected [2, 5, 2 or 1,", "got [2, 4, 2, 2]"),
        ("reference_points", zeros(2, 5, 2), wrong, "expected a 4-D tensor", "got shape (2, 5, 2)"),
        ("reference_points", zeros(2, 5, 2, 2).to("meta"), wrong, "on cpu like the layer's parameters", "got meta"),
        ("input_padding_mask", zeros(2, 30), TypeError, "expected a tensor of torch.bool", "got torch.float32"),
        ("input_padding_mask", [[True]], TypeError, "expected a tensor of torch.bool", "got list"),
        ("input_padding_mask", zeros(2, 29).bool(), wrong, "expected [2, 30], one for each pixel", "got [2, 29]"),
        ("input_padding_mask", zeros(2, 30).bool().to_sparse(), TypeError, "a dense tensor", "torch.sparse_coo"),
        ("input_padding_mask", zeros(2, 30).bool().to("meta"), wrong, "on cpu like the layer's", "got meta"),
    ):
        yield Case(attend(**{name: given}), error, f"{name}:", expected, got)
    call = attend(input_flatten=zeros(2, 31, 8))
    yield Case(call, wrong, "input_spatial_shapes:", "add up to the 31 pixels of input_flatten", "got 30 from")


def grids():
    """Attention to a deformed grid."""
    call = of(layers.DAttention, dict(dim=4, n_heads=2, n_groups=1, q_size=8))
    for name in ("dim", "n_heads", "n_groups", "ksize", "stride"):
        yield from integer(call, name)
    yield from integers(call, "q_size")
    yield from choices(call, ("dtype",))
    yield Case(call(n_heads=3), ValueError, "dim", "a multiple of n_heads", "got 4 and 3")
    yield Case(call(n_groups=4), ValueError, "n_heads", "a multiple of n_groups", "got 2 and 4")
    yield Case(call(plus=1), TypeError, "plus", "expected True or False", "got 1")
    yield from number(call, "offset_range_factor", False)
    for given in (dict(offset_range_factor=0), dict(offset_range_factor=-1)):
        wanted = "expected a positive number, or with plus=True a negative one"
        yield Case(call(**given), ValueError, "offset_range_factor", wanted, f"got {given['offset_range_factor']}")
    for name in ("attn_drop", "proj_drop"):
        yield from number(call, name, False)
        for value in (-0.1, 1.5):
            yield Case(call(**{name: value}), ValueError, name, "expected a part from 0 to 1", f"got {value}")
    layer = layers.DAttention(4, 2, 1, 8)
    for given, error, expected, got in (
        ([0], TypeError, "a tensor [N, 4, H, W]", "got list"),
        (torch.zeros(1, 3, 8, 8), ValueError, "expected [N, 4, H, W]", "got [1, 3, 8, 8]"),
        (IMAGE.long(), TypeError, "a real floating-point tensor", "got torch.int64"),
        (IMAGE.to("meta"), ValueError, "expected to be on cpu like the layer's parameters", "got meta"),
    ):
        for call in (layer, layer.offsets):
            yield Case(partial(call, given), error, "input", expected, got)
    few = layers.DAttention(4, 2, 1, 8, ksize=4, stride=4, plus=True, offset_range_factor=-1.0)
    for made, size, least in ((layer, (0, 3), 1), (layer, (3, 0), 1), (few, (3, 4), 4)):
        for call in (made, made.offsets):
            got = f"got {size[0]} x {size[1]}"
            wanted = f"expected at least {least} x {least} pixels"
            yield Case(partial(call, torch.zeros(2, 4, *size)), ValueError, "input:", wanted, got)


def branched_by_flatten():
    layer = layers.DCNv2(4, 8, 3)
    layer.conv_offset = nn.Flatten()
    return layer


CASES = [*convolutions(), *FROM_CONV, *pools(), *attention(), *grids(), *CALLS]
