"""The MMEngine plug: scope and names, mmcv's builders, the mmdet-style backbone, training with MMEngine's Runner."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from mmengine.config import Config
from mmengine.model import BaseModel, BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from run_python import run_python
from torch import nn

from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d, ModulatedDeformRoIPoolPack, OffsetConv
from dcn_plugin.mm import DCNResNet, TimmBackbone, build_dcn

LAYOUT = json.loads((Path(__file__).parent / "data" / "mmdet_resnet50_dcnv2.json").read_text())["shapes"]
DCNV2 = dict(type="DCNv2", deform_groups=1, fallback_on_stride=False)
SMALL = dict(depth=18, base_channels=8)


def run_alone(code, path=None):
    """In a fresh process without transformers, of which MMEngine imports all that it finds: for seconds each time."""
    return run_python("import sys; sys.modules['transformers'] = None\n" + code, path=path)


def images(size=64, channels=3, batch=2):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def randomise_norms(model):
    """Weights such that every branch and every statistic counts in the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def dcn_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, OffsetConv)]


# Names


@pytest.mark.parametrize("layer", [DeformConv2d, DCNv1, DCNv2])
def test_layers_by_scope(layer):
    built = MODELS.build(dict(type=f"dcn_plugin.{layer.__name__}", in_channels=4, out_channels=6, kernel_size=3))
    assert type(built) is layer
    if layer is DCNv2:
        assert built.mask_activation == "2*sigmoid"


def test_scope_needs_no_import_of_ours():
    code = """
from mmengine.registry import MODELS
layer = MODELS.build(dict(type="dcn_plugin.DCNv2", in_channels=4, out_channels=4, kernel_size=3, padding=1))
print(type(layer).__name__)
"""
    assert run_alone(code) == "DCNv2\n"  # mmengine itself warns on some torch, so warnings are not made errors


def test_default_scope_covers_every_registry(caplog):
    with DefaultScope.overwrite_default_scope("dcn_plugin"):
        assert type(MODELS.build(dict(type="DCNResNet", **SMALL))) is DCNResNet
        hook = HOOKS.build(dict(type="WeightsOnlyCheckpointHook"))
        assert type(hook).__module__ == "dcn_plugin.mm.hooks"
        assert HOOKS.build(dict(type="IterTimerHook")).priority == "NORMAL"
    assert not caplog.records


def test_unknown_name_and_unknown_option_are_named():
    with pytest.raises(KeyError, match="dcn_plugin.DCNv9"):
        MODELS.build(dict(type="dcn_plugin.DCNv9"))
    with pytest.raises(TypeError, match="deform_group"):
        MODELS.build(dict(type="DCNv2", in_channels=4, out_channels=4, kernel_size=3, deform_group=2))


@pytest.mark.parametrize(("name", "layer", "factor"), [("DCN", DCNv1, 1.0), ("DCNv2", DCNv2, 0.5)])
@pytest.mark.parametrize("scope", ["", "dcn_plugin.MMCV"])
def test_mmcv_names_have_mmcv_numerics(name, layer, factor, scope):
    cfg = dict(type=scope + name, in_channels=4, out_channels=6, kernel_size=3, padding=1, deform_groups=2, bias=True)
    built = MODELS.build(cfg)
    assert type(built) is layer and built.offset_groups == 2
    x = images(6, channels=4)
    plain = F.conv2d(x, built.weight, padding=1)
    torch.testing.assert_close(built(x), factor * plain + built.bias[:, None, None], rtol=1e-4, atol=1e-5)


def test_mmcv_defaults():
    geometry = dict(in_channels=4, out_channels=4, kernel_size=3)
    assert MODELS.build(dict(type="DCN", **geometry)).bias is None
    assert MODELS.build(dict(type="DCNv2", **geometry)).bias is not None
    assert MODELS.build(dict(type="DCNv2", mask_activation="2*sigmoid", **geometry)).mask_activation == "2*sigmoid"


