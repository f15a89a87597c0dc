"""Alignment of video frames, in what its layers are constructed with and called with."""

from functools import partial

import torch

from dcn_plugin.layers import DCNv2Pack, PCDAlignment, SecondOrderDeformableAlignment
from errors.case import Case
from errors.table_layers import choices, of
from errors.table_ops import integer, number

GIVEN = dict(x=(2, 4, 8, 8), extra_feat=(2, 6, 8, 8), flow_1=(2, 2, 8, 8), flow_2=(2, 2, 8, 8))


def packs():
    call = of(DCNv2Pack, dict(in_channels=4, out_channels=6, kernel_size=3))
    yield from integer(call, "offset_groups")
    for options, got in (
        (dict(offset_groups=2, deform_groups=4), "got offset_groups=2, deform_groups=4"),
        (dict(deformable_groups=2, deform_groups=2), "got offset_groups=1, deformable_groups=2, deform_groups=2"),
    ):
        yield Case(call(**options), TypeError, "offset_groups:", "expected it under one of its names", got)
    yield Case(call(deform_groups=0), ValueError, "offset_groups:", "expected", "got 0")
    run = partial(DCNv2Pack(4, 6, 3, padding=1), torch.zeros(2, 4, 8, 8))
    for feat, error, expected, got in (
        (None, ValueError, "a map [N, 4, H, W] that offsets are predicted from", "got None"),
        (torch.zeros(2, 5, 8, 8), ValueError, "expected [N, 4, H, W]", "got [2, 5, 8, 8]"),
        (torch.zeros(2, 4, 8, 7), ValueError, "[2, 27, 8, 8] follow from", "got [2, 4, 8, 7], which [2, 27, 8, 7]"),
        (torch.zeros(2, 4, 8, 8).double(), TypeError, "expected torch.float32", "got torch.float64"),
    ):
        yield Case(partial(run, feat), error, "feat:", expected, got)


def second_order():
    call = of(SecondOrderDeformableAlignment, dict(in_channels=4, out_channels=2, kernel_size=3, offset_groups=2))
    yield from integer(call, "out_channels")
    twice = call(deformable_groups=2)
    yield Case(twice, TypeError, "offset_groups:", "under one of its names", "got offset_groups=2, deformable_groups=2")
    yield from number(call, "max_residue_magnitude", positive=True)
    yield Case(call(stride=2, padding=1), ValueError, "stride:", "expected 1, as there is a flow", "got (2, 2)")
    for padding in (0, (1, 0), 2, "valid"):
        yield Case(call(padding=padding), ValueError, "padding:", "keeps the size of the map", f"got {padding!r}")
    odd = call(offset_groups=1)
    yield Case(odd, ValueError, "offset_groups:", "expected a multiple of the number of flows", "got 1 and 2")

    def run(**given):
        good = {name: torch.zeros(shape) for name, shape in GIVEN.items()} | given
        layer = SecondOrderDeformableAlignment(4, 2, 3, offset_groups=2)
        return partial(layer, good.pop("x"), **good)

    yield Case(run(x=torch.zeros(2, 3, 8, 8)), ValueError, "input:", "expected [N, 4, H, W]", "got [2, 3, 8, 8]")
    for name, (n, channels, *size) in GIVEN.items():
        if name == "x":
            continue
        for value, error, expected, got in (
            (None, TypeError, f"a tensor [N, {channels}, H, W]", "got NoneType"),
            (torch.zeros(n, 1, *size), ValueError, f"expected [N, {channels}, H, W]", "got [2, 1, 8, 8]"),
            (torch.zeros(1, channels, *size), ValueError, f"[2, {channels}, 8, 8] beside an input of", "got [1,"),
            (torch.zeros(n, channels, 8, 7), ValueError, f"[2, {channels}, 8, 8] beside an input of", "8, 7]"),
            (torch.zeros(n, channels, *size).double(), TypeError, "expected torch.float32", "got torch.float64"),
            (torch.zeros(n, channels, *size).long(), TypeError, "real floating-point tensor", "got torch.int64"),
            (torch.zeros(n, channels, *size, device="meta"), ValueError, "expected to be on cpu", "got meta"),
        ):
            yield Case(run(**{name: value}), error, f"{name}:", expected, got)


def pyramids():
    call = of(PCDAlignment, dict(num_feat=8, deformable_groups=4))
    yield from integer(call, "num_feat")
    yield from integer(call, "deformable_groups")
    yield from choices(call, ("dtype",))
    yield Case(call(deformable_groups=3), ValueError, "num_feat:", "a multiple of deformable_groups", "got 8 and 3")

    def maps(*sides, channels=8, height=None):
        return [torch.zeros(2, channels, height or side, side) for side in sides]

    good, layer = maps(16, 8, 4), PCDAlignment(8, 4)
    for name, other in (("nbr_feat_l", "ref_feat_l"), ("ref_feat_l", "nbr_feat_l")):
        run = partial(layer, **{other: good})
        for given, got in ((good[:2], "got 2"), (good[0], "got Tensor"), (None, "got NoneType")):
            yield Case(partial(run, **{name: given}), ValueError, f"{name}:", "expected a list of three maps", got)
        for given, place, error, expected, got in (
            ([*good[:2], [0]], 2, TypeError, "expected a tensor [N, 8, H, W]", "got list"),
            ([maps(16, channels=7)[0], *good[1:]], 0, ValueError, "expected [N, 8, H, W]", "got [2, 7, 16, 16]"),
            ([good[0], good[1].double(), good[2]], 1, TypeError, "expected torch.float32", "got torch.float64"),
            ([good[0], *maps(8, 5)], 2, ValueError, "expected [2, 8, 4, 4]", "got [2, 8, 5, 5]"),
        ):
            yield Case(partial(run, **{name: given}), error, f"{name}[{place}]:", expected, got)
    odd = partial(layer, maps(18, 9, 4), good)
    yield Case(odd, ValueError, "nbr_feat_l[0]:", "sides that are multiples of 4", "got 18 x 18")
    small = partial(layer, good, maps(8, 4, 2))
    yield Case(small, ValueError, "ref_feat_l[0]:", "expected [2, 8, 16, 16] beside", "got [2, 8, 8, 8]")


CASES = [*packs(), *second_order(), *pyramids()]
