"""What the operators cost: formulas by hand, and every counter of operations that can be told agrees with them."""

import logging
import sys

import pytest
import torch
from cases import BY_NAME, CASES, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcn_plugin import DCNv1, DCNv2, DeformConv2d, flops, ops
from dcn_plugin.layers import (
    ActiveConv2d,
    DAttention,
    DCNv3,
    DCNv4,
    DeformConv1d,
    DeformMaxPool2d,
    DeformMaxPool2dPack,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    Dilated,
    MMCVMultiScaleDeformableAttention,
    MSDeformAttn,
    PSRoIPool,
    SpatialTransformer,
)

X = torch.rand(2, 12, 20, 24)
# Image, x1, y1, x2, y2: 6 x 8 and 3 x 3 pixels, within the map.
ROIS = torch.tensor([[0, 2.0, 3.0, 10.0, 9.0], [1, 4.0, 4.0, 7.0, 7.0]])


def counted(call, *arguments, **options):
    """Multiply-adds by torch's own counter, which counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        call(*arguments, **options)
    return counter.get_total_flops() / 2


def convolution(pixels, taps, channels, outputs, groups=1):
    """Products with the weights, and four for each channel of each sample."""
    return pixels * taps * (outputs * channels // groups + 4 * channels)


LAYERS = [
    # layer, pixels of the result, outputs of conv_offset
    (DCNv1(12, 6, 3, padding=1), 20 * 24, 2 * 9),
    (DCNv2(12, 6, 3, padding=1), 20 * 24, 3 * 9),
    (DCNv2(12, 6, 3, padding=1, stride=2, bias=False), 10 * 12, 3 * 9),
    (DCNv2(12, 6, (1, 3), padding=(0, 1), groups=3, offset_groups=2), 20 * 24, 2 * 3 * 3),
    (DCNv2(12, 12, 3, padding=2, dilation=2, groups=12), 20 * 24, 3 * 9),
]


def layer_cost(layer, pixels, predicted, images):
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    own = convolution(images * pixels, taps, 12, layer.out_channels, layer.groups)
    return own + images * pixels * taps * 12 * predicted


@pytest.mark.parametrize("layer, pixels, predicted", LAYERS)
def test_convolutions_cost_what_the_formula_says(layer, pixels, predicted):
    assert counted(layer, X) == layer_cost(layer, pixels, predicted, 2)


def test_convolutions_with_offsets_from_elsewhere():
    layer, offset = DeformConv2d(12, 6, 3, padding=1), torch.zeros(2, 18, 20, 24)
    wanted = convolution(2 * 480, 9, 12, 6)
    assert counted(layer, X, offset) == wanted
    assert counted(layer, X, offset, torch.ones(2, 9, 20, 24)) == wanted


POOLING = [
    # Samples of all bins of both regions, times 4 for each channel; pixels of all bins of R-FCN's pooling.
    (ops.deform_roi_pool, dict(output_size=3, sampling_ratio=2), 2 * 9 * 4 * 4 * 12),
    (ops.deform_roi_pool, dict(output_size=(1, 2), sampling_ratio=3), 2 * 2 * 9 * 4 * 12),
    # bins of 6/3 x 8/3 and 3/3 x 3/3 pixels: 2 x 3 and 1 x 1 samples
    (ops.deform_roi_pool, dict(output_size=3, sampling_ratio=0), (9 * 6 + 9 * 1) * 4 * 12),
    (
        ops.deform_ps_roi_pool,
        dict(output_dim=3, group_size=2, output_size=2, samples_per_part=3), 2 * 4 * 9 * 4 * 3,
    ),
    # 7 x 9 and 4 x 4 whole pixels, the last included; in two bins of 4 or 5, and 2, along each axis
    (ops.ps_roi_pool, dict(output_dim=3, group_size=2, output_size=2), ((4 + 4) * (5 + 5) + 4 * 4) * 3),
]  # fmt: skip


@pytest.mark.parametrize("pool, options, wanted", POOLING)
def test_pooling_costs_what_the_formula_says(pool, options, wanted):
    assert counted(pool, X, ROIS, **options) == wanted
    empty = counted(pool, X, ROIS[:0], **options)
    assert empty == 0


def test_shapes_alone_give_two_samples_along_each_axis():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        x, rois = mode.from_tensor(X), mode.from_tensor(ROIS)
        assert counted(ops.deform_roi_pool, x, rois, output_size=3, sampling_ratio=0) == 2 * 9 * 4 * 4 * 12
        assert counted(ops.deform_roi_pool, x, rois, output_size=3, sampling_ratio=3) == 2 * 9 * 9 * 4 * 12
        assert counted(ops.ps_roi_pool, x, rois, output_dim=3, group_size=2, output_size=2) == 2 * 4 * 4 * 3


@pytest.mark.parametrize("pool, options, wanted", POOLING)
def test_backward_of_pooling(pool, options, wanted):
    x = X.clone().requires_grad_()
    assert counted(lambda: pool(x, ROIS, **options).sum().backward()) == 2 * wanted
    if pool is not ops.ps_roi_pool:
        size = options["output_size"]
        size = size if isinstance(size, tuple) else (size, size)
        offset = torch.zeros(2, 2, *size, requires_grad=True)
        assert counted(lambda: pool(x, ROIS, offset, **options).sum().backward()) == 3 * wanted
        assert counted(lambda: pool(X, ROIS, offset, **options).sum().backward()) == 2 * wanted


def test_attention_layers_cost_what_the_formula_says():
    """Four linears, and four products for each channel of each of 1 + 3 points of 3 heads."""
    shapes, queries, pixels = [(4, 5), (2, 3)], 2 * 5, 2 * 26
    samples = 4 * queries * 12 * 4
    query, at, x = torch.rand(2, 5, 12), torch.rand(2, 5, 2, 2), torch.rand(2, 26, 12)
    layer = MSDeformAttn(12, 2, 3, [1, 3])
    wanted = samples + queries * 12 * (3 * 4 * 2 + 3 * 4 + 12) + pixels * 12 * 12
    assert counted(layer, query, at, x, shapes) == wanted
    layer.__flops__ = 0
    flops.ptflops_hooks()[MSDeformAttn](layer, (query, at, x, shapes), layer(query, at, x, shapes))
    assert layer.__flops__ == wanted
    half = MMCVMultiScaleDeformableAttention(12, 3, 2, 2, batch_first=True, value_proj_ratio=0.5)
    wanted = samples / 2 + queries * 12 * (3 * 4 * 2 + 3 * 4 + 6) + pixels * 12 * 6
    assert counted(half, query, value=x, reference_points=at, spatial_shapes=shapes) == wanted


def test_aggregation_layers_cost_what_the_formula_says():
    """Linears, a depthwise convolution, and four products for each channel of each tap; a stride leaves out outputs."""
    pixels, outputs, taps = 2 * 6 * 8, 2 * 3 * 4, 9
    layer, x = DCNv3(12, group=3, stride=2, dw_kernel_size=5), torch.rand(2, 6, 8, 12)
    before = pixels * 12 * (12 + 25)  # input_proj and dw_conv run on all pixels
    after = outputs * 12 * (3 * taps * 2 + 3 * taps + 12)
    wanted = before + after + outputs * 4 * taps * 12
    assert counted(layer, x) == wanted
    layer.__flops__ = 0
    flops.ptflops_hooks()[DCNv3](layer, (x,), layer(x))
    assert layer.__flops__ == wanted
    fourth = DCNv4(12, group=3, remove_center=True, center_feature_scale=True)
    wanted = pixels * 12 * (12 + 72 + 12 + 3) + pixels * 4 * 8 * 12  # 3 * 3 * 8 numbers are a multiple of 8
    assert counted(fourth, x.flatten(1, 2), (6, 8)) == wanted


def test_attention_to_a_grid_costs_what_the_formula_says():
    """Projections of queries and samples, offsets for each group, samples of map and table, and two products."""
    layer, x = DAttention(12, 3, 1, (6, 8), 3, 2, -1, True), torch.rand(2, 12, 6, 8)
    queries, samples = 2 * 6 * 8, 2 * 3 * 4
    projections = (2 * queries + 2 * samples) * 12 * 12
    predicted = samples * (12 * 9 + 12 * 2)
    sampled = samples * 12 * 4 + queries * 3 * 4 * 3 * 4
    products = 2 * queries * 3 * 4 * 12
    assert counted(layer, x) == projections + predicted + sampled + products


def test_active_convolutions_cost_what_others_do_without_a_predictor():
    layer = ActiveConv2d(12, 6, 3, padding=1, groups=3)
    wanted = convolution(2 * 20 * 24, 9, 12, 6, 3)
    assert counted(layer, X) == wanted
    layer.__flops__ = 0
    flops.ptflops_hooks()[ActiveConv2d](layer, (X,), layer(X))
    assert layer.__flops__ == wanted


def test_the_control_costs_what_a_convolution_does():
    layer = Dilated(12, 6, 3, padding=1, groups=3)
    wanted = 2 * 20 * 24 * 9 * 12 * 6 // 3
    assert counted(layer, X) == wanted
    layer.__flops__ = 0
    flops.ptflops_hooks()[Dilated](layer, (X,), layer(X))
    assert layer.__flops__ == wanted


def test_convolutions_of_sequences_cost_what_those_of_a_row_do():
    layer, call = DeformConv1d(12, 6, 3, padding=1), (torch.rand(2, 12, 20), torch.zeros(2, 3, 20))
    wanted = convolution(2 * 20, 3, 12, 6)
    assert counted(layer, *call) == wanted
    layer.__flops__ = 0
    flops.ptflops_hooks()[DeformConv1d](layer, call, layer(*call))
    assert layer.__flops__ == wanted


def test_max_pooling_costs_its_samples():
    """Four products for each channel of a sample."""
    samples, predictor = 2 * 6 * 8 * 9 * 12, 2 * 6 * 8 * 9 * 12 * 18
    assert counted(DeformMaxPool2d(12, 3), X, torch.zeros(2, 18, 6, 8)) == 4 * samples
    layer = DeformMaxPool2dPack(12, 3)
    assert counted(layer, X) == 4 * samples + predictor
    layer.__flops__ = 0
    flops.ptflops_hooks()[DeformMaxPool2dPack](layer, (X,), layer(X))
    assert layer.__flops__ == 4 * samples + predictor


def test_spatial_transformers_cost_what_the_formula_says():
    """Two convolutions and two linear layers, then four products for each channel of a sample, and one with its one."""
    layer, x = SpatialTransformer(12, output_size=(5, 4)), torch.rand(2, 12, 16, 20)
    localiser = 16 * 20 * 8 * 12 * 49 + 8 * 10 * 10 * 8 * 25 + 160 * 32 + 32 * 6
    assert counted(layer, x) == 2 * (localiser + 5 * 4 * 12 * 5)
    layer.__flops__ = 0
    flops.ptflops_hooks()[SpatialTransformer](layer, (x,), layer(x))
    assert layer.__flops__ == 2 * (localiser + 5 * 4 * 12 * 5)


def test_attention_costs_what_the_formula_says():
    value, locations, weights = torch.rand(2, 14, 3, 5), torch.rand(2, 7, 3, 2, 4, 2), torch.rand(2, 7, 3, 2, 4)
    wanted = (2 * 7 * 3) * (2 * 4) * 4 * 5  # queries' heads, points, four products for each channel
    shapes = [(3, 4), (1, 2)]
    assert counted(ops.ms_deform_attn, value, shapes, locations, weights) == wanted

    def trained(*asked):
        for tensor in asked:
            tensor.requires_grad_()
        ops.ms_deform_attn(value, shapes, locations, weights).sum().backward()

    assert counted(trained, weights) == 2 * wanted
    assert counted(trained, value, weights, locations) == 3 * wanted


def test_aggregation_costs_what_the_formula_says():
    value, packed = torch.rand(2, 5, 6, 8), torch.rand(2, 5, 6, 4, 24)
    offset, weight = torch.rand(2, 3, 3, 4, 9, 2), torch.rand(2, 3, 3, 4, 9)
    wanted = (2 * 3 * 3) * 9 * 4 * 8  # output pixels, taps, four products for each channel
    assert counted(ops.deform_aggregate2d, value, offset, weight, stride=2) == wanted
    without_middle = (2 * 5 * 6) * 8 * 4 * 8
    assert counted(ops.deform_aggregate2d, value, packed, remove_center=True) == without_middle

    def trained(*asked):
        for tensor in asked:
            tensor.requires_grad_()
        ops.deform_aggregate2d(value, offset, weight, stride=2).sum().backward()

    assert counted(trained, weight) == 2 * wanted
    assert counted(trained, value, weight, offset) == 3 * wanted


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_operator_is_counted_by_all_who_count(case):
    arguments = case.make(case.full, torch.float32)
    forward = counted(case.function, **arguments)
    assert 0 < forward < counted(run, case.function, arguments)
    assert flops.fvcore_handles().keys() == {f"dcn_plugin::{name}" for name in BY_NAME}
    assert getattr(torch.ops.dcn_plugin, case.name) in flops.ptflops_hooks()


# Other counters. They count multiply-adds.


class Pools(nn.Module):
    """All three poolings, called as in a detector."""

    def __init__(self):
        super().__init__()
        self.plain = DeformRoIPool(output_size=3, spatial_scale=1.0, sampling_ratio=2)
        self.parts = PSRoIPool(output_dim=3, group_size=2, output_size=2, spatial_scale=1.0)
        self.moved = DeformPSRoIPool(output_dim=3, group_size=2, output_size=2, spatial_scale=1.0)

    def forward(self, x):
        rois = ROIS[:1].to(x)
        return self.plain(x, rois), self.parts(x, rois), self.moved(x, rois)


@pytest.fixture
def models():
    """Models without biases and activations, which counters see in different ways; image; multiply-adds."""
    x = X[:1]
    chain = nn.Sequential(
        DCNv2(12, 8, 3, padding=1, groups=2, bias=False), DCNv1(8, 12, 3, padding=1, stride=2, bias=False)
    )
    return [(model, x, counted(model, x)) for model in (chain, *(layer for layer, *_ in LAYERS), Pools())]


def exactly(wanted, model):
    """Adaptive regions are not in a traced graph: R-FCN's pooling reads 2 x 2 pixels a bin there."""
    if not isinstance(model, Pools):
        return wanted
    return wanted - counted(model.parts, X[:1], ROIS[:1]) + 3 * 4 * 4


