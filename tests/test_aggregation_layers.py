"""DCNv3 and DCNv4: against formulas written again, as what others ask a layer to be, and in a convolution's place."""

import pytest
import torch
from plain_aggregation import close, drawn, plain_dcnv3, plain_dcnv4
from torch import nn

import dcn_plugin
from dcn_plugin.layers import DAttention, DCNv3, DCNv4, offset_parameters, reset_offsets
from dcn_plugin.visualize import dilation_by_layer, record

V3 = {
    "tiny": dict(),
    "stretched": dict(offset_scale=2.0),
    "huge": dict(dw_kernel_size=5, center_feature_scale=True),
    "without the centre": dict(remove_center=True, offset_scale=0.5),
    "wide": dict(kernel_size=5, pad=2, remove_center=1, center_feature_scale=True),
    "dilated": dict(dilation=2, pad=2),
    "strided": dict(stride=2, center_feature_scale=True),
    "unpadded": dict(pad=0, stride=2, dilation=2, offset_scale=1.5),
    "even": dict(kernel_size=2, dw_kernel_size=3, pad=0, dilation=3),
}
V4 = V3 | {
    "strided": dict(stride=2),
    "huge": dict(dw_kernel_size=5, center_feature_scale=True, output_bias=False),
    "bare": dict(without_pointwise=True),
}


