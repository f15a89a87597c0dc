"""Our convolutions as torchvision's module and as grid_sample, for tools that do not know our operator; torch alone."""

import itertools

import pytest
import torch
from torch import nn

from dcn_plugin import reference
from dcn_plugin.export.grid_sample import grid_sample_decompositions
from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d, OffsetPredictor, SamplingConv
from dcn_plugin.ops import deform_conv2d

torchvision = pytest.importorskip("torchvision")
from dcn_plugin.export.torchvision import to_torchvision  # noqa: E402

UNEVEN = dict(stride=(2, 1), padding=(0, 1, 2, 3), dilation=(1, 2))
LAYERS = {
    "plain": lambda: DCNv2(12, 8, 3, padding=1),
    "no mask": lambda: DCNv1(12, 8, 3, padding=1, bias=False),
    "bounded": lambda: DCNv1(12, 8, 3, padding=1, offset_bound=0.5),
    "sigmoid": lambda: DCNv2(12, 8, 3, padding=1, mask_activation="sigmoid"),
    "uneven": lambda: DCNv2(12, 8, (2, 3), groups=2, **UNEVEN),
    "same": lambda: DCNv1(12, 8, (4, 2), padding="same"),
    "offset groups": lambda: DCNv2(12, 8, 3, padding=1, offset_groups=3),
    "both groups": lambda: DCNv2(12, 8, 3, padding=1, groups=2, offset_groups=3, bias=False),
    "depthwise": lambda: DCNv2(12, 12, 3, padding=1, groups=12, offset_groups=2),
}