@pytest.mark.filterwarnings("ignore")
def test_fvcore(models, caplog):
    fvcore = pytest.importorskip("fvcore.nn")
    for model, x, wanted in models:
        found = fvcore.FlopCountAnalysis(model, x).set_op_handle(**flops.fvcore_handles())
        assert found.unsupported_ops_warnings(False).total() == exactly(wanted, model)


@pytest.mark.filterwarnings("ignore")
def test_mmengine_is_told_on_import(models, caplog):
    analysis = pytest.importorskip("mmengine.analysis")
    with caplog.at_level(logging.CRITICAL):
        for model, x, wanted in models:
            assert analysis.FlopAnalyzer(model, (x,)).total() == exactly(wanted, model)
        layer = models[1][0]
        info = analysis.get_model_complexity_info(layer, (12, 20, 24), show_table=False, show_arch=False)
    assert info["flops"] == models[1][2]
    assert info["activations"] == 480 * (layer.out_channels + layer.conv_offset.out_channels)


@pytest.mark.filterwarnings("ignore")
def test_mmengine_finds_the_deformable_model_dearer_than_the_plain_one(caplog):
    analysis, timm = pytest.importorskip("mmengine.analysis"), pytest.importorskip("timm")
    image, costs = torch.zeros(1, 3, 64, 64), {}
    for name in ("resnet18", "resnet18_dcn"):
        model = timm.create_model(name, channels=(8, 8, 16, 16), num_classes=4).eval()
        with caplog.at_level(logging.CRITICAL):
            found = analysis.FlopAnalyzer(model, (image,)).by_operator()
        costs[name] = sum(found[kind] for kind in ("conv", "deform_conv2d", "linear", "addmm"))
        assert costs[name] == counted(model, image)
    assert costs["resnet18_dcn"] > costs["resnet18"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(models, backend):
    ptflops = pytest.importorskip("ptflops")
    options = dict(backend=backend, as_strings=False, print_per_layer_stat=False)
    for model, x, wanted in models:
        macs, _ = ptflops.get_model_complexity_info(
            nn.Sequential(model), tuple(x.shape[1:]), custom_modules_hooks=flops.ptflops_hooks(), **options
        )
        conv_offset = getattr(model, "conv_offset", None)
        chain = (
            [m.conv_offset for m in model if isinstance(m, DeformConv2d)] if isinstance(model, nn.Sequential) else []
        )
        if backend == "pytorch":
            # Its masks are a Python product of tensors, which ptflops counts one by one.
            assert 0 <= macs - wanted <= 2 * 480 * 27
        else:  # the bias of each ordinary convolution
            pixels = {id(conv): 480 // conv.stride[0] ** 2 for conv in (conv_offset, *chain) if conv is not None}
            biases = sum(pixels[id(conv)] * conv.out_channels for conv in (conv_offset, *chain) if conv is not None)
            assert macs - wanted == biases


@pytest.mark.filterwarnings("ignore")
def test_thop(models):
    thop = pytest.importorskip("thop")
    for model, x, wanted in models:
        macs, _ = thop.profile(nn.Sequential(model), (x,), custom_ops=flops.thop_ops(), verbose=False)
        assert macs == wanted


@pytest.mark.filterwarnings("ignore")
def test_layers_that_pool_twice_and_predict_in_between():
    thop = pytest.importorskip("thop")
    packs = [
        DeformRoIPoolPack(3, 12, deform_fc_channels=16, sampling_ratio=2),
        DeformPSRoIPoolPack(3, 2, 2, deform_fc_channels=16),
    ]
    for pack in packs:

        class Head(nn.Module):
            def __init__(self, pack=pack):
                super().__init__()
                self.pack = pack

            def forward(self, x):
                return self.pack(x, ROIS)

        macs, _ = thop.profile(Head(), (X,), custom_ops=flops.thop_ops(), verbose=False)
        assert macs == counted(pack, X, ROIS) > counted(pack.eval(), X, ROIS[:1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fvcore", "thop", "ptflops", "torchinfo"])
def test_counters_that_are_not_told_find_too_little(name):
    """What the documents say of them; where this fails, they have learnt it, and the documents should say so."""
    module = pytest.importorskip(name)
    layer = nn.Sequential(DCNv2(12, 6, 3, padding=1))
    x = X[:1]
    found = {
        "fvcore": lambda: (
            __import__("fvcore.nn").nn.FlopCountAnalysis(layer, x).unsupported_ops_warnings(False).total()
        ),
        "thop": lambda: module.profile(layer, (x,), verbose=False)[0],
        "ptflops": lambda: module.get_model_complexity_info(
            layer, (12, 20, 24), as_strings=False, print_per_layer_stat=False
        )[0],
        "torchinfo": lambda: module.summary(layer, input_data=x, verbose=0).total_mult_adds,
    }[name]()
    assert found < 0.8 * counted(layer, x)


def test_what_another_package_registered_with_mmengine_stays(monkeypatch):
    analysis = pytest.importorskip("mmengine.analysis.complexity_analysis")
    table = {"dcn_plugin::deform_conv2d": len}
    monkeypatch.setattr(analysis, "_DEFAULT_SUPPORTED_FLOP_OPS", table)
    flops.register_with_mmengine()
    assert table["dcn_plugin::deform_conv2d"] is len and len(table) == len(BY_NAME)
    monkeypatch.delattr(analysis, "_DEFAULT_SUPPORTED_FLOP_OPS")
    flops.register_with_mmengine()
    monkeypatch.setitem(sys.modules, "mmengine.analysis", None)
    flops.register_with_mmengine()
    assert len(table) == len(BY_NAME)
