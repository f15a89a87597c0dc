"""The deformable ResNets against timm's own base models (what holds for every family: test_model_families.py)."""

import copy
import pickle
import re

import pytest
import timm
import torch
from families import MODELS, images
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, group_parameters, save_for_hf
from torch import nn

from dcn_plugin import DCNv1, DCNv2
from dcn_plugin.layers import OffsetConv

LAYERS = {"dcn": DCNv2, "dcnv1": DCNv1}
ENTRIES = [tuple(name.rsplit("_", 1)) for name in MODELS["dcn_resnet"]]


def create(name="resnet18_dcn", **kwargs):
    """A small model whose residual branches all count (timm starts them at zero)."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=kwargs.pop("num_classes", 7), zero_init_last=False, **kwargs).eval()


def dcn_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, OffsetConv)}


def move_samples(model, seed=1):
    """Give every layer offsets and masks of its own, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in dcn_layers(model).values():
        for parameter in layer.conv_offset.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


# Structure and numerics against the base


@pytest.mark.parametrize(("base", "suffix"), ENTRIES, ids=lambda part: part)
def test_entry_is_base_with_other_conv2(base, suffix):
    model = timm.create_model(f"{base}_{suffix}", device="meta")
    reference = timm.create_model(base, device="meta")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    plain = {key: shape for key, shape in shapes.items() if ".conv_offset." not in key}
    assert plain == {key: value.shape for key, value in reference.state_dict().items()}
    deformable = [name for name, _ in reference.named_modules() if re.fullmatch(r"layer[234]\.\d+\.conv2", name)]
    layers = dcn_layers(model)
    assert list(layers) == deformable
    per_tap = 3 if suffix == "dcn" else 2
    for name, layer in layers.items():
        conv = reference.get_submodule(name)
        assert type(layer) is LAYERS[suffix]
        for attribute in ("stride", "padding", "dilation", "groups", "kernel_size"):
            assert getattr(layer, attribute) == getattr(conv, attribute), attribute
        assert layer.conv_offset.weight.shape == (per_tap * 9, conv.in_channels, 3, 3)


@pytest.mark.parametrize(
    ("base", "suffix"),
    [
        ("resnet18", "dcn"),
        ("resnet18", "dcnv1"),
        ("resnet50", "dcn"),
        ("resnet50d", "dcnv1"),
        ("resnext50_32x4d", "dcn"),
        ("wide_resnet50_2", "dcnv1"),
    ],
)
def test_fresh_model_computes_what_base_computes(base, suffix):
    reference, model = create(base), create(f"{base}_{suffix}")
    result = model.load_state_dict(reference.state_dict(), strict=False)
    assert not result.unexpected_keys and all(".conv_offset." in key for key in result.missing_keys)
    with torch.no_grad():
        expected = reference(images())
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(move_samples(model)(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dcn_stages", "stages"),
    [((), ""), ((5,), "4"), ((2, 3, 4, 5), "1234"), (["layer2", "layer4"], "24"), ((3, "layer2"), "2")],
)
def test_dcn_stages(dcn_stages, stages):
    layers = dcn_layers(create(dcn_stages=dcn_stages, device="meta"))
    assert set(layers) == {f"layer{stage}.{i}.conv2" for stage in stages for i in (0, 1)}


def test_dcn_layer_and_offset_groups():
    options = dict(type="DCNv2", mask_activation="sigmoid", offset_bound=4.0)
    for layer in dcn_layers(create(dcn_layer=options, offset_groups=2, device="meta")).values():
        assert (layer.mask_activation, layer.offset_bound, layer.offset_groups) == ("sigmoid", 4.0, 2)
    assert options == dict(type="DCNv2", mask_activation="sigmoid", offset_bound=4.0)
    layers = dcn_layers(create(dcn_layer="DCNv1", device="meta")).values()
    assert all(type(layer) is DCNv1 for layer in layers)


def test_init_weights_keeps_the_plain_start():
    model = move_samples(create())
    model.init_weights()
    for layer in dcn_layers(model).values():
        assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()
        assert layer.weight.any()


# timm's expectations


def test_registered_in_timm():
    bases = {base for base, _ in ENTRIES}
    promised = {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}
    promised |= {"resnet50d", "resnext50_32x4d", "wide_resnet50_2"}
    assert promised <= bases <= set(timm.list_models(module="resnet"))
    assert {(base, suffix) for base in bases for suffix in LAYERS} == set(ENTRIES)
    assert all(timm.is_model_pretrained(name) for name in MODELS["dcn_resnet"])


@pytest.mark.parametrize(("base", "suffix"), ENTRIES, ids=lambda part: part)
def test_pretrained_cfgs_are_the_base_models(base, suffix):
    name = f"{base}_{suffix}"
    ours, theirs = get_arch_pretrained_cfgs(name), get_arch_pretrained_cfgs(base)
    assert [key.partition(".")[2] for key in ours] == [key.partition(".")[2] for key in theirs]
    for cfg, base_cfg in zip(ours.values(), theirs.values(), strict=True):
        got, expected = cfg.to_dict(), base_cfg.to_dict()
        assert got.pop("architecture") == name and expected.pop("architecture") == base
        assert got == expected
        assert f"{name}.{cfg.tag}" in timm.list_pretrained(f"{name}.*")
    default, base_default = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(base)
    assert default.tag == base_default.tag and default.hf_hub_id == base_default.hf_hub_id


def test_features_only():
    model = create(num_classes=7)
    with torch.no_grad():
        expected = model.forward_intermediates(images(), intermediates_only=True)
        extractor = create(features_only=True, out_indices=(1, 2, 4))
        extractor.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
        maps = extractor(images())
    assert extractor.feature_info.channels() == [64, 128, 512]
    assert extractor.feature_info.reduction() == [4, 8, 32]
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 16), (128, 8, 8), (512, 2, 2)]
    for index, feature_map in zip((1, 2, 4), maps, strict=True):
        torch.testing.assert_close(feature_map, expected[index])


