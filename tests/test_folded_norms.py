"""Whoever folds a norm into the convolution before it gets the same outputs from models with deformable layers."""

import pytest
import torch
import torch.fx.experimental.optimization
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d


class Given(nn.Module):
    """Offsets from elsewhere, and a norm behind."""

    def __init__(self):
        super().__init__()
        self.predict = nn.Conv2d(4, 18, 3, padding=1)
        self.align = DeformConv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.align(x, self.predict(x)))


MODELS = {
    "v1": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), DCNv1(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
    "v2": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), DCNv2(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    "no_affine": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), DCNv2(4, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "nested": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Sequential(DCNv2(4, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ),
    "given": Given,
}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.1, 4)
        elif isinstance(module, (DCNv1, DCNv2)):
            nn.init.normal_(module.conv_offset.weight, std=0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 2)
    return model.eval()


def image():
    return torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_mmengines_efficient_evaluation_leaves_deformable_layers_alone(name):
    evaluation = pytest.importorskip("mmengine.model.efficient_conv_bn_eval")
    model = made(name)
    expected = model(image())
    evaluation.turn_on_efficient_conv_bn_eval(nn.ModuleDict(dict(backbone=model)), "backbone")
    assert "forward" in vars(model)
    torch.testing.assert_close(model(image()), expected)
    model.train()
    other = made(name).train()
    torch.testing.assert_close(model(image()), other(image()))


def test_mmengines_efficient_evaluation_of_a_timm_model():
    evaluation = pytest.importorskip("mmengine.model.efficient_conv_bn_eval")
    timm = pytest.importorskip("timm")
    import dcn_plugin  # noqa: F401

    torch.manual_seed(0)
    model = timm.create_model("resnet18_dcn", channels=(8, 8, 8, 8), num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.1, 4)
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    evaluation.turn_on_efficient_conv_bn_eval_for_single_model(model)
    folded = [node for node in model.forward.__self__.graph.nodes if node.op == "call_function"]
    assert any(node.target is evaluation.efficient_conv_bn_eval_control for node in folded)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["v1", "v2", "no_affine", "nested"])
def test_torchs_graph_fusion_leaves_deformable_layers_alone(name):
    model = made(name)
    fused = torch.fx.experimental.optimization.fuse(model)
    torch.testing.assert_close(fused(image()), model(image()))


@pytest.mark.parametrize("layer", [DCNv1, DCNv2])
def test_torchs_fusion_of_two_modules_takes_a_deformable_layer(layer):
    model = nn.Sequential(layer(4, 6, 3), nn.BatchNorm2d(6)).eval()
    for parameter in model[0].conv_offset.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.uniform_(model[1].running_var, 0.1, 4)
    fused = fuse_conv_bn_eval(model[0], model[1])
    assert type(fused) is layer
    torch.testing.assert_close(fused(image()), model(image()))


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_mmcvs_folding_takes_the_norm_behind_a_deformable_layer_into_it(name, bias):
    fuse_conv_bn = pytest.importorskip("mmcv.cnn").fuse_conv_bn
    model = made(name)
    if not bias:
        for module in model.modules():
            if isinstance(module, DeformConv2d):
                module.bias = None
    expected = model(image())
    assert fuse_conv_bn(model) is model and norms(model) == 0
    torch.testing.assert_close(model(image()), expected)
    model.load_state_dict(model.state_dict())


def test_mmcvs_folding_of_its_own_blocks_and_of_a_timm_model():
    cnn = pytest.importorskip("mmcv.cnn")
    timm = pytest.importorskip("timm")
    import dcn_plugin  # noqa: F401

    torch.manual_seed(0)
    block = cnn.ConvModule(4, 4, 3, padding=1, conv_cfg=dict(type="dcn_plugin.DCNv2"), norm_cfg=dict(type="BN"))
    models = {
        "block": nn.Sequential(nn.Conv2d(3, 4, 1), block),
        "timm": timm.create_model("resnet18_dcn", channels=(8, 8, 8, 8), num_classes=3),
    }
    for name, model in models.items():
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 4)
        x = torch.rand(1, 3, 64, 64)
        expected = model(x)
        cnn.fuse_conv_bn(model)
        assert norms(model) == 0, name
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_that_cannot_be_folded_stays():
    """Behind an activation, without statistics, or behind a layer that runs twice."""
    fuse_conv_bn = pytest.importorskip("mmcv.cnn").fuse_conv_bn
    shared = DCNv2(4, 4, 3, padding=1)
    for model in (
        nn.Sequential(DCNv2(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4)),
        nn.Sequential(DCNv2(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    ):
        model.eval()
        before = norms(model)
        expected = model(image())
        fuse_conv_bn(model)
        assert norms(model) == before
        torch.testing.assert_close(model(image()), expected)


def test_asking_for_children_folds_nothing_elsewhere():
    model = made("v2")
    before = norms(model)
    for layer in model:
        list(layer.children()), list(layer.named_children()), list(layer.modules())

    def fuse_conv_bn(module):  # not what calls itself on a child
        return list(module.named_children())

    fuse_conv_bn(model[2])
    assert norms(model) == before
    assert [name for name, _ in model[2].named_children()] == ["conv_offset"]
