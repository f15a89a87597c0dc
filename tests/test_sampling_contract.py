"""A layer of a new kind that keeps the contract of `layers/sampling.py` takes part in everything, by that alone."""

import copy
import logging
from typing import ClassVar

import pytest
import torch
from torch import nn

import dcn_plugin
from dcn_plugin.layers import (
    LAYERS,
    DCNv2,
    OffsetPredictor,
    SamplingConv,
    SamplingModule,
    ZeroLinear,
    offset_parameters,
    regions_of,
    reset_offsets,
    sampling_layers,
    warn_if_redrawn,
)
from dcn_plugin.ops import deform_conv2d, deform_roi_pool
from dcn_plugin.visualize import dilation_by_layer, record, record_bins

torch.fx.wrap("deform_conv2d")
NAME = "Stretched"
RULE = dict(match="*.conv2", layer=dict(type=NAME, limit=2.0))


class Stretched(SamplingConv):
    """A convolution whose taps lie `1 + stretch(x)` times as far from the middle of its window: a predicted scale."""

    drop_in = True
    offset_branches: ClassVar[dict[str, float]] = {"stretch": 0.25}

    def __init__(self, *args, limit=1.0, **options):
        super().__init__(*args, **options)
        self.limit = limit
        window, factory = self.window, dict(device=self.weight.device, dtype=self.weight.dtype)
        self.stretch = OffsetPredictor(
            self.in_channels, self.offset_groups, window.kernel_size, window.stride, window.padding[:2],
            window.dilation, **factory,
        )  # fmt: skip

    def offsets(self, x):
        warn_if_redrawn(self)
        taps = self.window.taps().to(x)
        moves = (
            self.stretch(x).clamp(-self.limit, self.limit)[:, :, None, None] * (taps - taps.mean(0))[..., None, None]
        )
        return moves.flatten(1, 3), None

    def forward(self, x):
        offset, _ = self.offsets(x)
        self.tell_hooks(x, offset)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding4, self.dilation)

    def former_keys(self, state, prefix):
        """`scale_conv` of an implementation before."""
        keys = {f"{prefix}scale_conv.{kind}": f"{prefix}stretch.{kind}" for kind in ("weight", "bias")}
        renamed = {old: new for old, new in keys.items() if old in state and new not in state}
        for old, new in renamed.items():
            state[new] = state.pop(old)
        return renamed

    def former_note(self, renamed):
        return "" if self.limit == 2.0 else "scale_conv was trained with limit=2.0"

    def explain_mismatch(self, name, shape):
        return f"{name} of {list(shape)} scales {shape[0]} groups" if name.endswith("stretch.weight") else ""


class Nudged(SamplingModule):
    """Pooling whose regions move as a whole, by a part of their size that the mean of the map predicts."""

    offset_unit = "region"
    offset_branches: ClassVar[dict[str, float]] = {"nudge": 0.01}
    offset_lr_option = "roi_offset_lr_mult"
    displacement_scale = 0.5

    def __init__(self, channels):
        super().__init__()
        self.nudge = nn.Sequential(nn.Linear(channels, 3), nn.ReLU(), ZeroLinear(3, 2))

    def offsets(self, x, rois):
        moves = self.nudge(x.mean((2, 3)))[rois[:, 0].long()]
        return moves[:, :, None, None].expand(-1, -1, 2, 2), None

    def forward(self, x, rois):
        offset, _ = self.offsets(x, rois)
        self.tell_hooks(x, offset, rois=rois)
        return deform_roi_pool(x, rois, offset, output_size=2, sampling_ratio=1, gamma=self.displacement_scale)

    def regions(self, samples):
        def frame(rois):
            return rois[:, [2, 1]], rois[:, [4, 3]] - rois[:, [2, 1]]

        return regions_of(samples, (2, 2), frame)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ROIS = torch.tensor([[0.0, 2.0, 2.0, 10.0, 6.0], [1.0, 0.0, 4.0, 4.0, 12.0]])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(LAYERS, NAME, Stretched)


def converted(**options):
    model = nn.Sequential(Block())
    dcn_plugin.convert(model, {**RULE, "layer": RULE["layer"] | options})
    return model


