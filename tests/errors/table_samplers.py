"""Layers on the samplers that are no convolutions, in what they are constructed with and called with."""

from functools import partial

import torch
from torch import nn

from dcn_plugin.layers import (
    ActiveConv2d,
    DeformConv1d,
    DeformMaxPool2d,
    DeformMaxPool2dPack,
    Dilated,
    SpatialTransformer,
)
from errors.case import Case
from errors.table_layers import CONV, IMAGE, choices, of
from errors.table_ops import integer, integers, spoilt


def transformers():
    """Spatial transformers."""
    call = of(SpatialTransformer, dict(channels=4))
    yield from integer(call, "channels")
    yield from integers(call, "output_size")
    yield from choices(call, ("dtype",))
    for name in ("align_corners", "per_pixel"):
        yield Case(call(**{name: 1}), TypeError, f"{name}:", "expected True or False", "got 1")
    for value in ("circular", None, ["zeros"]):
        said = "expected one out of zeros, border, reflection"
        yield Case(call(padding_mode=value), ValueError, "padding_mode:", said, f"got {value!r}")
    for value in (torch.zeros(2, 6), nn.Linear, "linear"):
        yield Case(call(localiser=value), TypeError, "localiser:", "expected a module or None", f"got {value!r}")
    sized = call(per_pixel=True, output_size=3)
    yield Case(sized, ValueError, "output_size:", "expected None for the localiser that a layer", "got (3, 3)")
    layer = SpatialTransformer(4)
    for given, error, expected, got in (
        ([0], TypeError, "a tensor [N, 4, H, W]", "got list"),
        (torch.zeros(1, 3, 8, 8), ValueError, "expected [N, 4, H, W]", "got [1, 3, 8, 8]"),
        (IMAGE.long(), TypeError, "a real floating-point tensor", "got torch.int64"),
        (IMAGE.to("meta"), ValueError, "expected to be on cpu like the layer's parameters", "got meta"),
        (torch.zeros(1, 4, 3, 8), ValueError, "expected at least 4 x 4 pixels", "got 3 x 8"),
    ):
        for call in (layer, layer.offsets):
            yield Case(partial(call, given), error, "input", expected, got)
    for returned, per_pixel, error, expected, got in (
        ([0], False, TypeError, "returns [2, 6] or [2, 2, 3] for this input", "got list from it"),
        (torch.zeros(2, 5), False, ValueError, "returns [2, 6] or [2, 2, 3] for this input", "got [2, 5] from it"),
        (torch.zeros(1, 6), False, ValueError, "returns [2, 6] or [2, 2, 3] for this input", "got [1, 6] from it"),
        (torch.zeros(2, 6), True, ValueError, "returns [2, 6, 3, 5] for this input", "got [2, 6] from it"),
        (torch.zeros(2, 6, 8, 8), True, ValueError, "returns [2, 6, 3, 5] for this input", "got [2, 6, 8, 8] from it"),
    ):
        made = SpatialTransformer(4, Returning(returned), (3, 5), per_pixel=per_pixel)
        for call in (made, made.offsets):
            yield Case(partial(call, IMAGE), error, "localiser: expected a module that", expected, got)
    empty = SpatialTransformer(4, Returning(torch.zeros(2, 6)))
    wanted = "expected at least 1 x 1 pixels"
    yield Case(partial(empty, torch.zeros(2, 4, 0, 8)), ValueError, "input:", wanted, "got 0 x 8")


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def active():
    """Active convolutions; what `nn.Conv2d` takes is refused where all convolutions do."""
    call = of(ActiveConv2d, CONV)
    yield Case(call(normalise=1), TypeError, "normalise:", "expected True or False", "got 1")
    yield from integer(call, "warmup", 0)
    yield Case(call(kernel_size=1), ValueError, "kernel_size:", "expected more than one tap", "got (1, 1)")
    layer = ActiveConv2d(4, 6, 3)
    for each in (layer, layer.offsets):
        yield Case(partial(each, torch.zeros(1, 3, 8, 8)), ValueError, "input:", "[N, 4, H, W]", "got [1, 3, 8, 8]")
        yield Case(partial(each, IMAGE.to("meta")), ValueError, "input:", "like the layer's parameters", "got meta")

    def load(layer=layer, **given):
        good = dict(weight=torch.zeros(6, 4, 3, 3), x=torch.zeros(9), y=torch.zeros(9), bias=torch.zeros(6))
        return partial(layer.load_official, **good | given)

    for options, got in (
        (dict(kernel_size=5), "got (5, 5), 1, 1 and (1, 1)"),
        (dict(dilation=2), "got (3, 3), 1, 1 and (2, 2)"),
        (dict(groups=2, offset_groups=4), "got (3, 3), 2, 4 and (1, 1)"),
    ):
        wanted = "expected a layer with kernel_size=3, groups=1, offset_groups=1 and dilation=1"
        yield Case(load(ActiveConv2d(**CONV | options)), ValueError, "load_official:", wanted, got)
    yield Case(load(bias=None), ValueError, "bias:", "expected a tensor for this layer", "got None")
    without = ActiveConv2d(**CONV, bias=False)
    yield Case(load(without), ValueError, "bias:", "expected None for this layer", "got tensor([0.,")
    yield Case(load(bias=[0]), TypeError, "bias:", "expected a tensor [O]", "got list")
    yield Case(load(bias=torch.zeros(1)), ValueError, "bias:", "expected shape (6,)", "got (1,)")
    yield Case(load(weight=[0]), TypeError, "weight:", "expected a tensor [O, C, 3, 3]", "got list")
    yield Case(load(weight=torch.zeros(5, 4, 3, 3)), ValueError, "weight:", "expected [6, 4, 3, 3]", "got [5, 4, 3, 3]")
    yield Case(load(x=torch.zeros(8)), ValueError, "x, y:", "expected nine positions each", "got 8 and 9")
    yield Case(
        load(y=torch.ones(9)), ValueError, "x, y:", "expected the first position in the middle", "got [1.0, 0.0]"
    )