def moved(model):
    """Layers that sample elsewhere, with numbers that are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Scaled(SamplingConv):
    """A layer of another kind, with a `forward` of its own: taps that a predicted factor takes from the middle."""

    offset_branches = {"scale": 1.0}

    def __init__(self, *args, after=None, **options):
        super().__init__(*args, **options)
        self.scale = OffsetPredictor(self.in_channels, 1, self.kernel_size, padding=self.padding4[:2])
        self.after = after

    def offsets(self, x):
        taps = self.window.taps().to(x)
        return (self.scale(x)[:, :, None, None] * taps[..., None, None]).flatten(1, 3), None

    def forward(self, x):
        out = deform_conv2d(x, self.offsets(x)[0], self.weight, self.bias, self.stride, self.padding4, self.dilation)
        return out if self.after is None else self.after(out)


@pytest.mark.parametrize("one_group", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_torchvisions_module_in_a_layers_place_gives_its_outputs(name, one_group):
    layer, x = moved(LAYERS[name]()), draw(2, 12, 9, 11)
    model = nn.Sequential(layer, nn.ReLU())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = to_torchvision(model, one_group=one_group)
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)
    convs = [module for module in theirs.modules() if type(module) is torchvision.ops.DeformConv2d]
    traced = torch.jit.trace(theirs, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "torchvision::deform_conv2d" in kinds and not any(kind.startswith("dcn_plugin") for kind in kinds)
    # Runs of channels with one group and one offset group each.
    edges = {i * 12 // count for count in (layer.groups, layer.offset_groups) for i in range(count)}
    assert len(convs) == (len(edges) if one_group else 1)
    if one_group:
        assert {conv.groups for conv in convs} == {1}
    assert type(model[0]) is type(layer) and all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_offsets_that_come_with_the_call_go_on_to_torchvision():
    layer = moved(DeformConv2d(12, 8, 3, padding=1))
    x, offset, mask = draw(1, 12, 6, 7), draw(1, 4 * 18, 6, 7), draw(1, 4 * 9, 6, 7)
    theirs = to_torchvision(layer)
    torch.testing.assert_close(theirs(x, offset, mask), layer(x, offset, mask), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(x, offset), layer(x, offset), rtol=0, atol=1e-5)


def test_a_layer_of_another_kind_takes_part_by_its_contract():
    layer, x = moved(Scaled(4, 6, 3, padding=1)), draw(1, 4, 7, 8)
    theirs = to_torchvision(nn.ModuleDict(dict(a=layer)))["a"]
    torch.testing.assert_close(theirs(x), layer(x), rtol=0, atol=1e-5)
    for after in (torch.relu, lambda out: out[..., 1:], lambda out: out.no_such_thing):
        with pytest.raises(NotImplementedError, match=r"expected layers whose `forward` convolves .*Scaled at '0'"):
            to_torchvision(nn.Sequential(Scaled(4, 6, 3, after=after)))


@pytest.mark.parametrize("factor", [0, 0.5, 0.99])
@pytest.mark.parametrize("start", [lambda layer: layer, moved], ids=["fresh", "moved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_samples_elsewhere_than_it_says_is_refused(factor, start, dtype):
    """Fresh, both sample at the taps: what differs is seen with another branch alone."""

    class Other(Scaled):
        def forward(self, x):
            offset = factor * self.offsets(x)[0]
            return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding4, self.dilation)

    layer = start(Other(4, 6, 3, padding=1)).to(dtype)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(NotImplementedError, match="got Other, which computes something else"):
        to_torchvision(layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    theirs = to_torchvision(start(Scaled(4, 6, 3, padding=1)).to(dtype))
    drawn = {key.removeprefix("layer."): value for key, value in theirs.state_dict().items() if "scale" in key}
    assert drawn and all(torch.equal(value, before[key]) or start is not moved for key, value in drawn.items())


def test_a_layer_in_two_places_stays_one():
    layer = DCNv1(4, 4, 3, padding=1)
    theirs = to_torchvision(nn.Sequential(layer, nn.ReLU(), layer))
    assert theirs[0] is theirs[2] and not isinstance(theirs[0], DCNv1)


@pytest.mark.parametrize("groups, offset_groups, with_mask", list(itertools.product((1, 2), (1, 3), (True, False))))
def test_grid_sample_computes_the_definition(groups, offset_groups, with_mask):
    x, weight, bias = draw(2, 12, 8, 13), draw(4, 12 // groups, 3, 2), draw(4) if with_mask else None
    out_h, out_w = 4, 15
    offset = draw(2, offset_groups * 12, out_h, out_w) * 3
    offset[:, ::2] = offset[:, ::2].round()  # on pixels, and so on each border
    offset[0, 0, 0, :2], offset[0, 1, 1, 0] = torch.inf, -torch.inf
    mask = draw(2, offset_groups * 6, out_h, out_w) if with_mask else None
    table = grid_sample_decompositions()
    given = (x, offset, weight, bias, mask, [2, 1], [0, 1, 2, 3], [1, 2])
    found = table[torch.ops.dcn_plugin.deform_conv2d.default](*given)
    wanted = reference.deform_conv2d(x, offset, weight, bias, (2, 1), (0, 1, 2, 3), (1, 2), mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_program_of_grid_sample_has_core_operators_alone_and_dynamic_sizes():
    layer, size = moved(DCNv2(4, 6, 3, padding=1, offset_groups=2)), torch.export.Dim
    dynamic = ({0: size("batch", max=8), 2: size("height", min=8, max=64)},)
    program = torch.export.export(layer, (draw(2, 4, 12, 10),), dynamic_shapes=dynamic)
    program = program.run_decompositions({**torch.export.default_decompositions(), **grid_sample_decompositions()})
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    names = {str(target) for target in targets}
    assert {target.namespace for target in targets} == {"aten"}
    assert "aten.grid_sampler_2d.default" in names and not any("gather" in name or "index" in name for name in names)
    for shape in ((1, 4, 9, 10), (5, 4, 64, 10)):
        torch.testing.assert_close(program.module()(draw(*shape)), layer(draw(*shape)), rtol=0, atol=1e-4)


def test_half_precision_is_computed_in_float32():
    x, offset, weight = (t.bfloat16() for t in (draw(1, 4, 9, 9), draw(1, 18, 9, 9), draw(4, 4, 3, 3)))
    call = grid_sample_decompositions()[torch.ops.dcn_plugin.deform_conv2d.default]
    found = call(x, offset, weight, None, None, [1, 1], [1, 1, 1, 1], [1, 1])
    wanted = reference.deform_conv2d(x, offset, weight, padding=1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)


class Named(nn.Module):
    """Calls of layers with names, as of torchvision's."""

    def __init__(self):
        super().__init__()
        self.given, self.other = DeformConv2d(4, 6, 3, padding=1), DCNv2(4, 6, 3, padding=1, offset_channels=5)
        nn.init.normal_(self.other.conv_offset.weight, std=0.1)

    def forward(self, x, offset, mask, feature):
        return self.given(x, offset=offset, mask=mask) + self.other(x, feature=feature)


@pytest.mark.parametrize("one_group", [False, True])
def test_layers_may_be_called_with_names(one_group):
    model = Named().eval()
    given = torch.randn(1, 4, 7, 8), torch.randn(1, 18, 7, 8), torch.rand(1, 9, 7, 8), torch.randn(1, 5, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(to_torchvision(model, one_group=one_group)(*given), model(*given))
