"""mm* training recipes reach what predicts our offsets as they reach mmcv's, or say that they do not."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.logging import MMLogger  # noqa: E402
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper  # noqa: E402
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope  # noqa: E402

from dcn_plugin import registry  # noqa: E402
from dcn_plugin.layers import DCNv1, DCNv2, DeformPSRoIPoolPack, DeformRoIPoolPack  # noqa: E402

OURS = "dcn_plugin.OptimWrapperConstructor"
LR, DECAY = 1.0, 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(DCNv2(8, 8, 3), nn.Sequential(DCNv1(8, 8, 3)))
        self.pool = DeformRoIPoolPack(2, 8, deform_fc_channels=4)
        self.ps = DeformPSRoIPoolPack(2, 2, 2, deform_fc_channels=4, modulated=True)


def groups(constructor, model=None, optimizer=None, **paramwise):
    """Rate and decay of every parameter by its name."""
    model = model or Model()
    config = dict(optimizer=optimizer or dict(type="SGD", lr=LR, weight_decay=DECAY), paramwise_cfg=paramwise)
    if constructor:
        config["constructor"] = constructor
    optimizer = build_optim_wrapper(model, config).optimizer
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(found) == len(names)
    return {name: (found[id(p)]["lr"], found[id(p)]["weight_decay"]) for name, p in names.items()}


@pytest.fixture
def said():
    """Warnings of MMEngine's logger."""
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    logger, handler = MMLogger.get_current_instance(), Keep()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


CONV_OFFSETS = ["block.0.conv_offset", "block.1.0.conv_offset"]


@pytest.mark.parametrize("scope", [None, "dcn_plugin"])
def test_dcn_offset_lr_mult_reaches_every_conv_offset_and_nothing_else(scope, said):
    if scope is None:
        found = groups(OURS, dcn_offset_lr_mult=0.1)
    else:
        with DefaultScope.overwrite_default_scope(scope):
            found = groups("OptimWrapperConstructor", dcn_offset_lr_mult=0.1)
    for name, (rate, decay) in found.items():
        assert rate == (0.1 * LR if "conv_offset" in name else LR) and decay == DECAY, name
    assert said == []


def test_rules_for_biases_leave_out_those_of_conv_offset():
    found = groups(OURS, bias_lr_mult=2.0, bias_decay_mult=0.0, flat_decay_mult=0.5)
    for name, (rate, decay) in found.items():
        if name.endswith(".bias") and "conv_offset" not in name and "norm" not in name:
            # RoI branches of mmcv's layers are not left out either.
            assert (rate, decay) == (2.0 * LR, 0.0), name
        elif name.startswith("norm"):
            assert rate == LR
        else:
            assert (rate, decay) == (LR, DECAY), name


def test_both_rules_together_give_the_offsets_their_own():
    """As MMEngine documents for mmcv's layers: dcn_offset_lr_mult overrides bias_lr_mult."""
    found = groups(OURS, bias_lr_mult=2.0, dcn_offset_lr_mult=0.1)
    assert {found[f"{layer}.{kind}"][0] for layer in CONV_OFFSETS for kind in ("weight", "bias")} == {0.1 * LR}
    assert found["block.0.bias"][0] == 2.0 * LR


