"""DCNv3 and DCNv4, in what they are constructed with, made from, and called with."""

from functools import partial

import torch
from torch import nn

from dcn_plugin.layers import DCNv3, DCNv4
from errors.case import Case
from errors.table_layers import choices, of
from errors.table_ops import integer, number

GOOD = dict(channels=6, group=2)
PIXELS, ROWS = torch.zeros(2, 5, 7, 6), torch.zeros(2, 35, 6)


def constructed():
    for layer in (DCNv3, DCNv4):
        call = of(layer, GOOD)
        for name in ("channels", "kernel_size", "stride", "dilation", "group", "dw_kernel_size"):
            yield from integer(call, name)
        yield from integer(call, "pad", 0)
        yield from number(call, "offset_scale", True)
        yield from choices(call, ("dtype",))
        yield Case(call(group=4), ValueError, "channels:", "expected a multiple of group", "got 6 and 4")
        for name in ("center_feature_scale", "channels_first"):
            yield Case(call(**{name: 1}), TypeError, f"{name}:", "expected True or False", "got 1")
        for value in (2, "yes", None):
            call_it = call(remove_center=value)
            yield Case(call_it, TypeError, "remove_center:", "expected True or False", f"got {value!r}")
        for kernel in (1, 2, 4):
            call_it = call(kernel_size=kernel, dw_kernel_size=3, pad=0, remove_center=True)
            said = "expected an odd one above 1 with remove_center"
            yield Case(call_it, ValueError, "kernel_size:", said, f"got {kernel}")
        yield Case(call(dw_kernel_size=4), ValueError, "dw_kernel_size:", "expected an odd number", "got 4")
        yield Case(call(pad=2), ValueError, "pad:", "expected at most dilation * (kernel_size - 1) // 2 = 1", "got 2")
    call = of(DCNv3, GOOD)
    yield Case(call(kernel_size=4), ValueError, "dw_kernel_size:", "expected an odd number", "got 4")
    for value in ("gelu", None, nn.GELU):
        yield Case(call(act_layer=value), ValueError, "act_layer:", "expected 'GELU' or 'ReLU' or", f"got {value!r}")
    for value in ("GN", None, ["LN"]):
        yield Case(call(norm_layer=value), ValueError, "norm_layer:", "expected 'LN' or 'BN'", f"got {value!r}")
    for name in ("output_bias", "without_pointwise"):
        yield Case(of(DCNv4, GOOD)(**{name: 0}), TypeError, f"{name}:", "expected True or False", "got 0")