def test_mmcv_arguments_that_have_no_or_another_name_here():
    geometry = dict(in_channels=4, out_channels=4, kernel_size=3)
    for name in ("DCN", "DCNv2"):
        assert MODELS.build(dict(type=name, deformable_groups=2, **geometry)).offset_groups == 2
    assert MODELS.build(dict(type="DCN", im2col_step=64, deform_groups=4, **geometry)).offset_groups == 4
    # By position, in mmcv's order.
    layer = build_dcn(4, 4, 3, 2, 1, 1, 2, 4, False, 64)
    assert (layer.stride, layer.groups, layer.offset_groups, layer.bias) == ((2, 2), 2, 4, None)


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_initialisers_of_convolutions_leave_offsets_at_zero(name):
    """A neck's or head's `init_cfg`: mmcv's DCNv2 sets its offsets back to zero after it."""

    class Neck(BaseModule):
        def __init__(self):
            super().__init__(dict(type="Kaiming", layer="Conv2d", bias=1.0))
            deformable = MODELS.build(dict(type=name, in_channels=4, out_channels=4, kernel_size=3))
            self.convs = nn.Sequential(nn.Conv2d(4, 4, 1), deformable)

    neck = Neck()
    weight = neck.convs[1].weight.clone()
    neck.init_weights()
    assert neck.convs[0].bias.eq(1).all(), "the initialiser ran"
    assert not any(parameter.any() for parameter in neck.convs[1].conv_offset.parameters())
    assert torch.equal(neck.convs[1].weight, weight)


def test_initialisers_of_linear_layers_leave_offsets_of_regions_at_zero():
    class Head(BaseModule):
        def __init__(self):
            super().__init__(dict(type="Xavier", layer="Linear", bias=1.0))
            self.pool = nn.ModuleList([ModulatedDeformRoIPoolPack(2, 4, 8)])

    head = Head()
    head.init_weights()
    pool = head.pool[0]
    assert pool.offset_fc[0].bias.eq(1).all(), "the initialiser ran"
    last = [*pool.offset_fc[-1].parameters(), *pool.mask_fc[-2].parameters()]
    assert len(last) == 4 and not any(parameter.any() for parameter in last)


ROI_LAYERS = {
    "DeformRoIPool": dict(output_size=2),
    "DeformRoIPoolPack": dict(output_size=2, output_channels=4, deform_fc_channels=8),
    "ModulatedDeformRoIPoolPack": dict(output_size=2, output_channels=4, deform_fc_channels=8),
    "PSRoIPool": dict(output_dim=1, group_size=2, output_size=2),
    "DeformPSRoIPool": dict(output_dim=1, group_size=2, output_size=2),
    "DeformPSRoIPoolPack": dict(output_dim=1, group_size=2, output_size=2, deform_fc_channels=8),
    "MultiScaleDeformRoIPool": dict(
        featmap_names=["0"], output_size=2, sampling_ratio=2, in_channels=4, deform_fc_channels=8
    ),
}


@pytest.mark.parametrize("name", ROI_LAYERS)
def test_roi_layers_by_scope_and_not_without(name):
    cfg = dict(type=name, **ROI_LAYERS[name])
    built = MODELS.build(dict(cfg, type=f"dcn_plugin.{name}"))
    assert type(built).__name__ == name
    if name != "MultiScaleDeformRoIPool":
        assert built(images(8, channels=4), torch.tensor([[1, 1.0, 1.0, 5.0, 6.0]])).shape[0] == 1
    # mmcv registers no RoI layer either: mmdetection takes them from mmcv.ops by name.
    with pytest.raises(KeyError, match=name):
        MODELS.build(cfg)
    with DefaultScope.overwrite_default_scope("dcn_plugin"):
        assert type(MODELS.build(cfg)) is type(built)