def test_fx_features():
    model = create(features_only=True, feature_cls="fx", out_indices=(2, 3, 4))
    assert [tuple(m.shape[1:]) for m in model(images())] == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]


def test_forward_intermediates():
    model = create()
    final, maps = model.forward_intermediates(images(), indices=2)
    torch.testing.assert_close(final, model.forward_features(images()))
    assert [m.shape[1] for m in maps] == [256, 512]


def test_heads():
    model = create(num_classes=0, global_pool="")
    assert model(images()).shape == (2, 512, 2, 2)
    model.reset_classifier(5, "avg")
    assert model(images()).shape == (2, 5) and model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model(images()).shape == (2, 512)
    assert create(in_chans=1)(images(channels=1)).shape == (2, 7)


def test_drop_rates_train():
    model = create(drop_rate=0.2, drop_path_rate=0.2, drop_block_rate=0.1).train()
    loss = model(images()).square().sum()
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["resnet18_dcn", "resnet18_dcnv1", "resnet50_dcn"])
def test_every_parameter_gets_a_gradient(name):
    model = create(name).train()
    model(images()).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        if ".conv_offset." in key:
            assert parameter.grad.any(), key


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_keeps_offsets_with_their_layer(coarse):
    model = create(device="meta")
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name in groups:
        if ".conv_offset." in name:
            assert groups[name] == groups[f"{name.partition('.conv_offset.')[0]}.weight"]
    assert len(set(groups.values())) == (6 if coarse else 10)


