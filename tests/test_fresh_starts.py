"""Offsets that start at zero stay there, whatever framework initialises the model around them; what is loaded, is."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import dcn_plugin
from dcn_plugin.detection import MultiScaleDeformRoIPool
from dcn_plugin.detection.rfcn import PSRoIMaps
from dcn_plugin.layers import (
    DCNv1,
    DCNv2,
    DeformConv2d,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
)

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoModelForImageClassification,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    PretrainedConfig,
    PreTrainedModel,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    initialization,
)


class OurConfig(PretrainedConfig):
    model_type = "ours"


TINY = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
RNG = torch.Generator().manual_seed(0)
IMAGES = torch.rand(2, 3, 64, 64, generator=RNG)
ROIS = torch.tensor([[0, 1.0, 2.0, 30.0, 28.0]])


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def offsets(model):
    return {name: p for name, p in model.named_parameters() if "conv_offset" in name}


def assert_zero(model):
    assert len(offsets(model)) >= 4
    assert not [name for name, p in offsets(model).items() if p.any()]


def plain_weights():
    """Weights of the plain model, in which every layer shows."""
    torch.manual_seed(1)
    model = timm.create_model("resnet18", num_classes=5, zero_init_last=False, **TINY)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return model.eval()


def deformable_weights():
    torch.manual_seed(2)
    model = timm.create_model("resnet18_dcn", num_classes=5, zero_init_last=False, **TINY)
    for p in offsets(model).values():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def wrapper_config(name="resnet18_dcn"):
    return TimmWrapperConfig(architecture=name, num_labels=5, model_args=dict(TINY))


def saved(model, folder):
    """What transformers' wrapper of a timm model stores."""
    name = "resnet18_dcn" if offsets(model) else "resnet18"
    wrapper = AutoModelForImageClassification.from_config(wrapper_config(name))
    wrapper.timm_model.load_state_dict(model.state_dict())
    wrapper.save_pretrained(folder)
    return folder


# -- transformers -----------------------------------------------------------------------------------------------------


def test_wrapper_from_config_starts_at_zero():
    assert_zero(AutoModelForImageClassification.from_config(wrapper_config()))


def test_wrapper_with_the_plain_models_weights_is_the_plain_model(tmp_path):
    plain = plain_weights()
    model = AutoModelForImageClassification.from_pretrained(saved(plain, tmp_path), config=wrapper_config()).eval()
    assert_zero(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).logits, plain(IMAGES), rtol=1e-4, atol=1e-5)


def test_wrapper_loads_offsets_that_are_in_the_file(tmp_path):
    trained = deformable_weights()
    model = AutoModelForImageClassification.from_pretrained(saved(trained, tmp_path), config=wrapper_config()).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).logits, trained(IMAGES), rtol=1e-4, atol=1e-5)
    assert all(p.any() for p in offsets(model).values())


def test_a_part_of_the_offsets_in_the_file(tmp_path):
    """Each tensor by itself: what is in the file is kept, the rest is zero."""
    trained = deformable_weights()
    model = AutoModelForImageClassification.from_config(wrapper_config())
    model.timm_model.load_state_dict(trained.state_dict())
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("conv_offset.bias")}
    model.save_pretrained(tmp_path, state_dict=state)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, config=wrapper_config())
    for name, p in offsets(model.timm_model).items():
        expected = trained.get_parameter(name)
        assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else expected), name


def test_initialising_once_more_keeps_trained_offsets():
    model = AutoModelForImageClassification.from_config(wrapper_config())
    model.timm_model.load_state_dict(deformable_weights().state_dict())
    before = copy.deepcopy(offsets(model))
    for again in (model.init_weights, model.post_init):
        again()
        assert all(torch.equal(p, before[name]) for name, p in offsets(model).items())


def backbone_config():
    return TimmBackboneConfig(backbone="resnet18_dcn", out_indices=(2, 3, 4))


def test_timm_backbone_starts_at_zero():
    assert_zero(TimmBackbone(backbone_config()))
    assert_zero(AutoBackbone.from_config(backbone_config()))


def test_timm_backbone_inside_a_model_whose_file_lacks_the_offsets(tmp_path):
    """The backbone's own initialiser leaves convolutions alone, and so the memory that it was given."""

    class Parent(PreTrainedModel):
        config_class = OurConfig

        def __init__(self, config):
            super().__init__(config)
            self.backbone = AutoBackbone.from_config(backbone_config())
            self.post_init()

    model = Parent(OurConfig())
    model.save_pretrained(tmp_path, state_dict=without(model, "conv_offset"))
    assert_zero(Parent.from_pretrained(tmp_path))