def stretched(model, by=0.5):
    for layer in sampling_layers(model).values():
        nn.init.constant_(layer.stretch.bias, by)
    return model


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NAME, Stretched], ids=["name", "class"])
def test_convert_puts_it_in_a_convolutions_place(kind):
    model = nn.Sequential(Block())
    before, weight = model(IMAGES), model[0].conv2.weight
    report = dcn_plugin.convert(model, dict(match="*.conv2", layer=dict(type=kind, limit=2.0)), (3, 12, 12))
    layer = model[0].conv2
    assert type(layer) is Stretched and layer.weight is weight and layer.limit == 2.0
    assert torch.allclose(model(IMAGES), before, atol=1e-6)
    # One output of a 3x3 convolution over 4 channels, at 12 x 12 positions.
    assert report.params_added == 4 * 9 + 1 and report.macs_added == 4 * 9 * 144
    assert "Stretched(offset_groups=1, limit=2.0)" in str(report)
    with pytest.raises(TypeError, match="'0.conv2' is deformable already"):
        dcn_plugin.convert(model, RULE)


def test_its_options_are_told():
    with pytest.raises(
        ValueError, match=r"options of Stretched out of offset_groups, limit, got 'limt' \(did you mean"
    ):
        dcn_plugin.convert(nn.Sequential(Block()), dict(match="*.conv2", layer=dict(type=NAME, limt=1)))


def test_stretched_it_is_a_convolution_of_a_larger_dilation():
    """What the toy itself promises: half as far again is dilation 3 in place of 2."""
    model = stretched(converted())
    layer = model[0].conv2
    x = torch.rand(1, 4, 12, 12)
    wanted = nn.functional.conv2d(x, layer.weight, layer.bias, padding=3, dilation=3)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


# -- rates -------------------------------------------------------------------------------------------------------------


def test_its_rate_is_a_quarter_of_the_offsets_and_pooling_has_its_own():
    pytest.importorskip("pytorch_lightning")
    from dcn_plugin.finetune.module import param_groups

    model = nn.ModuleDict(dict(toy=converted(), pool=Nudged(4), known=DCNv2(4, 4, 3), rest=nn.Linear(2, 2)))
    usual = {name: 0.25 if "stretch" in name else 0.01 if "nudge" in name else 1.0 for name in offset_parameters(model)}
    assert usual == offset_parameters(model) and len(usual) == 2 + 4 + 2
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, offset_lr_mult=0.1, roi_offset_lr_mult=0.3)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    for name, scale in scales.items():
        wanted = 0.1 * 0.25 if "stretch" in name else 0.3 if "nudge" in name else 0.1 if "conv_offset" in name else 1.0
        assert scale == pytest.approx(wanted), name


def test_mmengines_constructor_gives_it_the_same_rates():
    pytest.importorskip("mmengine")
    from mmengine.optim import build_optim_wrapper

    model = nn.ModuleDict(dict(toy=converted(), pool=Nudged(4), rest=nn.Linear(2, 2)))
    config = dict(
        constructor="dcn_plugin.OptimWrapperConstructor", optimizer=dict(type="SGD", lr=2.0),
        paramwise_cfg=dict(dcn_offset_lr_mult=0.1, roi_offset_lr_mult=0.3, bias_lr_mult=5.0),
    )  # fmt: skip
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        bias = 5.0 if name.endswith("bias") else 1.0
        wanted = 0.1 * 0.25 if "stretch" in name else 0.3 if "nudge" in name else bias
        assert rates[id(parameter)] == pytest.approx(2.0 * wanted), name


# -- watching and drawing ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|isinstance.treespec)")
def test_it_is_fine_tuned_with_its_rate_and_watched(tmp_path):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("torchmetrics")
    import tiny

    from dcn_plugin.finetune import OffsetMonitor

    plain = dict(tiny.CLASSIFIER, name="resnet18", zero_init_last=False)  # which would hold gradients back
    module = tiny.classifier(
        plain, rules=[dict(RULE, match="layer1.0.conv2")], optimizer=dict(opt="sgd", lr=0.1, offset_lr_mult=0.5)
    )
    stretched(module)
    trainer = tiny.trainer(tmp_path, callbacks=[OffsetMonitor(every_n_steps=1)], limit_train_batches=1)
    trainer.fit(module, tiny.image_loader(count=2))
    seen = {key.rpartition("/")[2]: float(value) for key, value in trainer.callback_metrics.items() if "offset/" in key}
    # Half the distance of eight taps from the middle one: four of 1, four of the root of 2.
    assert seen["mean"] == pytest.approx(0.5 * (4 + 4 * 2**0.5) / 9) and seen["max"] == pytest.approx(0.5 * 2**0.5)
    assert seen["dilation"] == pytest.approx(1.5)
    scales = {group["lr_scale"] for group in trainer.optimizers[0].param_groups}
    assert scales == {1.0, 0.5 * 0.25}
    assert module.model.layer1[0].conv2.stretch.weight.any()