@pytest.mark.parametrize("options", V3.values(), ids=V3)
def test_dcnv3_is_the_formula(options):
    layer = drawn(DCNv3(12, group=3, **options))
    x = torch.randn(2, 7, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = plain_dcnv3(layer, x)
    close(layer(x), wanted)
    first = drawn(DCNv3(12, group=3, channels_first=True, **options))
    close(first(x.permute(0, 3, 1, 2)), wanted.permute(0, 3, 1, 2))


@pytest.mark.parametrize("options", V4.values(), ids=V4)
def test_dcnv4_is_the_formula(options):
    layer = drawn(DCNv4(12, group=3, **options))
    x = torch.randn(2, 63, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = plain_dcnv4(layer, x, (7, 9))
    close(layer(x, (7, 9)), wanted)
    first = drawn(DCNv4(12, group=3, channels_first=True, **options))
    maps = x.reshape(2, 7, 9, 12).permute(0, 3, 1, 2)
    close(first(maps).flatten(2).transpose(1, 2), wanted)


# What others ask of the layers


def test_hooks_see_rows_of_pairs_y_x_and_pictures_the_stretched_grid():
    """Taps of the layers go column by column, as pairs (x, y); pictures are in pixels."""
    layer = DCNv3(4, group=2, offset_scale=2.0, channels_first=True)
    with torch.no_grad():
        layer.offset.bias.copy_(torch.arange(36.0) / 8)
        layer.mask.bias.copy_(torch.arange(18.0) / 8)
    (item,) = record(nn.Sequential(layer), torch.rand(1, 4, 9, 9))
    weights = layer.mask.bias.detach().reshape(2, 9).softmax(1)
    for group in range(2):
        for row in range(3):
            for column in range(3):
                number = group * 9 + column * 3 + row
                x, y = (2.0 * v for v in (2 * number / 8, (2 * number + 1) / 8))
                tap = row * 3 + column
                assert item.offset[0, group, tap, :, 4, 4].tolist() == pytest.approx([y, x])
                assert item.mask[0, group, tap, 4, 4] == pytest.approx(float(weights[group, column * 3 + row]))
                place = item.positions(4, 4, group)[tap].tolist()
                assert place == pytest.approx([4 + 2.0 * (row - 1) + y, 4 + 2.0 * (column - 1) + x])
    reset_offsets(layer)
    assert dilation_by_layer(nn.Sequential(layer), torch.rand(1, 4, 9, 9))["0"].unique().tolist() == [2.0]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("geometry", [dict(), dict(kernel_size=4, dilation=2, pad=2, dw_kernel_size=3, stride=3)])
def test_the_window_says_where_the_grid_lies(scale, geometry):
    layer = DCNv4(4, group=2, offset_scale=scale, channels_first=True, **geometry)
    height, width = layer(torch.rand(1, 4, 11, 13)).shape[2:]
    assert layer.window.output_size(11, 13) == (height, width)
    centre = layer.dilation * (layer.kernel_size - 1) // 2
    first, last = layer.window.taps()[[0, -1]].tolist()
    lie = [scale * (k * layer.dilation - centre) + centre - layer.pad for k in (0, layer.kernel_size - 1)]
    assert first == [lie[0]] * 2 and last == [lie[1]] * 2


def test_a_tap_that_is_removed_is_seen_without_weight():
    layer, seen = drawn(DCNv4(6, group=2, remove_center=True)), []
    x = torch.randn(1, 35, 6, dtype=torch.float64)
    with layer.register_sampling_hook(lambda layer, samples: seen.append(samples)):
        layer(x, (5, 7))
    (samples,) = seen
    offset, weight = layer.offsets(x, (5, 7))
    assert torch.equal(samples.offset, offset) and torch.equal(samples.mask, weight)
    assert samples.input.shape == (1, 6, 5, 7) and offset.shape == (1, 36, 5, 7) and weight.shape == (1, 18, 5, 7)
    taps = weight.unflatten(1, (2, 9)).abs().sum((0, 1, 3, 4))
    assert taps[4] == 0 and (taps > 0).sum() == 8


def test_rates_are_the_official_ones():
    """A tenth for every name that holds "offset" or "center_feature_scale_proj", and for no other."""
    for layer in (DCNv3(center_feature_scale=True), DCNv4(dw_kernel_size=3, center_feature_scale=True)):
        names = [n for n, _ in layer.named_parameters() if "offset" in n or "center_feature_scale_proj" in n]
        assert offset_parameters(layer) == dict.fromkeys(names, 0.1) and len(names) >= 4


def test_fresh_layers():
    x = torch.rand(1, 6, 7, 8)
    layer = DCNv3(8, group=2)
    inside = layer.input_proj(x)
    mean = nn.functional.avg_pool2d(inside.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.output_proj(mean))
    fourth = DCNv4(8, group=2)
    nn.init.normal_(fourth.output_proj.bias)
    found = fourth(x.flatten(1, 2), (6, 7))
    torch.testing.assert_close(found, fourth.output_proj.bias.expand_as(found))
    for made in (layer, fourth):
        for projection in (m for m in made.children() if type(m) is nn.Linear):
            assert projection.weight.abs().max() <= (6 / 16) ** 0.5 and projection.weight.std() > 0.2  # Xavier's
        drawn(layer)
        layer._reset_parameters()
        assert not any(
            p.any() for n, p in layer.named_parameters() if n.startswith(("offset.", "mask", "offset_mask."))
        )


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_memory_that_is_given_later_is_initialised(kind):
    options = dict(group=2, center_feature_scale=True, dw_kernel_size=3)
    layer = kind(8, device="meta", **options).to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    inner = layer.dw_conv[0] if kind is DCNv3 else layer.offset_mask_dw
    assert inner.weight.std() > 0.1 and inner.bias.any()


def test_half_precision_keeps_positions():
    """Values in bfloat16 beside float32 offsets: on a wide map their rounding would move samples by pixels."""
    layer = DCNv3(8, group=2)
    nn.init.constant_(layer.offset.bias, 0.3)
    x = torch.rand(1, 3, 600, 8)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    found = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_mmengine_builds_them():
    pytest.importorskip("mmengine")
    from dcn_plugin.registry import MODELS

    for kind in (DCNv3, DCNv4):
        layer = MODELS.build(dict(type=f"dcn_plugin.{kind.__name__}", channels=8, group=2))
        assert type(layer) is kind and layer.group == 2


# Where they run without this package

EXPORTED = {
    "DCNv3": (lambda: DCNv3(8, group=2, center_feature_scale=True, remove_center=True), (1, 6, 7, 8)),
    "DCNv3 strided": (lambda: DCNv3(8, group=4, stride=2, offset_scale=2.0, channels_first=True), (1, 8, 9, 7)),
    "DCNv4": (lambda: DCNv4(8, group=2, dw_kernel_size=3), (1, 49, 8)),
    "DCNv4 of maps": (lambda: DCNv4(8, group=2, center_feature_scale=True, channels_first=True), (1, 8, 6, 7)),
    "DAttention": (lambda: DAttention(8, 4, 2, 7, stride=2), (1, 8, 6, 7)),
}


def by_onnxruntime(layer, x, folder):
    session = pytest.importorskip("onnxruntime").InferenceSession
    onnx_export = pytest.importorskip("dcn_plugin.export.onnx")
    file = onnx_export.export_onnx(layer, (x,), folder / "layer.onnx")
    run = session(str(file))
    return torch.from_numpy(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0])


def by_core_operators(layer, x, folder):
    """What `export_executorch` lowers: no operator of ours is left."""
    from dcn_plugin.export.grid_sample import grid_sample_decompositions

    steps = {**torch.export.default_decompositions(), **grid_sample_decompositions()}
    program = torch.export.export(layer, (x,)).run_decompositions(steps)
    assert not any("dcn_plugin" in str(node.target) for node in program.graph.nodes)
    return program.module()(x)


def by_openvino(layer, x, folder):
    openvino = pytest.importorskip("openvino")
    from dcn_plugin.export.openvino import convert

    with pytest.raises(Exception, match="give dcn_plugin.export.openvino.convert an ONNX file, or what torch.export"):
        convert(layer, x)
    program = torch.export.export(layer, (x,))
    compiled = openvino.compile_model(convert(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(x.numpy())[0])


@pytest.mark.parametrize("way", [by_onnxruntime, by_core_operators, by_openvino])
@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_layers_compute_the_same(kind, way, tmp_path):
    make, shape = EXPORTED[kind]
    layer = drawn(make()).float()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(way(layer, x, tmp_path), layer(x), 1e-5)


@pytest.mark.parametrize("kind", EXPORTED)
def test_ncnn_refuses_them_by_name(kind, tmp_path):
    ncnn = pytest.importorskip("dcn_plugin.export.ncnn", exc_type=ImportError)
    make, shape = EXPORTED[kind]
    said = (
        f"expected deformable convolutions alone, got {kind.split()[0]} at '0', for which torchvision has no operator"
    )
    with pytest.raises(NotImplementedError, match=said):
        ncnn.export_ncnn(nn.Sequential(make()), (torch.zeros(shape),), tmp_path / "layer")
    assert not any(tmp_path.iterdir())


# In a convolution's place


@pytest.mark.parametrize(
    ("name", "options", "match", "count"),
    [
        ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), "stages.[23].*.conv_dw", 2),
        ("efficientnet_b0", dict(), "blocks.[23].*.conv_dw", 5),
    ],
)
@pytest.mark.parametrize("kind", ["DCNv3", "DCNv4"])
def test_depthwise_convolutions_of_timm_are_replaced(name, options, match, count, kind):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3, **options).eval()
    x = torch.rand(1, 3, 64, 64)
    shapes = [tuple(m.shape) for m in model.forward_intermediates(x, intermediates_only=True)]
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    rule = dict(match=match, groups="depthwise", layer=dict(type=kind, group=2))
    report = dcn_plugin.convert(model, rule, (3, 64, 64))
    assert len(report) == count and f"{kind}(" in str(report)
    for item in report:
        layer, conv = model.get_submodule(item.name), convs[item.name]
        assert type(layer).__name__ == kind and layer.channels == conv.in_channels
        own = (layer.kernel_size, layer.stride, layer.pad, layer.dilation)
        assert own == tuple(v[0] for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
        assert item.params_added == sum(p.numel() for p in layer.parameters()) - conv.weight.numel() - (
            0 if conv.bias is None else conv.bias.numel()
        )
    assert [tuple(m.shape) for m in model.forward_intermediates(x, intermediates_only=True)] == shapes
    model.train()(torch.rand(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    inside = "*.conv_dw.dw_conv.0" if kind == "DCNv3" else "*.conv_dw.value_proj"
    with pytest.raises(TypeError, match="is deformable already"):
        dcn_plugin.convert(model, dict(match=inside, layer=dict(type="DCNv2")))


def test_multiply_adds_that_a_rule_adds_are_those_of_the_linear_and_depthwise_parts():
    from torch.utils.flop_counter import FlopCounterMode

    for kind, options in (("DCNv3", dict()), ("DCNv4", dict(dw_kernel_size=5))):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8))
        rule = dict(match="0", layer=dict(type=kind, group=2, **options))
        report = dcn_plugin.convert(model, rule, (8, 16, 16))
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 8, 16, 16))
        samples = 4 * 8 * 8 * 9 * 8  # of 8 x 8 pixels, nine taps of eight channels, four products
        assert report.macs_added == counter.get_total_flops() / 2 - samples


def test_same_and_valid_padding_are_taken_from_the_convolution():
    for padding, pad in (("same", 2), ("valid", 0), (1, 1)):
        conv = nn.Conv2d(8, 8, 5, padding=padding, groups=8)
        layer = DCNv3.from_conv(conv, group=2)
        assert layer.pad == pad and layer(torch.rand(1, 8, 9, 9)).shape == conv(torch.rand(1, 8, 9, 9)).shape
