"""Deformable aggregation, and the layers on it, against scalar loops, at arguments drawn at random; float64."""

import math
import random

import pytest
import torch
from aggregation_loops import loops
from plain_aggregation import close, drawn, plain_dcnv3, plain_dcnv4

from dcn_plugin.layers import DCNv3, DCNv4
from dcn_plugin.ops import deform_aggregate2d


def clear_of_borders(offset, scale):
    """Move offsets so that no sample lies near a whole pixel, where two linear pieces meet and differences mislead.

    Places without offsets are whole pixels, or fractions of one that `scale` makes of taps: multiples of 1/4 here.
    """
    steps = (offset * scale * 4).floor() + 0.2 + 0.6 * torch.rand_like(offset)
    return steps / 4 / scale


def random_call(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kernel = draw.choice([(1, 1), (2, 2), (3, 3), (3, 3), (5, 5), (2, 3), (3, 1), (4, 3)])
    stride, dilation = [[draw.choice([1, 1, 2, 3]) for _ in range(2)] for _ in range(2)]
    padding = [draw.choice([0, 1, 2]) for _ in range(draw.choice([2, 4]))]
    remove_center = kernel in ((3, 3), (5, 5)) and draw.random() < 0.4
    scale = draw.choice([0.25, 0.5, 1.0, 1.0, 1.5, 2.0])
    groups, each = draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    pads = padding if len(padding) == 4 else padding * 2
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - pads[i] - pads[2 + i]) for i in (0, 1)]
    size = [side + draw.randint(0, 3) for side in least]
    outputs = [(size[i] + pads[i] + pads[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    outputs_kept = (draw.choice([1, 2]), *outputs, groups)
    taps = kernel[0] * kernel[1] - remove_center
    value = torch.randn(outputs_kept[0], *size, groups * each, dtype=torch.float64)
    offset = torch.randn(*outputs_kept, taps, 2, dtype=torch.float64) * draw.choice([0.3, 1.5, 6.0])
    offset = clear_of_borders(offset, scale)
    form = draw.choice(["none", "apart", "apart", "packed", "packed"])
    tensors = dict(value=value, offset=offset)
    if form == "apart":
        tensors["weight"] = torch.randn(*outputs_kept, taps, dtype=torch.float64)
    elif form == "packed":
        weight = torch.randn(*outputs_kept, taps, dtype=torch.float64)
        tensors["offset"] = torch.cat((offset.flatten(4), weight), -1)
    options = dict(
        kernel_size=kernel, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation),
        offset_scale=scale, remove_center=remove_center, softmax=form != "none" and draw.random() < 0.5,
        official_order=draw.random() < 0.5,
    )  # fmt: skip
    return tensors, options


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients_are_those_of_the_loops(seed):
    """Gradients along two directions each, by central differences of the loops."""
    tensors, options = random_call(seed)
    given = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = deform_aggregate2d(**given, **options)
    truth = loops(**tensors, **options)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10, msg=f"{options}")
    along = torch.randn_like(truth)
    out.backward(along)
    step = 1e-5
    for name, tensor in tensors.items():
        for _ in range(2):
            way = torch.randn_like(tensor)
            ends = [
                (loops(**tensors | {name: tensor + sign * step * way}, **options) * along).sum() for sign in (1, -1)
            ]
            expected = float(ends[0] - ends[1]) / (2 * step)
            found = float((given[name].grad * way).sum())
            size = float((given[name].grad * way).norm()) + 1
            assert math.isclose(found, expected, abs_tol=1e-6 * size), (name, options)


def test_the_drawn_calls_are_of_every_kind():
    """Else the test above would pass without what it is for."""
    calls = [random_call(seed) for seed in range(40)]
    for kind in (
        lambda t, o: t["offset"].dim() == 5, lambda t, o: len(t) == 2 and t["offset"].dim() == 6,
        lambda t, o: o["softmax"], lambda t, o: o["remove_center"], lambda t, o: o["official_order"],
        lambda t, o: o["offset_scale"] not in (1.0,), lambda t, o: max(o["stride"]) > 1,
        lambda t, o: max(o["dilation"]) > 1, lambda t, o: len(o["padding"]) == 4, lambda t, o: 2 in o["kernel_size"],
        lambda t, o: t["offset"].shape[3] > 1, lambda t, o: t["offset"].dim() == 5 and o["remove_center"],
    ):  # fmt: skip
        assert 2 <= sum(bool(kind(*call)) for call in calls) < 40


def random_layer(kind, seed):
    draw = random.Random(seed)
    kernel = draw.choice([1, 2, 3, 3, 4, 5])
    dilation = draw.choice([1, 1, 2, 3])
    options = dict(
        channels=6, kernel_size=kernel, stride=draw.choice([1, 1, 2, 3]), dilation=dilation,
        pad=draw.randint(0, dilation * (kernel - 1) // 2), group=draw.choice([1, 2, 3, 6]),
        offset_scale=draw.choice([0.5, 1.0, 1.3, 2.0]), center_feature_scale=draw.random() < 0.4,
        remove_center=kernel in (3, 5) and draw.random() < 0.4, dw_kernel_size=draw.choice([1, 3, 5]),
    )  # fmt: skip
    if kind is DCNv4:
        options |= dict(output_bias=draw.random() < 0.5, without_pointwise=draw.random() < 0.3)
        options["dw_kernel_size"] = draw.choice([None, 3])
    least = dilation * (kernel - 1) + 1 - 2 * options["pad"]
    return drawn(kind(**options), seed), (least + draw.randint(0, 5), least + draw.randint(1, 6))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_layers_and_their_gradients_are_the_formulas(kind, seed):
    """Gradients of the input and of every parameter; the formulas sample by loops over taps on torch's sampler."""
    layer, size = random_layer(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *size, 6, dtype=torch.float64, generator=generator)
    if kind is DCNv4:
        x = x.flatten(1, 2)
    given, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    state = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    if kind is DCNv3:
        out, truth = layer(given), plain_dcnv3(layer, plain, state)
    else:
        out, truth = layer(given, size), plain_dcnv4(layer, plain, size, state)
    close(out, truth)
    along = torch.randn(truth.shape, dtype=torch.float64, generator=generator)
    out.backward(along)
    truth.backward(along)
    close(given.grad, plain.grad)
    for name, parameter in layer.named_parameters():
        wanted = state[name].grad
        assert (parameter.grad - wanted).abs().max() <= 1e-9 * wanted.abs().max() + 1e-12, name