def test_branches_of_regions_have_a_key_of_their_own():
    found = groups(OURS, roi_offset_lr_mult=0.01, dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    for name, (rate, _) in found.items():
        if "_fc" in name:
            assert rate == pytest.approx(0.01 * LR), name
    assert found["block.0.conv_offset.weight"][0] == 0.1 * LR


def test_custom_keys_come_first():
    keys = {"block.0": dict(lr_mult=3.0, decay_mult=0.0)}
    found = groups(OURS, dcn_offset_lr_mult=0.1, bias_lr_mult=2.0, custom_keys=keys)
    assert {found[name] for name in found if name.startswith("block.0.")} == {(3.0 * LR, 0.0)}
    assert found["block.1.0.conv_offset.bias"][0] == 0.1 * LR


def test_rfcns_fields_of_offsets_count_as_offsets_of_convolutions():
    pytest.importorskip("torchvision")
    from dcn_plugin.detection.rfcn import PSRoIMaps

    model = PSRoIMaps(4, 3, stride=1, group_size=2, conv_channels=8, deformable=True)
    found = groups(OURS, model, dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    for name, (rate, _) in found.items():
        assert rate == (0.1 * LR if "_offsets" in name else 2.0 * LR if name.endswith("bias") else LR), name


def test_a_layer_is_a_model_and_what_is_wrapped_is_unwrapped():
    found = groups(OURS, DCNv2(8, 8, 3), dcn_offset_lr_mult=0.1)
    assert found["conv_offset.weight"][0] == 0.1 * LR and found["weight"][0] == LR
    wrapped = nn.Module()
    wrapped.module = DCNv2(8, 8, 3)
    assert groups(OURS, wrapped, dcn_offset_lr_mult=0.1)["module.conv_offset.bias"][0] == 0.1 * LR


def test_without_rules_and_for_a_plain_model_it_is_mmengines(said):
    assert set(groups(OURS).values()) == {(LR, DECAY)}
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    rules = dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0, norm_decay_mult=0.0)
    assert groups(OURS, plain, **rules) == groups(None, plain, **rules)
    assert said == []


# -- the plain one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("dcn_offset_lr_mult", "is not applied to it (block.0.conv_offset.weight and 3 more)"),
        ("bias_lr_mult", "reaches its bias, which it leaves out in mmcv's layers"),
        ("bias_decay_mult", "reaches its bias"),
        ("flat_decay_mult", "reaches its bias"),
        ("roi_offset_lr_mult", "is not applied to it (pool.offset_fc.0.weight"),
    ],
)
def test_the_plain_constructor_says_what_it_does_not_apply(key, words, said):
    groups(None, **{key: 0.1})
    (message,) = said
    assert f"paramwise_cfg's {key} {words}" in message and OURS in message


@pytest.mark.parametrize(
    "rules",
    [dict(), dict(norm_decay_mult=0.0), dict(dcn_offset_lr_mult=0.1, custom_keys={"conv_offset": dict(lr_mult=0.1)})],
)
def test_nothing_is_said_where_nothing_differs(rules, said):
    groups(None, **rules)
    groups(None, nn.Sequential(nn.Conv2d(4, 4, 3)), dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    assert said == []


def test_constructors_of_other_packages_are_watched_by_what_they_inherit(said):
    class LayerDecay(DefaultOptimWrapperConstructor):
        """Rules of its own, as the layer decay of mm* packages."""

        def add_params(self, params, module, **kwargs):
            params += [dict(params=[p], lr=self.base_lr, weight_decay=0.0) for p in module.parameters()]

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecay, name="DCNPluginTestLayerDecay")
    try:
        groups("DCNPluginTestLayerDecay", bias_lr_mult=2.0, decay_rate=0.9)
        assert said == []
        groups("DCNPluginTestLayerDecay", dcn_offset_lr_mult=0.1)
        assert len(said) == 1 and said[0].startswith("LayerDecay does not know")
    finally:
        OPTIM_WRAPPER_CONSTRUCTORS.module_dict.pop("DCNPluginTestLayerDecay")


def test_rates_of_the_plain_constructor_are_left_as_they_are_and_watching_can_be_undone(said):
    before = OPTIM_WRAPPER_CONSTRUCTORS.build_func
    watched = groups(None, dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    assert len(said) == 2
    registry.stop_watching_constructors()
    try:
        assert OPTIM_WRAPPER_CONSTRUCTORS.build_func is before.__wrapped__
        assert groups(None, dcn_offset_lr_mult=0.1, bias_lr_mult=2.0) == watched
        assert len(said) == 2
    finally:
        OPTIM_WRAPPER_CONSTRUCTORS.build_func = before


def test_a_step_is_taken_with_the_rates():
    model = DCNv2(2, 2, 3, padding=1)
    config = dict(constructor=OURS, optimizer=dict(type="SGD", lr=LR), paramwise_cfg=dict(dcn_offset_lr_mult=0.0))
    wrapper = build_optim_wrapper(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = []
    model.conv_offset.weight.register_hook(lambda gradient: gradients.append(bool(gradient.any())))
    wrapper.update_params(model(torch.rand(1, 2, 6, 6)).square().sum())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"weight", "bias"} and gradients == [True]
