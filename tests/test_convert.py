"""convert(): what it replaces, what it refuses, and that a converted model computes what the source computed."""

import copy
import json
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import dcn_plugin
from dcn_plugin.convert import ConversionReport, convert
from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d

V2 = dict(type="DCNv2")


class Residual(nn.Module):
    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.conv1(x))))


class Small(nn.Module):
    """Sequential, ModuleList and ModuleDict in one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(8), Residual(8, 2))
        self.layer2 = nn.ModuleList([Residual(8), Residual(8)])
        self.branches = nn.ModuleDict({"left": nn.Conv2d(8, 8, 5, padding=2), "right": nn.Conv2d(8, 16, 3, dilation=2)})
        self.fc = nn.Linear(24, 2)

    def forward(self, x):
        x = self.layer1(self.stem(x))
        for layer in self.layer2:
            x = layer(x)
        x = [self.branches["left"](x).mean((2, 3)), self.branches["right"](x).mean((2, 3))]
        return self.fc(torch.cat(x, 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().double()


def fingerprint(model):
    """Everything a failed conversion must leave alone."""
    modules = [(name, module, module.training) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return modules, hooks, [(name, parameter) for name, parameter in model.named_parameters()]


def names(report):
    return [item.name for item in report]


ALL_3X3 = [
    "stem", "layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "layer2.1.conv2", "branches.right",
]  # fmt: skip


@pytest.mark.parametrize(
    "rule, expected",
    [
        (dict(match="layer[12].*.conv2"), ALL_3X3[1:5]),
        (dict(match="layer[!1].*.conv2"), ALL_3X3[3:5]),
        (dict(match="*conv2"), ALL_3X3[1:5]),
        (dict(match="*.conv?", kernel_size=3), ALL_3X3[1:5]),
        (dict(match="stem"), ["stem"]),
        (dict(match=["stem", "branches.*"]), ["stem", "branches.left", "branches.right"]),
        (dict(match=r"re:layer\d\.1\.conv2"), ["layer1.1.conv2", "layer2.1.conv2"]),
        (dict(match=["re:s.em", "layer2.0.conv2"]), ["stem", "layer2.0.conv2"]),
        (dict(match="*", kernel_size=3), ALL_3X3),
        (dict(match="*", kernel_size=[3, 3], exclude=["layer1.*", "re:stem"]), ALL_3X3[3:]),
        (dict(match="*", kernel_size=5), ["branches.left"]),
        (dict(match="*", stride=(2, 2)), ["layer1.1.conv2"]),
        (dict(match="*", dilation=2), ["branches.right"]),
        (dict(match="*", groups=2, stride=1), ["layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2"]),
        (dict(match="*", kernel_size=3, min_channels=8, groups=1), ["branches.right"]),
        (dict(match="*", kernel_size=3, max_channels=8, groups=1), ["stem"]),
        (dict(match="layer1.0.conv1"), ["layer1.0.conv1"]),
    ],
    ids=str,
)
def test_rule_selects(model, rule, expected):
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    before = model.eval()(x)
    report = convert(model, dict(rule, layer=V2))
    assert names(report) == expected
    found = [name for name, module in model.named_modules() if isinstance(module, DCNv2)]
    assert found == expected
    torch.testing.assert_close(model(x), before)


def test_several_rules_with_their_own_layers(model):
    report = convert(
        model,
        [
            dict(match="layer1.*.conv2", layer=dict(type="DCNv2", offset_groups=4, mask_activation="sigmoid")),
            dict(match="layer2.*.conv2", layer=dict(type="DCNv1", offset_groups=2, offset_bound=2.0)),
            dict(match="stem", layer=dict(type=DCNv1)),
        ],
    )
    assert names(report) == ALL_3X3[:5]  # the model's order, not the rules'
    first, second = model.layer1[0].conv2, model.layer2[0].conv2
    assert (type(first), first.offset_groups, first.mask_activation) == (DCNv2, 4, "sigmoid")
    assert (type(second), second.offset_groups, second.offset_bound) == (DCNv1, 2, 2.0)
    assert type(model.stem) is DCNv1


def test_parameters_modes_and_names_survive(model):
    model.layer1[0].conv2.weight.requires_grad_(False)
    model.layer1.eval()
    before = dict(model.named_parameters())
    order = list(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    convert(model, dict(match="*.conv2", layer=V2), input_size=(3, 12, 12))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not after["layer1.0.conv2.weight"].requires_grad
    assert after["layer1.0.conv2.conv_offset.weight"].requires_grad
    assert [name for name in model.state_dict() if ".conv_offset." not in name] == order
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert not model.layer1[0].conv2.conv_offset.training and model.layer2[0].conv2.conv_offset.training


def test_rules_are_not_changed(model):
    rules = [dict(match="stem", layer=dict(type="DCNv2", offset_groups=1))]
    kept = copy.deepcopy(rules)
    convert(model, rules)
    assert rules == kept


def test_mmengine_config_rules(model):
    config = pytest.importorskip("mmengine").Config(
        dict(rules=[dict(match=["layer1.*.conv2", "stem"], kernel_size=3, layer=dict(type="DCNv2", offset_groups=1))])
    )
    assert names(convert(model, config.rules)) == ["stem", "layer1.0.conv2", "layer1.1.conv2"]


def test_no_rules_no_replacements(model):
    report = convert(model, [])
    assert len(report) == 0 and report.params_added == 0 and report.macs_added == 0 and report.to_dict() == []
    assert "0 layers" in str(report)


def test_converted_model_copies_saves_and_loads(model):
    convert(model, dict(match="*.conv2", layer=V2))
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    twin = copy.deepcopy(model)
    fresh = Small().double()
    convert(fresh, dict(match="*.conv2", layer=V2))
    fresh.load_state_dict(model.state_dict())
    for other in (twin, fresh):
        torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_converted_model_takes_sibling_offset_keys_with_plain_load(model, caplog):
    convert(model, dict(match="layer1.*.conv2", layer=dict(type="DCNv2", mask_activation="sigmoid")))
    old = {k.replace("conv2.conv_offset.", "conv2_offset."): v + 1 for k, v in model.state_dict().items()}
    assert "layer1.0.conv2_offset.weight" in old
    nn.Sequential(model).load_state_dict({f"0.{k}": v for k, v in old.items()})
    assert (model.layer1[0].conv2.conv_offset.weight == 1).all()
    assert "layer1.0.conv2_offset.weight -> 0.layer1.0.conv2.conv_offset.weight" in caplog.text


# Report


def test_report_counts_by_hand(model):
    report = convert(model, dict(match=["layer1.*.conv2", "branches.left"], layer=V2), input_size=(3, 12, 10))
    assert isinstance(report, ConversionReport) and report.input_size == (3, 12, 10)
    # conv_offset: C_in * 27 * K weights and 27 biases for 3x3; 75 outputs of 25 taps for 5x5.
    weights = {"layer1.0.conv2": 8 * 27 * 9, "layer1.1.conv2": 8 * 27 * 9, "branches.left": 8 * 75 * 25}
    positions = {"layer1.0.conv2": 12 * 10, "layer1.1.conv2": 6 * 5, "branches.left": 6 * 5}
    biases = {"layer1.0.conv2": 27, "layer1.1.conv2": 27, "branches.left": 75}
    assert {r.name: r.params_added for r in report} == {n: weights[n] + biases[n] for n in weights}
    assert {r.name: r.macs_added for r in report} == {n: weights[n] * positions[n] for n in weights}
    assert report.params_added == sum(weights.values()) + sum(biases.values())
    assert report.macs_added == sum(weights[n] * positions[n] for n in weights)


def test_multiply_adds_agree_with_torchs_flop_counter(model):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)

    def convolution_flops():
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(x)
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "aten.convolution" in str(op))

    convolutions = {name: m for name, m in model.named_modules() if name.endswith("conv2")}
    total, kept = convolution_flops(), {}
    report = convert(model, dict(match="*conv2", layer=dict(type="DCNv1", offset_groups=2)), input_size=(3, 16, 16))
    # The replaced convolutions left aten.convolution; their conv_offset came in.
    for item in report:
        conv, layer = convolutions[item.name], model.get_submodule(item.name)
        positions = item.macs_added // layer.conv_offset.weight.numel()
        kept[item.name] = positions * conv.weight.numel()
    assert convolution_flops() == total - 2 * sum(kept.values()) + 2 * report.macs_added


def test_report_prints_and_serialises(model):
    report = convert(model, dict(match="*.conv2", layer=dict(type="DCNv2", offset_groups=2)), input_size=(3, 12, 12))
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "name" and "+ parameters" in lines[0] and "+ multiply-adds" in lines[0]
    row = next(line for line in lines if line.startswith("layer1.1.conv2"))
    assert "Conv2d(8, 8, 3x3, stride=2, groups=2)" in row
    assert "DCNv2(offset_groups=2, mask_activation='2*sigmoid')" in row
    assert "3,942" in row and f"{8 * 54 * 9 * 36:,}" in row
    assert lines[-2].startswith("4 layers") and f"{4 * 3942:,}" in lines[-2]
    assert lines[-1] == "multiply-adds for one image of 3 x 12 x 12"
    assert len({len(line) for line in lines[:-1]}) == 1, "columns are aligned"
    assert json.loads(json.dumps(report.to_dict()))[1]["name"] == "layer1.1.conv2"
    assert report[0].name == "layer1.0.conv2" and len(list(report)) == len(report) == 4


def test_multiply_adds_are_unknown_without_a_size(model):
    report = convert(model, dict(match="stem", layer=V2))
    assert report[0].macs_added is None and report.macs_added is None and report.input_size is None
    assert "n/a" in str(report) and "input_size=(C, H, W)" in str(report)


def test_size_comes_from_timms_model(model):
    model.pretrained_cfg = dict(input_size=(3, 14, 14))
    report = convert(model, dict(match="stem", layer=V2))
    assert report.input_size == (3, 14, 14) and report.macs_added == 3 * 27 * 9 * 14 * 14


def test_size_of_timms_model_that_does_not_run_is_a_note(model):
    model.pretrained_cfg = dict(input_size=(5, 14, 14))
    report = convert(model, dict(match="stem", layer=V2))
    assert report.macs_added is None and "does not run on input_size=(5, 14, 14)" in str(report)
    assert type(model.stem) is DCNv2


def test_layer_that_forward_does_not_call_is_noted(model):
    model.spare = nn.Conv2d(8, 8, 3).double()
    report = convert(model, dict(match=["spare", "stem"], layer=V2), input_size=(3, 12, 12))
    assert {r.name: r.macs_added is None for r in report} == {"stem": False, "spare": True}
    assert "not called by the model's forward: spare" in str(report)


def test_measuring_leaves_statistics_and_modes_alone(model):
    model.layer2.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=r"a size that the model runs on, got \(4, 12, 12\)"):
        convert(model, dict(match="stem", layer=V2), input_size=(4, 12, 12))
    assert [m.training for m in model.modules()] == modes
    convert(model, dict(match="layer1.0.conv1", layer=V2), input_size=(3, 12, 12))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not model.layer1[0].conv1._forward_hooks


# Shared modules


def test_shared_module_stays_shared():
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1)})
    model["list"] = nn.ModuleList([nn.Conv2d(4, 4, 1), model["a"]])
    report = convert(model, dict(match="a", layer=V2))
    assert model["a"] is model["list"][1] and type(model["a"]) is DCNv2
    assert names(report) == ["a"] and report[0].aliases == ("list.1",)
    assert "a = list.1" in str(report)
    again = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3)})
    again["b"] = again["a"]
    assert len(convert(again, dict(match=["a", "b"], layer=V2))) == 1
    with pytest.raises(ValueError, match="expected a module of the model that it matches"):
        shared = nn.Conv2d(4, 4, 3)
        convert(nn.ModuleList([shared, shared]), dict(match="*", exclude="1", layer=V2))


def test_shared_module_counts_every_call():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    report = convert(nn.Sequential(conv, conv), dict(match="0", layer=V2), input_size=(3, 8, 8))
    assert report.macs_added == 2 * 64 * 3 * 27 * 9


# Refusals, without touching the model (their messages, each by name: errors/table_core.py)


@pytest.mark.parametrize("match", ["layer1.*.conv2", "layer1.0.conv2.conv_offset"])
@pytest.mark.parametrize("conditions", [dict(), dict(kernel_size=3)], ids=str)
def test_what_is_deformable_already_is_not_converted_again(model, match, conditions):
    convert(model, dict(match="layer1.*.conv2", layer=V2))
    before = fingerprint(model)
    with pytest.raises(TypeError, match="'layer1.0.conv2' is deformable already"):
        convert(model, dict(match=match, layer=V2, **conditions))
    assert fingerprint(model) == before
    assert names(convert(model, dict(match="*.conv2", exclude="layer1.*", layer=V2))) == [
        "layer2.0.conv2",
        "layer2.1.conv2",
    ]


def test_convolutions_that_compute_something_else_are_refused_by_name(model):
    model.branches["left"] = parametrizations.weight_norm(model.branches["left"])
    before = fingerprint(model)
    with pytest.raises(TypeError, match="'branches.left', which cannot: .*parametrised weight"):
        convert(model, dict(match="*", kernel_size=[5, 5], layer=V2))
    assert fingerprint(model) == before


# A dozen and more timm families: a converted fresh model computes what the source computed

FAMILIES = [
    # model, what makes it small, rule, layers replaced
    ("resnet18", dict(), dict(match="layer[2-4].*.conv2"), 6),
    ("resnet50d", dict(layers=(1, 1, 1, 1)), dict(match="layer[2-4].*.conv2"), 3),
    ("resnext50_32x4d", dict(layers=(1, 1, 1, 1)), dict(match="layer*", groups=32), 4),
    ("res2net50_26w_4s", dict(layers=(1, 1, 1, 1)), dict(match="layer[34].*.convs.*"), 6),
    ("skresnet18", dict(), dict(match="layer4.*.paths.*.conv"), 4),
    ("regnetx_002", dict(), dict(match="s[34].*.conv2.conv"), 11),
    ("densenet121", dict(block_config=(2, 2, 2, 2)), dict(match="features.denseblock*.conv2", kernel_size=3), 8),
    ("convnext_atto", dict(), dict(match="stages.[23].*", groups="depthwise", kernel_size=7), 8),
    ("efficientnet_b0", dict(), dict(match="blocks.*.conv_dw", kernel_size=5), 9),
    ("mobilenetv3_small_050", dict(), dict(match="blocks.*", groups="depthwise", stride=1), 7),
    ("rexnet_100", dict(), dict(match="features.1?.conv_dw.conv"), 6),
    ("ghostnet_050", dict(), dict(match="blocks.[78].*.cheap_operation.0"), 10),
    ("vgg11_bn", dict(mlp_ratio=0.02), dict(match="features.*", kernel_size=3, min_channels=256), 5),
    ("dla46_c", dict(), dict(match="level[45].*", kernel_size=3, min_channels=32), 6),
    ("hrnet_w18_small", dict(), dict(match=r"re:stage4\..*\.conv2"), 8),
    ("cspresnet50", dict(), dict(match="stages.[23].blocks.*.conv2.conv"), 7),
    ("fastvit_t8", dict(inference_mode=True), dict(match="stages.[23].blocks.*.reparam_conv"), 6),
    ("edgenext_xx_small", dict(), dict(match="stages.[12].*", groups="depthwise", min_channels=48), 6),
]


def make_every_layer_matter(model):
    """Undo zero-initialised branches and unit statistics, so that no replaced layer could hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("running_var", "gamma")) or ("weight" in name and tensor.dim() == 1):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("name, options, rule, count", FAMILIES, ids=[family[0] for family in FAMILIES])