def dilated():
    yield from integers(of(Dilated, CONV), "factor")
    wrong = partial(Dilated(4, 6, 3), torch.zeros(1, 3, 8, 8))
    yield Case(wrong, ValueError, "input:", "expected [N, 4, H, W]", "got [1, 3, 8, 8]")


def sequences():
    """Convolutions of sequences."""
    call = of(DeformConv1d, dict(in_channels=4, out_channels=6, kernel_size=3))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "offset_groups"):
        yield from integer(call, name)
    yield from integer(call, "padding", 0)
    yield from choices(call, ("dtype",))
    yield Case(call(bias=1), TypeError, "bias:", "expected True or False", "got 1")
    yield Case(call(groups=3), ValueError, "in_channels:", "expected a multiple of groups", "got 4 and 3")
    yield Case(call(groups=4), ValueError, "out_channels:", "expected a multiple of groups", "got 6 and 4")
    yield Case(call(offset_groups=3), ValueError, "in_channels:", "a multiple of offset_groups", "got 4 and 3")

    def run(**given):
        good = dict(input=torch.zeros(2, 4, 8), offset=torch.zeros(2, 3, 6), mask=torch.zeros(2, 3, 6))
        return partial(DeformConv1d(4, 6, 3), **good | given)

    for name in ("offset", "mask"):
        yield from spoilt(run, name, torch.zeros(2, 3, 6), (2, 3, 6), "[N, G * K, L']")
    yield Case(run(input=1), TypeError, "input:", "expected a tensor [N, 4, L]", "got int")
    yield Case(run(input=torch.zeros(2, 3, 8)), ValueError, "input:", "expected [N, 4, L]", "got [2, 3, 8]")
    for length in (0, 2):
        short = run(input=torch.zeros(2, 4, length))
        yield Case(short, ValueError, "input:", "a sequence that the kernel fits on", f"got length {length}")


def pools():
    """Deformable max pooling."""
    for cls in (DeformMaxPool2d, DeformMaxPool2dPack):
        call = of(cls, dict(channels=4, kernel_size=3))
        for name in ("channels", "offset_groups"):
            yield from integer(call, name)
        for name in ("kernel_size", "stride", "dilation"):
            yield from integers(call, name)
        yield from integers(call, "padding", 0)
        yield Case(call(offset_groups=3), ValueError, "channels:", "a multiple of offset_groups", "got 4 and 3")
        wide = "expected at most half of the kernel's span (3, 3)"
        yield Case(call(padding=(1, 2)), ValueError, "padding:", wide, "got (1, 2)")
    yield from choices(call, ("dtype",))

    def run(**given):
        return partial(
            DeformMaxPool2d(4, 3), **dict(input=torch.zeros(2, 4, 8, 7), offset=torch.zeros(2, 18, 2, 2)) | given
        )

    yield from spoilt(run, "offset", torch.zeros(2, 18, 2, 2), (2, 18, 2, 2), "[N, 2 * G * K, H', W']")
    pack = DeformMaxPool2dPack(4, 3)
    for call in (lambda x: run(input=x), lambda x: partial(pack, x), lambda x: partial(pack.offsets, x)):
        yield Case(call(1), TypeError, "input:", "expected a tensor [N, 4, H, W]", "got int")
        yield Case(call(torch.zeros(2, 3, 8, 7)), ValueError, "input:", "[N, 4, H, W]", "got [2, 3, 8, 7]")
        small = call(torch.zeros(2, 4, 2, 7))
        yield Case(small, ValueError, "input:", "a map that the kernel fits on", "got 2 x 7 pixels")
    yield Case(partial(pack, IMAGE.to("meta")), ValueError, "input:", "like the layer's parameters", "got meta")
    for returned, error, got in (
        ([0], TypeError, "got list from it"),
        (torch.zeros(2, 9, 2, 2), ValueError, "got [2, 9, 2, 2] from it"),
        (torch.zeros(2, 18, 2, 3), ValueError, "got [2, 18, 2, 3] from it"),
    ):
        other = DeformMaxPool2dPack(4, 3)
        other.conv_offset = Returning(returned)
        for call in (other, other.offsets):
            wanted = "expected a module that returns"
            yield Case(partial(call, torch.zeros(2, 4, 8, 7)), error, "conv_offset:", wanted, got)


CASES = [*transformers(), *active(), *dilated(), *sequences(), *pools()]