def detr_config():
    return DeformableDetrConfig(
        backbone_config=backbone_config(), num_labels=3, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4,
        num_feature_levels=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def detr():
    torch.manual_seed(0)
    return DeformableDetrForObjectDetection(detr_config())


def without(model, *parts):
    return {k: v for k, v in model.state_dict().items() if not any(part in k for part in parts)}


def test_deformable_detr_starts_at_zero(detr):
    assert_zero(detr)


def test_deformable_detr_from_weights_without_offsets(detr, tmp_path):
    detr.save_pretrained(tmp_path, state_dict=without(detr, "conv_offset"))
    model = DeformableDetrForObjectDetection.from_pretrained(tmp_path, config=detr_config())
    assert_zero(model)
    found = model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in detr.state_dict().items())


def test_deformable_detr_from_weights_with_offsets(detr, tmp_path):
    trained = copy.deepcopy(detr)
    for p in offsets(trained).values():
        nn.init.normal_(p, std=0.1)
    trained.save_pretrained(tmp_path)
    model = DeformableDetrForObjectDetection.from_pretrained(tmp_path, config=detr_config())
    assert all(torch.equal(p, trained.get_parameter(name)) for name, p in offsets(model).items())


def test_a_deformable_weight_that_the_file_lacks_is_drawn_as_convs_are(detr, tmp_path):
    """Not left as uninitialised memory, which transformers gives to whatever it does not know."""
    name = "model.backbone.model.layer2.0.conv2.weight"
    detr.save_pretrained(tmp_path, state_dict=without(detr, name))
    model = DeformableDetrForObjectDetection.from_pretrained(tmp_path, config=detr_config())
    weight = model.get_parameter(name)
    bound = (weight[0].numel()) ** -0.5
    assert weight.abs().max() <= bound and weight.std() > 0.5 * bound / 3**0.5
    assert_zero(model)


class Ours(PreTrainedModel):
    """A user's model, with every layer that predicts offsets inside."""

    config_class = OurConfig

    def __init__(self, config):
        super().__init__(config)
        self.v1 = DCNv1(3, 8, 3)
        self.v2 = DCNv2(8, 8, 3)
        self.pools = nn.ModuleList(
            [
                DeformRoIPoolPack(2, 8, 4),
                ModulatedDeformRoIPoolPack(2, 8, 4),
                DeformPSRoIPoolPack(2, 2, 2, deform_fc_channels=4, modulated=True),
                MultiScaleDeformRoIPool(["0"], 2, 2, in_channels=8, deform_fc_channels=4, modulated=True),
            ]
        )
        self.rfcn = PSRoIMaps(8, 3, stride=4, group_size=2, conv_channels=8, deformable=True)
        self.post_init()


LAST = ("conv_offset", "offset_fc.4", "mask_fc.weight", "mask_fc.bias", "1.mask_fc.2", "_offsets.conv")


def last(model):
    found = {name: p for name, p in model.named_parameters() if any(part in name for part in LAST)}
    assert len(found) == 4 + 4 * 2 + 3 * 2 + 4
    return found


def test_every_kind_of_offset_branch_in_a_model_of_ones_own(tmp_path):
    model = Ours(OurConfig())
    assert not [name for name, p in last(model).items() if p.any()]
    assert model.pools[0].offset_fc[0].weight.std() < 0.05, "transformers' initialiser ran"
    for p in last(model).values():
        nn.init.normal_(p)
    full, part = tmp_path / "full", tmp_path / "part"
    model.save_pretrained(full)
    assert all(torch.equal(p, last(model)[name]) for name, p in last(Ours.from_pretrained(full)).items())
    model.save_pretrained(part, state_dict=without(model, *LAST))
    assert not [name for name, p in last(Ours.from_pretrained(part)).items() if p.any()]


class Draws(Ours):
    """Knows the layers itself, and means what it draws."""

    def _init_weights(self, module):
        if isinstance(module, DeformConv2d):
            initialization.constant_(module.weight, 0.5)


def test_a_models_own_initialiser_of_deformable_weights_holds(tmp_path):
    model = Draws(OurConfig())
    assert model.v2.weight.eq(0.5).all()
    model.save_pretrained(tmp_path, state_dict=without(model, "v2.weight"))
    loaded = Draws.from_pretrained(tmp_path)
    assert loaded.v2.weight.eq(0.5).all() and loaded.v1.weight.eq(0.5).all()


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_before_a_model_is_finished_are_kept(assign):
    """Built without memory, filled by `load_state_dict`, then handed to transformers."""
    trained = deformable_weights()
    with torch.device("meta"):
        backbone = timm.create_model("resnet18_dcn", num_classes=5, **TINY)
    if not assign:
        backbone.to_empty(device="cpu")
    backbone.load_state_dict(trained.state_dict(), assign=assign)

    class Head(PreTrainedModel):
        config_class = OurConfig

        def __init__(self, config):
            super().__init__(config)
            self.backbone = backbone
            self.post_init()

        def _init_weights(self, module):
            pass

    model = Head(OurConfig())
    for name, p in model.backbone.named_parameters():
        assert torch.equal(p, trained.get_parameter(name)), name