def called():
    def third(x):
        return lambda: DCNv3(**GOOD)(x)

    def fourth(x, *shape):
        return lambda: DCNv4(**GOOD)(x, *shape)

    for call, good, axes in (
        (third, PIXELS, "[N, H, W, 6]"),
        (fourth, ROWS, "[N, L, 6]"),
        (lambda x: lambda: DCNv3(**GOOD, channels_first=True)(x), PIXELS.permute(0, 3, 1, 2), "[N, 6, H, W]"),
        (lambda x: lambda: DCNv4(**GOOD, channels_first=True)(x), PIXELS.permute(0, 3, 1, 2), "[N, 6, H, W]"),
    ):
        wrong = torch.cat((good, good[..., :1]), -1) if axes.endswith("6]") else good[:, :5]
        yield Case(call(wrong), ValueError, "input:", f"expected {axes}", f"got {list(wrong.shape)}")
        yield Case(call(good[0]), ValueError, "input:", axes, f"got shape {tuple(good.shape[1:])}")
        yield Case(call(good.tolist()), TypeError, "input:", f"expected a tensor {axes}", "got list")
        yield Case(call(good.int()), TypeError, "input:", "expected float64, float32", "got torch.int32")
        yield Case(call(good.to("meta")), ValueError, "input:", "expected to be on cpu like the layer's", "got meta")
    said = "expected (H, W), as the 35 pixels of input are no square"
    yield Case(fourth(ROWS), ValueError, "shape:", said, "got None")
    for shape in ((5, 6), (36, 1), 6, (0, 35)):
        got = f"got {shape if isinstance(shape, tuple) else (shape, shape)}"
        yield Case(fourth(ROWS, shape), ValueError, "shape:", "expected (H, W) of the 35 pixels of input", got)
    yield Case(fourth(ROWS, (5, 7, 1)), ValueError, "shape:", "expected an integer or 2 integers", "got 3")
    yield Case(fourth(ROWS, (5.0, 7.0)), TypeError, "shape:", "expected an integer", "got 5.0")
    for geometry, size, least in (({}, (0, 3), 1), ({}, (3, 0), 1), (dict(kernel_size=5, pad=1), (2, 7), 3)):
        said, got = f"expected at least {least} x {least} pixels", f"got {size[0]} x {size[1]}"
        maps = torch.zeros(2, *size, 6)
        for layer in (DCNv3, DCNv4):
            for order in (True, False):
                made = layer(**GOOD, **geometry, channels_first=order)
                given = [maps.permute(0, 3, 1, 2)] if order else [maps]
                if layer is DCNv4 and not order:
                    given = [maps.flatten(1, 2), size]
                for call in (made, made.offsets):
                    yield Case(partial(call, *given), ValueError, "input:", said, got)
    yield Case(fourth(ROWS[:, :0]), ValueError, "input:", "expected at least 1 x 1 pixels", "got 0 x 0")
    yield Case(fourth(ROWS, (-5, -7)), ValueError, "shape:", "expected at least 0", "got -5")


def other_weights():
    state = DCNv3(12, group=3).state_dict()
    layer = DCNv3(12, group=2, remove_center=True)
    layer.load_state_dict({**layer.state_dict(), "offset.weight": state["offset.weight"]})


def replaced():
    def made(layer, *sizes, **geometry):
        options = {k: geometry.pop(k) for k in ("type", "group", "offset_groups") if k in geometry}
        return lambda: layer.from_conv(nn.Conv2d(*sizes, **geometry), **options)

    for layer in (DCNv3, DCNv4):
        call = partial(made, layer)
        known = "offset_scale, dw_kernel_size" if layer is DCNv4 else "dw_kernel_size, group"
        yield Case(call(6, 6, 3, groups=6, offset_groups=2), TypeError, layer.__name__, known, "got 'offset_groups'")
        for sizes, groups in (((6, 6), 1), ((6, 12), 6), ((6, 6), 3)):
            got = f"got one of {sizes[0]} to {sizes[1]} channels in {groups} groups"
            yield Case(call(*sizes, 3, groups=groups), ValueError, "conv:", "expected a depthwise convolution", got)
        for geometry in (
            dict(kernel_size=(3, 5), padding=(1, 2)), dict(kernel_size=3, stride=(1, 2)),
            dict(kernel_size=3, dilation=(1, 2)), dict(kernel_size=3, padding=(1, 0)),
            dict(kernel_size=4, padding="same"),
        ):  # fmt: skip
            said = "expected kernel, stride, padding and dilation alike on all sides"
            yield Case(call(6, 6, groups=6, group=2, **geometry), ValueError, "conv:", said, "got Conv2d(6, 6")
        yield Case(call(6, 6, 3, groups=6, group=4), ValueError, "channels:", "expected a multiple of group", "got 6")
        call_it = lambda layer=layer: layer.from_conv(nn.Linear(6, 6))  # noqa: E731
        yield Case(call_it, TypeError, "conv:", "expected an nn.Conv2d", "got Linear")
    said = "predicts 54 numbers: this layer has 2 groups of 8 taps, the middle one removed, so 32"
    yield Case(other_weights, RuntimeError, "offset.weight", said, "[54, 12]")


CASES = [*constructed(), *called(), *replaced()]