def test_its_points_are_drawn():
    model = stretched(converted())
    (item,) = record(model, IMAGES)
    ys = {round(float(y), 4) for y in item.positions(6, 6)[:, 0]}
    assert item.name == "0.conv2" and ys == {3.0, 6.0, 9.0}
    assert dilation_by_layer(model, IMAGES)["0.conv2"].mean() == pytest.approx(3.0)
    pytest.importorskip("matplotlib")
    figure = dcn_plugin.visualize.sampling_points(model, IMAGES[0], layers=["0.conv2"])
    assert figure.axes[0].collections


def test_the_bins_of_its_regions_are_drawn():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = Nudged(3)

        def forward(self, x):
            return self.pool(x, ROIS)

    model = Model()
    nn.init.constant_(model.pool.nudge[-1].bias, 0.25)
    (item,) = record_bins(model, IMAGES)
    # The first region is 4 high and 8 wide, and moves by an eighth of that.
    assert item.bins[0, 0, 0].tolist() == [3.0, 4.0]
    assert (item.shifted() - item.bins)[0, 1, 1].tolist() == pytest.approx([0.5, 1.0])


# -- state dicts and starts --------------------------------------------------------------------------------------------


def test_files_of_before_load_under_its_former_names(caplog):
    source = stretched(converted())
    old = {name.replace("stretch", "scale_conv"): value for name, value in source.state_dict().items()}
    model = converted(limit=1.5)
    report = dcn_plugin.load_checkpoint(model, old)
    assert report.renamed["0.conv2.scale_conv.bias"] == "0.conv2.stretch.bias"
    assert "scale_conv was trained with limit=2.0" in report.notes
    other = converted(limit=1.5)
    with caplog.at_level(logging.WARNING, "dcn_plugin"):
        other.load_state_dict(dict(old))
    assert "scale_conv.bias -> 0.conv2.stretch.bias" in caplog.text and "limit=2.0" in caplog.text
    for loaded in (model, other):
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_it_says_why_a_tensor_does_not_fit():
    state = converted(offset_groups=2).state_dict()
    for load in (dcn_plugin.load_checkpoint, nn.Module.load_state_dict):
        with pytest.raises(RuntimeError, match=r"0.conv2.stretch.weight of \[2, 4, 3, 3\] scales 2 groups"):
            load(converted(), copy.copy(state))


def test_offsets_go_back_to_their_start():
    model = nn.ModuleList([stretched(converted()), Nudged(3)])
    nn.init.ones_(model[1].nudge[-1].weight)
    hidden = model[1].nudge[0].weight.clone()
    reset_offsets(model)
    assert not any(p.any() for p in (*model[0][0].conv2.stretch.parameters(), *model[1].nudge[-1].parameters()))
    assert torch.equal(model[1].nudge[0].weight, hidden) and model[0][0].conv2.weight.any()


def test_timms_initialiser_leaves_it_undeformed():
    timm = pytest.importorskip("timm")
    tiny = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), dcn_layer=dict(type=NAME, limit=2.0))
    model = timm.create_model("resnet18_dcn", **tiny)
    layers = sampling_layers(model)
    assert {type(layer) for layer in layers.values()} == {Stretched}
    before = layers["layer4.0.conv2"].stretch.weight
    stretched(model).init_weights()
    assert not any(p.any() for layer in layers.values() for p in layer.stretch.parameters()) and before.numel()


def test_mmengines_initialisers_leave_it_undeformed():
    pytest.importorskip("mmengine")
    from mmengine.model import initialize

    model = nn.ModuleList([converted(), Nudged(3)])
    drawn = model[0][0].conv1.weight.clone()
    initialize(model, [dict(type="Normal", layer=["Conv2d", "Linear"], std=0.5)])
    assert not torch.equal(model[0][0].conv1.weight, drawn)
    assert not any(p.any() for p in (*model[0][0].conv2.stretch.parameters(), *model[1].nudge[-1].parameters()))


def test_drawn_offsets_are_warned_of():
    model = converted()
    nn.init.normal_(model[0].conv2.stretch.weight)
    with pytest.warns(UserWarning, match="Stretched: the weight of stretch is expected to start at zero"):
        model(IMAGES)


