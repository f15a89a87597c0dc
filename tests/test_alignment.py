"""Alignment of video frames: official names, formulas in plain PyTorch, flows, and all that knows layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from onnx_checks import assert_close, by_definition, needs_runtime
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcn_plugin import DCNv2, DCNv2Pack, PCDAlignment, SecondOrderDeformableAlignment, load_checkpoint, reference
from dcn_plugin.convert import convert
from dcn_plugin.flops import ptflops_hooks
from dcn_plugin.layers import offset_parameters, reset_offsets, sampling_layers
from dcn_plugin.visualize import record


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, scale=0.3):
    """The module with drawn parameters, so that samples have moved."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = scale * rand(*parameter.shape, seed=number).to(parameter)
    return module.eval()


def second_order(**options):
    return filled(SecondOrderDeformableAlignment(8, 4, 3, padding=1, offset_groups=4, **options))


MAPS = rand(2, 8, 9, 10), rand(2, 12, 9, 10, seed=1), 2 * rand(2, 2, 9, 10, seed=2), 3 * rand(2, 2, 9, 10, seed=3)
PYRAMIDS = [[rand(2, 8, 16 // s, 12 // s, seed=seed + s) for s in (1, 2, 4)] for seed in (0, 10)]


def pyramids(scale=1):
    return [[map.to(torch.float32) * scale for map in maps] for maps in PYRAMIDS]


# -- names and shapes of BasicSR's modules -----------------------------------------------------------------------------


def conv_keys(name, outputs, inputs):
    return {f"{name}.weight": [outputs, inputs, 3, 3], f"{name}.bias": [outputs]}


def shapes(module):
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def pack_keys(name, channels, groups):
    own = {f"{name}{kind}": size for kind, size in (("weight", [channels, channels, 3, 3]), ("bias", [channels]))}
    return own | conv_keys(f"{name}conv_offset", 27 * groups, channels)


def test_state_dicts_are_those_of_basicsr():
    pack = DCNv2Pack(64, 64, 3, padding=1, deformable_groups=8)
    assert shapes(pack) == pack_keys("", 64, 8)

    wanted = conv_keys("cas_offset_conv1", 64, 128) | conv_keys("cas_offset_conv2", 64, 64)
    wanted |= pack_keys("cas_dcnpack.", 64, 8)
    for level in ("l1", "l2", "l3"):
        wanted |= conv_keys(f"offset_conv1.{level}", 64, 128) | pack_keys(f"dcn_pack.{level}.", 64, 8)
        wanted |= conv_keys(f"offset_conv2.{level}", 64, 64 if level == "l3" else 128)
    for level in ("l1", "l2"):
        wanted |= conv_keys(f"offset_conv3.{level}", 64, 64) | conv_keys(f"feat_conv.{level}", 64, 128)
    assert shapes(PCDAlignment()) == shapes(PCDAlignment(64, 8)) == wanted
    # torch loads by name, but optimizers by order: BasicSR's goes from the smallest map up.
    assert list(PCDAlignment().state_dict())[::2][:3] == [
        f"offset_conv1.{level}.weight" for level in ("l3", "l2", "l1")
    ]

    second = SecondOrderDeformableAlignment(128, 64, 3, padding=1, deformable_groups=16, max_residue_magnitude=10)
    wanted = {"weight": [64, 128, 3, 3], "bias": [64]}
    for step, (outputs, inputs) in {0: (64, 196), 2: (64, 64), 4: (64, 64), 6: (432, 64)}.items():
        wanted |= conv_keys(f"conv_offset.{step}", outputs, inputs)
    assert shapes(second) == wanted
    assert shapes(SecondOrderDeformableAlignment(128, 64, 3)) == wanted


@pytest.mark.parametrize("name", ["offset_groups", "deformable_groups", "deform_groups"])
def test_groups_have_the_names_of_basicsr_and_mmagic(name):
    assert DCNv2Pack(8, 8, 3, **{name: 4}).offset_groups == 4
    assert SecondOrderDeformableAlignment(8, 4, 3, **{name: 2}).offset_groups == 2


def test_files_of_official_models_load(tmp_path):
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.pcd_align = PCDAlignment(8, 4)
            self.deform_align = nn.ModuleDict(dict(backward_1=second_order()))

    state = filled(Video()).state_dict()
    torch.save({"params": state}, tmp_path / "BasicSR.pth")
    torch.save({"state_dict": {f"generator.{k}": v for k, v in state.items()}}, tmp_path / "mmagic.pth")
    for file in ("BasicSR.pth", "mmagic.pth"):
        model = Video()
        report = load_checkpoint(model, tmp_path / file)
        assert not report.renamed and len(report.loaded) == len(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# -- formulas ----------------------------------------------------------------------------------------------------------


def sampled(x, offset, mask, weight, bias):
    """`deform_conv2d` of a 3x3 kernel with padding 1, tap by tap through torch's own sampler."""
    n, channels, height, width = x.shape
    groups = offset.shape[1] // 18
    moves, masks = offset.unflatten(1, (groups, 9, 2)), mask.unflatten(1, (groups, 9))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = x.new_zeros(n, len(weight), height, width)
    for group, part in enumerate(x.chunk(groups, 1)):
        filters = weight.chunk(groups, 1)[group]
        for tap in range(9):
            y = rows + tap // 3 - 1 + moves[:, group, tap, 0]
            x_ = columns + tap % 3 - 1 + moves[:, group, tap, 1]
            grid = torch.stack((2 * x_ / (width - 1) - 1, 2 * y / (height - 1) - 1), -1)
            values = F.grid_sample(part, grid, align_corners=True) * masks[:, group, tap, None]
            out = out + torch.einsum("nchw,oc->nohw", values, filters[:, :, tap // 3, tap % 3])
    return out + bias[:, None, None]


def packed(state, name, x, feat):
    """BasicSR's DCNv2Pack: thirds of what another map predicts are two of offsets and one of mask logits."""
    raw = F.conv2d(feat, state[f"{name}conv_offset.weight"], state[f"{name}conv_offset.bias"], padding=1)
    first, second, logits = raw.chunk(3, 1)
    return sampled(x, torch.cat((first, second), 1), logits.sigmoid(), state[f"{name}weight"], state[f"{name}bias"])


@pytest.mark.parametrize("groups", [1, 4])
def test_a_pack_reads_offsets_and_masks_from_another_map(groups):
    layer = filled(DCNv2Pack(8, 6, 3, padding=1, deformable_groups=groups))
    x, feat = rand(2, 8, 9, 10), rand(2, 8, 9, 10, seed=1)
    expected = packed(layer.state_dict(), "", x, feat)
    torch.testing.assert_close(layer(x, feat), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, feat=feat), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x, x), expected, atol=0.1)
    fresh = DCNv2Pack(8, 6, 3, padding=1)
    half = F.conv2d(x, fresh.weight, padding=1) / 2 + fresh.bias[:, None, None]
    torch.testing.assert_close(fresh(x, feat), half, rtol=1e-4, atol=1e-5)


def test_second_order_is_a_bounded_residual_around_two_flows():
    layer, (x, around, flow_1, flow_2) = second_order(max_residue_magnitude=2.5), MAPS
    state, feature = layer.state_dict(), torch.cat((around, flow_1, flow_2), 1)
    for step in (0, 2, 4, 6):
        feature = F.conv2d(feature, state[f"conv_offset.{step}.weight"], state[f"conv_offset.{step}.bias"], padding=1)
        feature = F.leaky_relu(feature, 0.1) if step < 6 else feature
    raw, logits = feature[:, :72], feature[:, 72:]
    offset = 2.5 * raw.tanh()
    for number in range(72):  # pairs (y, x): even ones are y, the second number of a flow
        flow = flow_1 if number < 36 else flow_2
        offset[:, number] += flow[:, 1 - number % 2]
    found, mask = layer.offsets(*MAPS)
    torch.testing.assert_close(found, offset, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask, logits.sigmoid(), rtol=1e-4, atol=1e-4)
    expected = sampled(x, offset, logits.sigmoid(), layer.weight, layer.bias)
    torch.testing.assert_close(layer(*MAPS), expected, rtol=1e-3, atol=1e-3)
    named = layer(x, extra_feat=around, flow_1=flow_1, flow_2=flow_2)
    assert torch.equal(named, layer(*MAPS)) and not torch.allclose(layer(x, around, flow_2, flow_1), expected, atol=0.1)


@pytest.mark.parametrize("first, second", [((0, 0), (0, 0)), ((2, 0), (0, -1)), ((-1, 3), (1, 1))])
def test_whole_flows_shift_exactly(first, second):
    """Flows are (x, y): from a pixel of this frame to where it was. Small whole numbers leave nothing to round."""
    layer = SecondOrderDeformableAlignment(8, 4, 3, padding=1, deformable_groups=2)
    draw = torch.Generator().manual_seed(0)
    layer.weight.data = torch.randint(-4, 5, layer.weight.shape, generator=draw).float()
    layer.bias.data.zero_()
    x = torch.randint(-8, 9, (1, 8, 9, 10), generator=draw).float()
    flows = [torch.tensor(flow).float().view(1, 2, 1, 1).expand(1, 2, 9, 10) for flow in (first, second)]
    expected = 0
    for part, filters, (right, down) in zip(x.chunk(2, 1), layer.weight.chunk(2, 1), (first, second), strict=True):
        wide = F.conv2d(F.pad(part, [5] * 4), filters)  # pixel p of the map is at p + 4
        expected = expected + wide[:, :, 4 + down : 13 + down, 4 + right : 14 + right] / 2
    assert torch.equal(layer(x, rand(1, 12, 9, 10), *flows), expected)


def test_other_kernels_keep_the_size():
    layer = filled(
        SecondOrderDeformableAlignment(8, 4, (5, 2), padding="same", dilation=(1, 2), offset_groups=2, groups=2)
    )
    assert layer.conv_offset[-1].out_channels == 3 * 2 * 10
    offset, mask = layer.offsets(*MAPS)
    expected = reference.deform_conv2d(MAPS[0], offset, layer.weight, layer.bias, 1, layer.padding4, (1, 2), mask)
    assert expected.shape == (2, 4, 9, 10)
    torch.testing.assert_close(layer(*MAPS), expected, rtol=1e-4, atol=1e-4)


def pyramid_by_hand(state, neighbours, references):
    """BasicSR's forward, from the tensors of a file."""

    def conv(name, *maps):
        return F.conv2d(torch.cat(maps, 1), state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def active(x):
        return torch.where(x > 0, x, 0.1 * x)

    def larger(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    offset = active(conv("offset_conv2.l3", active(conv("offset_conv1.l3", neighbours[2], references[2]))))
    feat = active(packed(state, "dcn_pack.l3.", neighbours[2], offset))
    for level in (2, 1):
        here = active(conv(f"offset_conv1.l{level}", neighbours[level - 1], references[level - 1]))
        here = active(conv(f"offset_conv2.l{level}", here, larger(offset) * 2))
        offset = active(conv(f"offset_conv3.l{level}", here))
        aligned = packed(state, f"dcn_pack.l{level}.", neighbours[level - 1], offset)
        feat = conv(f"feat_conv.l{level}", aligned, larger(feat))
        feat = active(feat) if level == 2 else feat
    offset = active(conv("cas_offset_conv2", active(conv("cas_offset_conv1", feat, references[0]))))
    return active(packed(state, "cas_dcnpack.", feat, offset))


def test_a_pyramid_is_edvrs():
    layer = filled(PCDAlignment(8, 4), 0.15)
    before = copy.deepcopy(PYRAMIDS)
    found, expected = layer(*PYRAMIDS), pyramid_by_hand(layer.state_dict(), *PYRAMIDS)
    assert_close(found.detach(), expected, 1e-5)
    assert all(
        torch.equal(a, b) for maps, were in zip(PYRAMIDS, before, strict=True) for a, b in zip(maps, were, strict=True)
    )
    assert not torch.allclose(layer(*PYRAMIDS[::-1]), expected, atol=0.1 * float(expected.abs().max()))


# -- gradients and types -----------------------------------------------------------------------------------------------


def test_gradients_reach_frames_maps_and_flows():
    layer = filled(
        SecondOrderDeformableAlignment(2, 1, 3, padding=1, offset_groups=2, max_residue_magnitude=1)
    ).double()
    given = [rand(1, c, 3, 3, seed=c).double().requires_grad_() for c in (2, 3)]
    given += [rand(1, 2, 3, 3, seed=seed).double().requires_grad_() for seed in (7, 8)]
    assert torch.autograd.gradcheck(layer, given, atol=1e-4)
    assert torch.autograd.gradgradcheck(layer, given, atol=1e-4)
    pack = filled(DCNv2Pack(2, 1, 3, padding=1)).double()
    assert torch.autograd.gradcheck(pack, given[:1] + [rand(1, 2, 3, 3).double().requires_grad_()], atol=1e-4)


def test_gradients_reach_every_level_and_parameter():
    layer, maps = PCDAlignment(8, 4), pyramids()
    for pyramid in maps:
        for map in pyramid:
            map.requires_grad_()
    filled(layer, 0.15)(*maps).square().sum().backward()
    assert all(map.grad.any() for pyramid in maps for map in pyramid)
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flows_stay_float32_beside_half_maps(dtype):
    """100.3 pixels would be 100.5 in bfloat16."""
    layer = SecondOrderDeformableAlignment(8, 4, 3, padding=1, offset_groups=4).to(dtype)
    given = [map.to(dtype).requires_grad_() for map in MAPS[:2]]
    given += [torch.full((2, 2, 9, 10), value, requires_grad=True) for value in (100.3, -0.7)]
    offset, mask = layer.offsets(*given)
    assert offset.dtype == torch.float32 and mask.dtype == dtype
    assert (offset[:, :36] == torch.tensor(100.3)).all() and (offset[:, 36:] == torch.tensor(-0.7)).all()
    out = layer(*given)
    out.float().sum().backward()
    assert out.dtype == dtype and [map.grad.dtype for map in given] == [dtype, dtype, torch.float32, torch.float32]
    assert given[3].grad.any() and given[0].grad.any()


def test_half_precision_computes_the_same():
    layer = second_order(max_residue_magnitude=1).to(torch.bfloat16)
    rounded = [map.to(torch.bfloat16) for map in MAPS]
    expected = copy.deepcopy(layer).float()(*(map.float() for map in rounded))
    for flows in (rounded[2:], [flow.float() for flow in rounded[2:]]):
        found = layer(*rounded[:2], *flows)
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(layer).float()(*MAPS)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_an_empty_batch():
    out = second_order()(*(map[:0] for map in MAPS))
    assert out.shape == (0, 4, 9, 10)
    out.sum().backward()
    assert filled(PCDAlignment(8, 4))(*([map[:0] for map in maps] for maps in PYRAMIDS)).shape == (0, 8, 16, 12)


# -- what knows layers -------------------------------------------------------------------------------------------------


class Aligned(nn.Module):
    """One tensor in, so that pictures and graphs may call it: a frame's features, and alignments of two kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.around, self.flow = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.second, self.pack = second_order(max_residue_magnitude=2), DCNv2Pack(8, 4, 3, padding=1, offset_groups=2)
        self.pyramid = PCDAlignment(8, 2)

    def forward(self, image):
        x = self.stem(image)
        maps = [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]
        both = self.second(x, self.around(x), self.flow(x), -self.flow(x)) + self.pack(x, x.square())
        return torch.cat((both, self.pyramid(maps, [map.flip(0) for map in maps])), 1)


IMAGE = rand(2, 3, 12, 16, seed=5)
NAMES = ["second", "pack", *(f"pyramid.dcn_pack.{level}" for level in ("l3", "l2", "l1")), "pyramid.cas_dcnpack"]


def test_rates_and_fresh_starts():
    model = filled(Aligned(), 0.1)
    rates = offset_parameters(model)
    steps = [f"second.conv_offset.{step}" for step in (0, 2, 4, 6)]
    predicting = steps + [f"{name}.conv_offset" for name in NAMES[1:]]
    assert rates == {f"{name}.{kind}": 1.0 for name in predicting for kind in ("weight", "bias")}
    reset_offsets(model)
    maps = [map[:, :8] for map in MAPS[:1]] + list(MAPS[1:])
    offset, mask = model.second.offsets(*maps)
    assert torch.equal(offset[:, :2], MAPS[2].flip(1)) and torch.equal(offset[:, -2:], MAPS[3].flip(1))
    assert (mask == 0.5).all() and model.second.conv_offset[0].weight.any()
    assert not model.pyramid.cas_dcnpack.conv_offset.weight.any()


def test_hooks_and_pictures_see_each_alignment():
    model = filled(Aligned(), 0.1)
    assert sorted(sampling_layers(model)) == sorted(NAMES)
    items = {item.name: item for item in record(model, IMAGE)}
    assert items.keys() == set(NAMES)
    x = model.stem(IMAGE)
    offset, mask = model.second.offsets(x, model.around(x), model.flow(x), -model.flow(x))
    torch.testing.assert_close(items["second"].offset.flatten(1, 3), offset)
    torch.testing.assert_close(items["second"].mask.flatten(1, 2), mask)
    assert items["pyramid.dcn_pack.l3"].input_size == (3, 4) and items["second"].grid == ((1.0, 0.0), (1.0, 0.0))
    pytest.importorskip("matplotlib")
    from dcn_plugin.visualize import offset_field, sampling_points

    assert sampling_points(model, IMAGE[0], layers=["second"]).axes[0].collections
    assert offset_field(model, IMAGE[0], "pack").axes


def test_what_it_costs():
    layer = second_order()
    positions, branch = 2 * 90, 9 * (16 * 4 + 4 * 4 + 4 * 4 + 4 * 108)
    wanted = positions * (4 * 8 * 9 + 4 * 9 * 8 + branch)  # products, four corners of each sample, what predicts
    with FlopCounterMode(display=False) as counter:
        out = layer(*MAPS)
    assert counter.get_total_flops() == 2 * wanted
    layer.__flops__ = 0
    ptflops_hooks()[SecondOrderDeformableAlignment](layer, MAPS, out)
    assert layer.__flops__ == wanted


def test_graphs():
    model = filled(Aligned(), 0.1)
    expected = model(IMAGE)
    traced = torch.fx.symbolic_trace(model)
    (node,) = [node for node in traced.graph.nodes if node.target == "second"]
    assert node.op == "call_module" and len(node.args) == 4
    exported = torch.export.export(model, (IMAGE,), strict=False).module()
    jitted = torch.jit.trace(model, IMAGE)
    for graph in (traced, exported, jitted, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(graph(IMAGE), expected, rtol=1e-5, atol=1e-5)
    for layer in (model.second, model.pack):  # then they are traced with what is inside
        layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGE), expected, rtol=1e-5, atol=1e-5)


def exported(name, tmp_path, small):
    """A file, what it is called with, what it has to give; onnx's own interpreter takes a second for a few pixels."""
    pytest.importorskip("onnxscript")
    from dcn_plugin.export.onnx import export_onnx

    cut = (lambda map: map[:1, ..., :4, :4]) if small else (lambda map: map)
    if name == "pyramid":
        layer = filled(PCDAlignment(8, 2), 0.15)
        given = tuple(PYRAMIDS)
    elif name == "pack":
        layer = filled(DCNv2Pack(8, 6, 3, padding=1, offset_groups=2))
        given = (cut(MAPS[0]), cut(rand(2, 8, 9, 10, seed=6)))
    else:
        layer, given = second_order(max_residue_magnitude=2), tuple(map(cut, MAPS))
    return export_onnx(layer, given, tmp_path / "layer.onnx"), given, layer(*given).detach()


each_export = pytest.mark.parametrize("name", ["pack", "second order", "pyramid"])


# Of the pyramid it would take half a minute, and divide by zero on maps of one pixel.
@pytest.mark.parametrize("name", ["pack", "second order"])
def test_onnx_by_definition(tmp_path, name):
    path, given, expected = exported(name, tmp_path, small=True)
    assert_close(by_definition(path, tuple(torch.utils._pytree.tree_leaves(given))), expected, 1e-4)


@needs_runtime
@each_export
def test_onnxruntime_runs_them(tmp_path, name):
    pytest.importorskip("onnxruntime")
    path, given, expected = exported(name, tmp_path, small=False)
    from dcn_plugin.export.onnx import run_onnx

    (found,) = run_onnx(path, given)
    assert_close(found, expected, 1e-4)


def test_copies_and_files_hold_them(tmp_path):
    model = filled(Aligned(), 0.1)
    expected = model(IMAGE)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(IMAGE), expected) and repr(other) == repr(model)
    assert "max_residue_magnitude=2" in repr(model) and "num_feat=8, deformable_groups=2" in repr(model)
    assert not DCNv2Pack(4, 4, 3).drop_in and isinstance(model.second, DCNv2)


@pytest.mark.parametrize("kind", ["DCNv2Pack", "SecondOrderDeformableAlignment", DCNv2Pack])
def test_no_convolution_is_replaced_by_what_needs_a_second_map(kind):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(ValueError, match="expected a type out of .*which cannot stand in for a convolution") as caught:
        convert(model, dict(match="*", layer=dict(type=kind)))
    offered = str(caught.value).partition("out of ")[2].partition(", got")[0].split(", ")
    assert "DCNv2" in offered and not {"DCNv2Pack", "SecondOrderDeformableAlignment"} & {*offered}
    assert type(model[0]) is nn.Conv2d


def test_from_conv_keeps_the_weight():
    conv = nn.Conv2d(8, 4, 3, padding=1)
    for layer, given in (
        (DCNv2Pack.from_conv(conv, offset_groups=2), MAPS[:1] * 2),
        (
            SecondOrderDeformableAlignment.from_conv(conv, deform_groups=2),
            (*MAPS[:2], *(0 * flow for flow in MAPS[2:])),
        ),
    ):
        assert layer.weight is conv.weight and layer.offset_groups == 2
        half = F.conv2d(MAPS[0], conv.weight, padding=1) / 2 + conv.bias[:, None, None]
        torch.testing.assert_close(layer(*given), half, rtol=1e-4, atol=1e-5)
