"""Every model is what timm, and this repository, expect of one; a new family is tested by existing."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
import timm  # noqa: E402
from families import FAMILIES, MODELS, NAMES, images, short, smallest, without_weights  # noqa: E402
from timm.models import group_parameters  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dcn_plugin.layers import offset_parameters, sampling_layers  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def make(family):
    """Builds the smallest model of a family, shortened, as after training: offsets are drawn, and nothing else is 0."""

    def build(**options):
        torch.manual_seed(0)
        options = short(smallest(family)) | dict(num_classes=5) | options
        model = timm.create_model(smallest(family), **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in offset_parameters(model) or not parameter.any():
                    parameter.normal_(0, 0.05)
        return model.eval()

    return build


# What belongs to a family


@each_family
def test_a_family_has_a_config_and_stands_in_the_documents(family):
    assert MODELS[family], f"dcn_plugin/models/{family}.py registers no model"
    configs = "".join(path.read_text() for path in ROOT.glob("configs/**/*.py"))
    said = f"{family}: add configs/classification/<name>.py, a leaf that trains one of {', '.join(MODELS[family])}"
    assert any(f'"{name}"' in configs or f'"{name}.' in configs for name in MODELS[family]), said
    said = f"{family}: add a row '| `{family}` | ... |' to the table of families in docs/timm.md"
    assert f"\n| `{family}` |" in (ROOT / "docs/timm.md").read_text(), said
    said = f"{family}: name one of {', '.join(MODELS[family])} in README.md (what is in the box)"
    assert any(f"`{name}`" in (ROOT / "README.md").read_text() for name in MODELS[family]), said


@each_model
def test_it_is_registered_with_layers_that_predict_where_they_sample(name):
    family = timm.model_entrypoint(name).__module__.removeprefix("dcn_plugin.models.")
    assert timm.is_model(name) and name in timm.list_models(module=family) and family.startswith("dcn_")
    # A model of timm's that deforms says so; a published architecture keeps its name.
    assert "dcn" in name or not any(name.startswith(f"{other}_") for other in timm.list_models(exclude_filters=NAMES))
    assert sampling_layers(without_weights(name))


@each_model
def test_its_configuration_names_layers_that_it_has(name):
    """timm replaces the first convolution for other channels, and the classifier for other classes."""
    cfg = timm.get_pretrained_cfg(name)
    state = without_weights(name).state_dict()
    assert f"{cfg.first_conv}.weight" in state and f"{cfg.classifier}.weight" in state
    assert cfg.input_size[0] == 3 and cfg.num_classes > 1 and len(cfg.mean) == len(cfg.std) == 3


def test_the_documents_have_these_numbers():
    """Of every model that is no base's of timm: parameters and multiply-adds at its own size."""
    document = (ROOT / "docs/timm.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)`(?:, `([^`]+)`)? \| `(\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", document, re.M
    )
    assert {name for name, *_ in rows} == {*MODELS["dcn_internimage"], *MODELS["dcn_dat"]}
    for name, options, tag, side, parameters, multiply_adds, _ in rows:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == tag and (options or cfg.input_size == (3, int(side), int(side)))
        given = dict(re.findall(r"(\w+)=(\d+)", options))
        assert not options or given["img_size"] == side
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = timm.create_model(name, **{key: int(value) for key, value in given.items()}).eval()
            model(torch.zeros(1, 3, int(side), int(side)))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == parameters, name
        assert f"{counter.get_total_flops() / 2e9:.2f}" == multiply_adds, name


# What timm does with a model


@each_family
def test_feature_maps_have_the_channels_and_strides_that_it_says(make):
    maps = make(features_only=True)(images(64))
    info = make(features_only=True).feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [64 // m.shape[-1] for m in maps] == info.reduction()
    final, between = make().forward_intermediates(images(64))
    torch.testing.assert_close(final, make().forward_features(images(64)))
    assert between


@each_family
def test_every_extractor_of_timm_gives_the_same_maps(make):
    model, x = make(), images(32)
    wanted = model.forward_intermediates(x, intermediates_only=True)
    state = {name.replace(".", "_"): value for name, value in model.state_dict().items()}
    for kind in ("list", "dict", "hook", "fx", "getter"):
        found = make(features_only=True, out_indices=(1, -1), feature_cls=kind)
        # Parts are named as in the model, but for what an extractor puts before or joins.
        own = {name: re.sub(r"^(graph_module|model|body)_", "", name.replace(".", "_")) for name in found.state_dict()}
        found.load_state_dict({name: state[plain] for name, plain in own.items()})
        maps = found(x)
        if kind == "dict":
            assert list(maps) == ["1", "-1"]
            maps = list(maps.values())
        assert len(maps) == 2 and found.feature_info.channels() == [m.shape[1] for m in maps], kind
        for one, other in zip(maps, (wanted[1], wanted[-1]), strict=True):
            torch.testing.assert_close(one, other, msg=kind)


@each_family
def test_other_heads_and_channels(make):
    model = make()
    assert model(images()).shape == (2, 5) and model.get_classifier().out_features == 5
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images()).shape == features.shape == (2, model.head_hidden_size)
    assert model.forward_features(images()).shape[1] == model.num_features
    assert make(in_chans=1)(images(channels=1)).shape == (2, 5)


@each_family
def test_every_parameter_is_trained(make):
    model = make().train()
    model(images()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name in offset_parameters(model) if not model.get_parameter(name).grad.any()] == []


@each_family
def test_checkpointing_of_activations_changes_nothing(make):
    found = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        output = model(images())
        output.square().sum().backward()
        found.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@each_family
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_decay_knows_every_parameter_and_keeps_offsets_with_their_layer(make, coarse):
    model = make()
    place = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(place) == {name for name, _ in model.named_parameters()}
    for layer, module in sampling_layers(model).items():
        assert len({place[f"{layer}.{name}"] for name, _ in module.named_parameters()}) == 1, layer
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))


@each_family
def test_fresh_weights_sample_where_a_plain_convolution_does(make):
    model, offsets = make(), []
    model.init_weights()
    for layer in sampling_layers(model).values():
        layer.register_sampling_hook(lambda layer, samples: offsets.append(samples.offset))
    model(images())
    assert len(offsets) == len(sampling_layers(model)) and not any(offset.any() for offset in offsets)


@each_family
def test_an_exported_folder_gives_the_same(make, tmp_path):
    from dcn_plugin.export import export_model, load_exported

    model = make()
    assert torch.equal(load_exported(export_model(model, tmp_path))(images()), model(images()))