def test_learning_rates_of_roi_branches_by_custom_keys():
    pool = dict(type="dcn_plugin.ModulatedDeformRoIPoolPack", output_size=2, output_channels=4, deform_fc_channels=8)
    model = nn.ModuleDict(dict(conv=MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=3))))
    model["pool"] = MODELS.build(pool)
    model["head"] = nn.Linear(4, 2)
    rates = {"conv_offset": 0.1, "offset_fc": 0.01, "mask_fc": 0.01}
    cfg = dict(
        optimizer=dict(type="SGD", lr=0.5),
        paramwise_cfg=dict(custom_keys={name: dict(lr_mult=rate) for name, rate in rates.items()}),
    )
    optimizer = build_optim_wrapper(model, cfg).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(group["params"][0])]: group["lr"] for group in optimizer.param_groups}
    assert set(found) == set(names.values())
    for name, rate in found.items():
        expected = next((factor for key, factor in rates.items() if f".{key}." in name), 1.0)
        assert rate == pytest.approx(0.5 * expected), name


@pytest.mark.parametrize("imports", ["import dcn_plugin, mmcv.cnn", "import mmcv.cnn, dcn_plugin"])
def test_mmcv_lite_builds_ours(imports):
    code = f"""
{imports}
layer = mmcv.cnn.build_conv_layer(dict(type="DCNv2", deform_groups=1), 8, 8, kernel_size=3, padding=1)
assert type(layer) is dcn_plugin.DCNv2 and layer.mask_activation == "sigmoid", layer
block = mmcv.cnn.ConvModule(8, 8, 3, padding=1, conv_cfg=dict(type="dcn_plugin.DCNv2"), norm_cfg=dict(type="BN"))
import torch
x = torch.rand(1, 8, 5, 5)
plain = torch.nn.functional.conv2d(x, block.conv.weight, padding=1)
torch.testing.assert_close(block.eval()(x), block.bn(plain).relu(), rtol=1e-4, atol=1e-5)
from mmengine.registry import MODELS
from dcn_plugin.layers import MMCVMultiScaleDeformableAttention
attention = dict(embed_dims=8, num_heads=2, num_levels=1)
for kind in ("MultiScaleDeformableAttention", "dcn_plugin.MMCVMultiScaleDeformableAttention"):
    assert type(MODELS.build(dict(attention, type=kind))) is MMCVMultiScaleDeformableAttention
assert type(MODELS.build(dict(type="dcn_plugin.MSDeformAttn", d_model=8))) is dcn_plugin.layers.MSDeformAttn
"""
    assert run_alone(code) == ""


@pytest.mark.parametrize("order", [("mmcv", "dcn_plugin"), ("dcn_plugin", "mmcv")])
def test_names_stay_mmcvs_where_its_operators_are_compiled(tmp_path, order):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "_ext.py").write_text("")
    names = ("DCN", "DCNv2", "MultiScaleDeformableAttention")
    register = "\n".join(f"MODELS.register_module('{name}', module=dict)" for name in names)
    (package / "__init__.py").write_text(f"from mmengine.registry import MODELS\n{register}\n")
    code = f"""
from mmengine.registry import MODELS
import {order[0]}
assert MODELS.module_dict.get("DCN") is {"dict" if order[0] == "mmcv" else None}
import {order[1]}
assert all(MODELS.module_dict[name] is dict for name in {names})
layer = MODELS.build(dict(type="dcn_plugin.MMCVDCNv2", in_channels=4, out_channels=4, kernel_size=3))
assert type(layer) is dcn_plugin.DCNv2
layer = MODELS.build(dict(type="dcn_plugin.MMCVMultiScaleDeformableAttention", embed_dims=8, num_heads=2))
assert type(layer) is dcn_plugin.layers.MMCVMultiScaleDeformableAttention
"""
    assert run_alone(code, path=tmp_path) == ""


# The mmdet-style backbone