def test_layers_made_of_loaded_convolutions_keep_their_weights():
    conv = nn.Conv2d(3, 4, 3)
    weight = conv.weight.clone()

    class One(PreTrainedModel):
        config_class = OurConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = DCNv2.from_conv(conv)
            self.post_init()

    model = One(OurConfig())
    assert torch.equal(model.layer.weight, weight)
    assert not any(p.any() for p in model.layer.conv_offset.parameters())


# -- other initialisers ------------------------------------------------------------------------------------------------

REDRAWN = "is expected to start at zero, but it has been drawn"


def draw(model):
    """What initialisers of whole models do."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


CALLS = {
    "DCNv1": (lambda: DCNv1(3, 4, 3), lambda layer: layer(IMAGES), ["conv_offset"]),
    "DCNv2": (lambda: DCNv2(3, 4, 3), lambda layer: layer(IMAGES), ["conv_offset"]),
    "offsets": (lambda: DCNv2(3, 4, 3), lambda layer: layer.offsets(IMAGES), ["conv_offset"]),
    "DeformRoIPoolPack": (
        lambda: DeformRoIPoolPack(2, 3, 4), lambda layer: layer(IMAGES, ROIS), ["offset_fc.4"],
    ),
    "ModulatedDeformRoIPoolPack": (
        lambda: ModulatedDeformRoIPoolPack(2, 3, 4), lambda layer: layer(IMAGES, ROIS), ["offset_fc.4", "mask_fc.2"],
    ),
    "DeformPSRoIPoolPack": (
        lambda: DeformPSRoIPoolPack(3, 1, 2, deform_fc_channels=4, modulated=True),
        lambda layer: layer(IMAGES, ROIS), ["offset_fc.4", "mask_fc"],
    ),
    "MultiScaleDeformRoIPool": (
        lambda: MultiScaleDeformRoIPool(["0"], 2, 2, in_channels=3, deform_fc_channels=4),
        lambda layer: layer({"0": IMAGES}, [ROIS[:, 1:]] * 2, [(64, 64)] * 2), ["offset_fc.4"],
    ),
}  # fmt: skip


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if REDRAWN in str(w.message)]


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_warns_once_of_offsets_that_an_initialiser_drew(name):
    make, call, parts = CALLS[name]
    torch.manual_seed(0)
    layer = draw(make())
    messages = warned(lambda: call(layer))
    assert [m.split(": the weight of ")[1].split(" is")[0] for m in messages] == parts
    assert all(f"call {part}.reset_parameters()" in m for part, m in zip(parts, messages, strict=True))
    assert not warned(lambda: call(layer)), "once for each layer"
    assert not warned(lambda: call(make())), "a fresh one starts where it should"


def test_training_and_loading_give_no_warning():
    torch.manual_seed(0)
    layer = DCNv2(3, 4, 3)
    layer(IMAGES).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 1e-2).step()
    assert layer.conv_offset.weight.any()
    fresh = DCNv2(3, 4, 3)
    fresh.load_state_dict(layer.state_dict())
    for one in (layer, fresh, copy.deepcopy(layer)):
        assert not warned(lambda one=one: one(IMAGES))


def test_the_remedy_that_the_warning_names():
    model = timm.create_model("resnet18", num_classes=3, **TINY)
    plain = copy.deepcopy(model)
    dcn_plugin.convert(model, dict(match="layer[2-4].*.conv2", layer=dict(type="DCNv2")))
    model.init_weights()  # timm's own: draws every nn.Conv2d
    assert warned(lambda: model(IMAGES))
    for module in model.modules():
        if isinstance(module, DCNv2):
            module.conv_offset.reset_parameters()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "conv_offset" not in k})
    torch.testing.assert_close(model.eval()(IMAGES), plain.eval()(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_compiled_graph_does_not_look():
    torch._dynamo.reset()
    layer = draw(DCNv2(3, 4, 3))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert not warned(lambda: compiled(IMAGES))
    assert warned(lambda: layer(IMAGES)), "the first eager call does"


def test_reset_works_while_a_framework_has_torchs_initialisers_replaced(monkeypatch):
    monkeypatch.setattr(nn.init, "zeros_", lambda tensor: tensor)
    layer = draw(DCNv2(3, 4, 3))
    layer.conv_offset.reset_parameters()
    assert not any(p.any() for p in layer.conv_offset.parameters())