def test_converted_timm_model_computes_what_the_source_computed(name, options, rule, count):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double().eval()
    make_every_layer_matter(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
    report = convert(model, dict(rule, layer=V2), input_size=(3, 64, 64))
    assert len(report) == count
    after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9 * before.abs().max().item())
    assert report.macs_added > 0 and not report.note
    after.square().sum().backward()
    for item in report:
        grad = model.get_submodule(item.name).conv_offset.bias.grad
        assert grad is not None and grad.isfinite().all() and grad.any(), item.name


@pytest.mark.parametrize("name, kind", [("tf_efficientnet_b0", "Conv2dSame"), ("nfnet_f0", "ScaledStdConv2d")])
def test_timm_models_with_convolutions_of_their_own_are_refused_by_name(name, kind):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(TypeError, match=f"which cannot: conv: .*got {kind} with a forward of its own"):
        convert(model, dict(match="*", kernel_size=3, layer=V2))
    assert not any(isinstance(module, DeformConv2d) for module in model.modules())


def test_timm_feature_models_convert():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", features_only=True)
    x = torch.randn(1, 3, 64, 64)
    model.eval()
    before = model(x)
    convert(model, dict(match="layer[34].*.conv2", layer=V2))
    for ours, theirs in zip(model(x), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_feature_extractors_trace_a_converted_model():
    timm = pytest.importorskip("timm")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = timm.create_model("resnet18").eval()
    convert(model, dict(match="layer4.*.conv2", layer=V2))
    x = torch.randn(1, 3, 64, 64)
    extractor = extraction.create_feature_extractor(model, {"layer4": "out"})
    torch.testing.assert_close(extractor(x)["out"], model.forward_features(x))


@pytest.mark.parametrize("node", ["layer4.0.conv2", "layer4.0.conv2.conv_offset", "layer4.0.conv2.deform_conv2d"])
def test_feature_extractors_reach_inside_a_layer(node):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    torch.manual_seed(0)
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=4).eval()
    convert(model, dict(match="layer4.0.conv2", layer=dict(type="DCNv2")))
    layer = model.layer4[0].conv2
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=0.1)
    seen = {}
    x = torch.rand(1, 3, 64, 64)
    handles = [m.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out)) for m in (layer, layer.conv_offset)]
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        found = extraction.create_feature_extractor(model, {node: "out"})(x)["out"]
    torch.testing.assert_close(found, seen[layer.conv_offset if node.endswith("conv_offset") else layer])


def test_model_without_storage_converts():
    with torch.device("meta"):
        model = Small()
    report = convert(model, dict(match="stem", layer=V2), input_size=(3, 12, 12))
    assert report.macs_added == 3 * 27 * 9 * 144 and all(p.is_meta for p in model.parameters())


def test_public_entry_point(caplog):
    with caplog.at_level(logging.DEBUG):
        assert len(dcn_plugin.convert(nn.Sequential(nn.Conv2d(3, 3, 3)), dict(match="0", layer=V2))) == 1
    assert not caplog.records