@pytest.mark.parametrize(("kind", "per_tap"), [("DCNv2", 3), ("DCN", 2)])
def test_state_dict_is_mmdets(kind, per_tap):
    dcn = dict(DCNV2, type=kind)
    cfg = dict(type="dcn_plugin.DCNResNet", depth=50, dcn=dcn, stage_with_dcn=(False, True, True, True))
    model = MODELS.build(cfg)
    expected = {key: [9 * per_tap, *shape[1:]] if ".conv_offset." in key else shape for key, shape in LAYOUT.items()}
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())
    assert dcn == dict(DCNV2, type=kind)


def torchvision_maps(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    ("depth", "dcn"),
    [
        (18, None),
        (50, None),
        (18, dict(type="DCN")),
        (50, dict(type="DCN")),
        (50, dict(type="DCNv2", mask_activation="2*sigmoid", deform_groups=2)),
    ],
)
def test_computes_what_torchvision_computes(depth, dcn):
    torch.manual_seed(0)
    reference = randomise_norms(torchvision.models.get_model(f"resnet{depth}"))
    model = DCNResNet(depth, dcn=dcn, norm_eval=False).eval()
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(".conv_offset." in key for key in result.missing_keys)
    assert len(dcn_names(model)) == (0 if dcn is None else {18: 6, 50: 13}[depth])
    with torch.no_grad():
        for ours, theirs in zip(model(images()), torchvision_maps(reference, images()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_deep_stem_and_average_pooled_shortcuts_are_resnet_d():
    torch.manual_seed(0)
    reference = randomise_norms(timm.create_model("resnet50d"))
    model = DCNResNet(50, deep_stem=True, avg_down=True).eval()
    state = {}
    for key, value in reference.state_dict().items():
        stem = key.replace("conv1.", "stem.", 1) if key.startswith("conv1.") else key.replace("bn1.", "stem.7.", 1)
        state[stem if key.startswith(("conv1.", "bn1.")) else key] = value
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    with torch.no_grad():
        torch.testing.assert_close(model(images())[-1], reference.forward_features(images()), rtol=1e-4, atol=1e-4)


def test_masks_start_at_one_half_as_in_mmcv():
    model = DCNResNet(dcn=DCNV2, **SMALL)
    assert {layer.mask_activation for layer in model.modules() if isinstance(layer, DCNv2)} == {"sigmoid"}


@pytest.mark.parametrize(("style", "plain"), [("pytorch", ["layer2.0", "layer3.0", "layer4.0"]), ("caffe", [])])
def test_fallback_on_stride_goes_by_stride(style, plain):
    dcn = dict(DCNV2, fallback_on_stride=True)
    model = DCNResNet(50, style=style, dcn=dcn)
    blocks = [f"layer{stage}.{index}" for stage, count in ((2, 4), (3, 6), (4, 3)) for index in range(count)]
    assert dcn_names(model) == [f"{block}.conv2" for block in blocks if block not in plain]
    assert dcn == dict(DCNV2, fallback_on_stride=True)
    block = model.layer2[0]
    strides = (1, 2) if style == "pytorch" else (2, 1)
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    assert model(images())[1].shape[-1] == 8


def test_stages_and_geometry():
    model = DCNResNet(
        **SMALL,
        in_channels=1,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 2),
        out_indices=(0, 2),
        dcn=DCNV2,
        stage_with_dcn=(True, False, False),
    )
    assert dcn_names(model) == ["layer1.0.conv2", "layer1.1.conv2"]
    assert [tuple(m.shape[1:]) for m in model(images(channels=1))] == [(8, 16, 16), (32, 8, 8)]
    assert model.layer3[1].conv1.dilation == (2, 2)


def test_frozen_stages_and_norm_eval():
    model = DCNResNet(**SMALL, frozen_stages=1, dcn=DCNV2).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("conv1.", "bn1.", "layer1."))}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert not any(norm.training for norm in norms.values())
    assert model.layer2.training and not model.layer1.training

    model = DCNResNet(**SMALL, frozen_stages=0, norm_eval=False).train()
    training = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert training == set(norms) - {"bn1"}
    assert not model.conv1.weight.requires_grad and model.layer1[0].conv1.weight.requires_grad
    assert not any(module.training for module in model.eval().modules())