# -- exports -----------------------------------------------------------------------------------------------------------


def test_an_exported_folder_holds_it(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    from dcn_plugin.export.folder import export_model, load_exported

    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3).eval()
    rules = [dict(RULE, match="layer4.0.conv2")]
    dcn_plugin.convert(model, rules)
    folder = export_model(stretched(model), tmp_path / "folder", rules=rules)
    loaded, x = load_exported(folder), torch.rand(1, 3, 64, 64)
    assert type(loaded.layer4[0].conv2) is Stretched and torch.equal(loaded(x), model(x))


def test_it_is_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    from onnx_checks import assert_close, by_definition

    from dcn_plugin.export.onnx import export_onnx

    model = stretched(converted()).eval()
    path = export_onnx(model, (IMAGES,), tmp_path / "model.onnx")
    assert_close(by_definition(path, (IMAGES,)), model(IMAGES).detach())


def test_counters_know_it():
    from dcn_plugin.flops import ptflops_hooks

    layer = Stretched(4, 6, 3, padding=1)
    hook = ptflops_hooks()[Stretched]
    layer.__flops__ = 0
    hook(layer, (torch.rand(1, 4, 5, 5),), layer(torch.rand(1, 4, 5, 5)))
    # Of each of 25 positions: the product, four corners of each sample, and the predictor's one output.
    assert layer.__flops__ == 25 * (6 * 36 + 4 * 36 + 36)


class Weighted(Stretched):
    """With values of its own that its constructor alone knows."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        place = dict(device=self.weight.device, dtype=self.weight.dtype)
        self.gain = nn.Parameter(torch.full((1,), 3.0, **place))
        self.norm = nn.BatchNorm2d(self.out_channels, **place)
        self.register_buffer("scale", torch.full((2,), 7.0, **place))
        self.register_buffer("inner", torch.full((2,), 5.0, **place), persistent=False)

    def forward(self, x):
        return self.norm(super().forward(x) * self.gain)


def test_what_a_constructor_sets_is_there_after_conversion():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    weight, drawn = model[0].weight, torch.random.get_rng_state()
    dcn_plugin.convert(model, dict(match="0", layer=dict(type=Weighted)))
    layer = model[0]
    assert layer.weight is weight and torch.equal(torch.random.get_rng_state(), drawn)
    assert (layer.gain, layer.scale.tolist(), layer.inner.tolist()) == (3.0, [7.0] * 2, [5.0] * 2)
    assert layer.norm.running_var.tolist() == [1.0] * 4 and not layer.stretch.weight.any()
    x = torch.rand(2, 4, 6, 6)
    expected = layer.norm(nn.functional.conv2d(x, layer.weight, layer.bias, padding=1) * 3)
    torch.testing.assert_close(layer(x), expected)


class Renamed(DCNv2):
    """DCNv2 with a predictor more, as a user may subclass it."""

    offset_branches: ClassVar[dict[str, float]] = {"conv_offset": 1.0, "extra": 0.3}

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        place = dict(device=self.weight.device, dtype=self.weight.dtype)
        self.extra = OffsetPredictor(self.in_channels, 2, 1, **place)


def test_every_branch_starts_again():
    layer = Renamed(4, 4, 3)
    for branch in (layer.conv_offset, layer.extra):
        nn.init.ones_(branch.weight)
    layer.reset_parameters()
    assert not layer.conv_offset.weight.any() and not layer.extra.weight.any() and layer.weight.any()


def test_former_names_of_a_branch_that_a_subclass_has_not():
    layer = DCNv2(4, 4, 3)
    del layer.conv_offset
    state = {"x.conv_offset_mask.weight": torch.zeros(1)}
    assert layer.former_keys(state, "x.") == {} and list(state) == ["x.conv_offset_mask.weight"]


def test_symbolic_tracing_records_the_operator():
    model = nn.Sequential(Stretched(4, 4, 3, padding=1))
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_rule_with_a_class_is_refused_by_name_in_a_folder(tmp_path):
    timm = pytest.importorskip("timm")
    from dcn_plugin.export import export_model

    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    rules = [dict(match="layer4.*.conv2", layer=dict(type=Stretched))]
    dcn_plugin.convert(model, rules)
    with pytest.raises(TypeError, match="rules.0.layer.type: expected numbers, strings"):
        export_model(model, tmp_path / "x", rules=rules)
    assert not (tmp_path / "x").exists()