@pytest.mark.parametrize(("base", "output_stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8)])
def test_output_stride(base, output_stride):
    reference, model = (create(name, output_stride=output_stride) for name in (base, f"{base}_dcn"))
    model.load_state_dict(reference.state_dict(), strict=False)
    for name, layer in dcn_layers(model).items():
        assert layer.dilation == layer.conv_offset.dilation == reference.get_submodule(name).dilation
    with torch.no_grad():
        features = model.forward_features(images())
        torch.testing.assert_close(features, reference.forward_features(images()), rtol=1e-4, atol=1e-4)
    assert features.shape[-1] == 64 // output_stride


def test_copies_compute_the_same():
    model = move_samples(create())
    expected = model(images())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone(images()), expected, rtol=0, atol=0)


# Weights


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory):
    """resnet18 with 1000 classes in the formats timm reads, and the model itself."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    reference = timm.create_model("resnet18", zero_init_last=False).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(reference.state_dict(), folder / "resnet18.pth")
    save_file(reference.state_dict(), folder / "resnet18.safetensors")
    return reference, folder


def pretrained(file, name="resnet18_dcn", **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@pytest.mark.parametrize("name", ["resnet18_dcn", "resnet18_dcnv1", "resnet18_dcn.a2_in1k"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pretrained_is_the_base(base_weights, name, suffix):
    reference, folder = base_weights
    model = pretrained(folder / f"resnet18.{suffix}", name)
    assert dcn_layers(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), reference(images()), rtol=1e-4, atol=1e-5)


def test_pretrained_with_another_head(base_weights):
    reference, folder = base_weights
    model = pretrained(folder / "resnet18.pth", num_classes=7)
    headless = pretrained(folder / "resnet18.pth", num_classes=0)
    with torch.no_grad():
        expected = reference.forward_features(images())
        for candidate in (model, headless):
            torch.testing.assert_close(candidate.forward_features(images()), expected, rtol=1e-4, atol=1e-5)
    assert model(images()).shape == (2, 7)


def test_pretrained_with_other_input_channels(base_weights):
    _, folder = base_weights
    file = folder / "resnet18.pth"
    reference = timm.create_model("resnet18", pretrained=True, in_chans=1, pretrained_cfg_overlay=dict(file=str(file)))
    gray = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(pretrained(file, in_chans=1)(gray), reference.eval()(gray), rtol=1e-4, atol=1e-5)


def test_pretrained_features_only(base_weights):
    reference, folder = base_weights
    maps = pretrained(folder / "resnet18.pth", features_only=True, out_indices=(4,))(images())
    with torch.no_grad():
        torch.testing.assert_close(maps[0], reference.forward_features(images()), rtol=1e-4, atol=1e-5)


def spoil(state, how):
    if how == "missing":
        del state["layer3.0.conv2.weight"]
    elif how == "unexpected":
        state["layer9.weight"] = torch.zeros(1)
    elif how == "shape":
        state["layer3.0.conv2.weight"] = torch.zeros(256, 128, 1, 1)
    elif how == "some offsets":
        state["layer3.0.conv2.conv_offset.weight"] = torch.zeros(27, 128, 3, 3)
    else:
        del state["fc.bias"]


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", "layer3.0.conv2.weight"),
        ("unexpected", "layer9.weight"),
        ("shape", "layer3.0.conv2.weight"),
        ("some offsets", "layer2.0.conv2.conv_offset.weight"),
        ("head", "fc.bias"),
    ],
)
def test_wrong_pretrained_weights_are_named(base_weights, tmp_path, how, named, num_classes):
    state = dict(base_weights[0].state_dict())
    spoil(state, how)
    torch.save(state, tmp_path / "wrong.pth")
    if how == "head" and num_classes != 1000:  # timm drops the head's weights then, so their absence is no matter
        assert pretrained(tmp_path / "wrong.pth", num_classes=num_classes).num_classes == num_classes
        return
    with pytest.raises(RuntimeError, match=named):
        pretrained(tmp_path / "wrong.pth", num_classes=num_classes)


def test_deformable_weights_load_back(tmp_path):
    model = move_samples(create(num_classes=1000))
    torch.save(model.state_dict(), tmp_path / "dcn.pth")
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(pretrained(tmp_path / "dcn.pth")(images()), expected)
    with pytest.raises(RuntimeError, match="unexpected keys .*layer2.0.conv2.conv_offset.weight"):
        pretrained(tmp_path / "dcn.pth", dcn_stages=(5,))


def test_local_dir_round_trip(tmp_path):
    arguments = dict(dcn_stages=[4, 5], dcn_layer=dict(type="DCNv1", offset_bound=8.0))
    model = move_samples(create(num_classes=4, **arguments))
    save_for_hf(model, tmp_path, model_args=arguments)
    clone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert clone.num_classes == 4
    with torch.no_grad():
        torch.testing.assert_close(clone(images()), model(images()), rtol=0, atol=0)