def test_recomputation_changes_nothing():
    torch.manual_seed(0)
    model = randomise_norms(DCNResNet(**SMALL, dcn=DCNV2))
    again = copy.deepcopy(model)
    for module in again.modules():
        if hasattr(module, "with_cp"):
            module.with_cp = True
    results = []
    for candidate in (model, again):
        maps = candidate(images())
        sum(m.square().sum() for m in maps).backward()
        results.append([*maps, *(parameter.grad for parameter in candidate.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_norm_cfg():
    group_norm = DCNResNet(**SMALL, norm_cfg=dict(type="GN", num_groups=4))
    assert {"gn1.weight", "layer1.0.gn2.bias", "layer2.0.downsample.1.weight"} <= set(group_norm.state_dict())
    assert group_norm(images())[0].shape == (2, 8, 16, 16)
    fixed = DCNResNet(**SMALL, norm_cfg=dict(type="BN", requires_grad=False, eps=1e-3))
    assert fixed.bn1.eps == 1e-3
    assert not any(parameter.requires_grad for name, parameter in fixed.named_parameters() if ".bn" in name)


def test_keys_of_older_checkpoints_load():
    torch.manual_seed(0)
    model = DCNResNet(**SMALL, dcn=DCNV2)
    for name in dcn_names(model):
        nn.init.normal_(model.get_submodule(name).conv_offset.weight)
    old = {key.replace(".conv_offset.", "_offset."): value for key, value in model.state_dict().items()}
    assert "layer2.0.conv2_offset.weight" in old
    again = DCNResNet(**SMALL, dcn=DCNV2)
    again.load_state_dict(old)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)


def test_init_cfg(tmp_path):
    source = randomise_norms(DCNResNet(**SMALL))
    file = tmp_path / "plain.pth"
    torch.save(source.state_dict(), file)
    model = DCNResNet(**SMALL, dcn=DCNV2, init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    model.init_weights()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    model = DCNResNet(**SMALL, dcn=DCNV2, init_cfg=[dict(type="Constant", layer="Conv2d", val=0.5)])
    model.init_weights()
    assert (model.conv1.weight == 0.5).all()
    assert not model.layer2[0].conv2.conv_offset.weight.any()


# timm models by config


def test_timm_backbone():
    cfg = dict(type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", out_indices=(2, 3, 4), dcn_stages=(5,))
    backbone = MODELS.build(cfg)
    maps = backbone(images())
    assert isinstance(maps, tuple) and [m.shape[1] for m in maps] == backbone.channels == [128, 256, 512]
    assert [64 // m.shape[-1] for m in maps] == backbone.reductions == [8, 16, 32]
    assert len(dcn_names(backbone)) == 2
    classifier = MODELS.build(dict(type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", features_only=False))
    assert classifier(images()).shape == (2, 1000)
    with pytest.raises(ValueError, match="out_indices"):
        TimmBackbone("resnet18_dcn", features_only=False, out_indices=(1,))


@pytest.mark.parametrize("features_only", [True, False])
def test_timm_backbone_takes_base_weights_from_a_file(tmp_path, features_only):
    torch.manual_seed(0)
    reference = randomise_norms(timm.create_model("resnet18"))
    torch.save(reference.state_dict(), tmp_path / "base.pth")
    cfg = dict(type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", features_only=features_only)
    with torch.no_grad():
        out = MODELS.build(dict(cfg, checkpoint_path=str(tmp_path / "base.pth"))).eval()(images())
        expected = reference.forward_features(images()) if features_only else reference(images())
    torch.testing.assert_close(out[-1] if features_only else out, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        MODELS.build(dict(cfg, checkpoint_path="absent.pth"))


def test_runner_does_not_draw_timm_weights_again():
    class Wrapper(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = TimmBackbone("resnet18_dcn")

        def forward(self, inputs):
            return self.backbone(inputs)

    model = Wrapper()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# Training


@MODELS.register_module()
class DCNPluginTestClassifier(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.LazyLinear(2)
        self(images(32))

    def forward(self, inputs, labels=None, mode="tensor"):
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        return logits if labels is None else dict(loss=F.cross_entropy(logits, labels))


class Dots(torch.utils.data.Dataset):
    """Images that are bright or dark."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(index % 2)), torch.tensor(index % 2)


CONFIG = """
default_scope = "dcn_plugin"
model = dict(
    type="mmengine.DCNPluginTestClassifier",
    backbone=dict(type="DCNResNet", depth=18, base_channels=8, dcn=dict(type="DCNv2"), norm_eval=False),
)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
    paramwise_cfg=dict(custom_keys={"conv_offset": dict(lr_mult=0.1)}),
)
param_scheduler = dict(type="MultiStepLR", milestones=[1], gamma=0.5, end=10)
custom_hooks = [dict(type="WeightsOnlyCheckpointHook")]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1))
env_cfg = dict(mp_cfg=dict(mp_start_method="spawn"))
log_level = "WARNING"
"""


def build_runner(folder, epochs, **overrides):
    (folder / "config.py").write_text(CONFIG)
    cfg = Config.fromfile(folder / "config.py")
    cfg.merge_from_dict(dict(work_dir=str(folder / "work"), experiment_name=f"run{epochs}", **overrides))
    cfg.train_cfg = dict(by_epoch=True, max_epochs=epochs)
    runner_args = {key: cfg[key] for key in cfg if key not in ("model", "optim_wrapper")}
    loader = torch.utils.data.DataLoader(Dots(), batch_size=4)
    return Runner(model=cfg.model, optim_wrapper=cfg.optim_wrapper, train_dataloader=loader, cfg=cfg, **runner_args)


def test_offset_learning_rate_by_custom_keys():
    model = DCNResNet(**SMALL, dcn=DCNV2)
    cfg = Config(dict(cfg=eval(CONFIG.split("optim_wrapper = ")[1].split("param_scheduler")[0]))).cfg
    optimizer = build_optim_wrapper(model, cfg).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(group["params"][0])]: group["lr"] for group in optimizer.param_groups}
    assert set(rates) == set(names.values())
    for name, rate in rates.items():
        assert rate == pytest.approx(0.01 if ".conv_offset." in name else 0.1), name


def test_runner_trains_saves_and_resumes_under_weights_only(tmp_path):
    runner = build_runner(tmp_path, epochs=1)
    before = copy.deepcopy(runner.model.state_dict())
    runner.train()
    changed = [key for key, value in runner.model.state_dict().items() if not torch.equal(value, before[key])]
    assert {"backbone.layer2.0.conv2.weight", "backbone.layer2.0.conv2.conv_offset.weight"} <= set(changed)

    file = tmp_path / "work" / "epoch_1.pth"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["meta"]["epoch"] == 1 and checkpoint["state_dict"].keys() == before.keys()

    resumed = build_runner(tmp_path, epochs=2, resume=True, load_from=str(file))
    resumed.train()
    assert (resumed.epoch, resumed.iter) == (2, 4)
    loss, counts = resumed.message_hub.get_scalar("train/loss").data
    assert len(loss) == len(counts) == 4, "the log history of the first epoch was lost"
    first, _ = runner.message_hub.get_scalar("train/loss").data
    assert loss[:2].tolist() == first.tolist()
    assert resumed.optim_wrapper.get_lr()["lr"][0] == pytest.approx(0.05)

    loaded = build_runner(tmp_path, epochs=3, load_from=str(file), custom_hooks=[])
    loaded.load_or_resume()
    for key, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, checkpoint["state_dict"][key])
