"""Exported folders in transformers: the same logits and labels where it can read them, an error where it cannot."""

import pytest
import torch

for _name in ("transformers", "pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn"):
    pytest.importorskip(_name)
import timm  # noqa: E402
from tiny import CLASSIFIER, classifier, detector  # noqa: E402
from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.finetune import export_model, load_exported  # noqa: E402
from dcn_plugin.layers import OffsetConv  # noqa: E402

MODELS = {
    "default": dict(name="resnet18_dcn"),
    "stages and channels": dict(name="resnet18_dcn", dcn_stages=(5,), in_chans=1, channels=(8, 8, 8, 16)),
    "bounded v1 in groups": dict(
        name="resnet18_dcnv1", offset_groups=2, dcn_layer=dict(type="DCNv1", offset_bound=3.0)
    ),
    "dilated": dict(name="resnet50_dcn", output_stride=16, layers=(1, 1, 1, 1)),
    "plain": dict(name="resnet18", zero_init_last=False),
}


def moved(model):
    """Weights as a training may leave them: nothing is 0."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, OffsetConv):
            torch.nn.init.normal_(layer.conv_offset.weight, std=0.05, generator=generator)
    return model.eval()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits_and_labels(name, channels_last, tmp_path):
    options = dict(MODELS[name])
    model = moved(timm.create_model(options.pop("name"), num_classes=3, **options))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    export_model(model, tmp_path, class_names=["ant", "bee", "cat"])
    images = torch.rand(2, model.conv1.in_channels, 64, 64)
    with torch.no_grad():
        expected = model(images)
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(images).logits, expected, rtol=1e-4, atol=1e-5)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(images), expected, rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert theirs.config.label2id == dict(ant=0, bee=1, cat=2) and theirs.config.num_labels == 3
    count = sum(isinstance(m, OffsetConv) for m in model.modules())
    assert sum(isinstance(m, OffsetConv) for m in theirs.modules()) == count == (0 if name == "plain" else count)


def test_what_transformers_saves_again_is_read_by_timm_and_load_exported(tmp_path):
    model = moved(timm.create_model("resnet18_dcn", num_classes=3, dcn_stages=(5,)))
    export_model(model, tmp_path / "ours", class_names=["ant", "bee", "cat"])
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.rand(1, 3, 64, 64)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(again(images).logits, model(images), rtol=1e-4, atol=1e-5)
    loaded = load_exported(tmp_path / "theirs")
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    assert loaded.class_names == ["ant", "bee", "cat"]


def folder_of_rules(folder):
    rules = [dict(match="layer4.0.conv2", layer=dict(type="DCNv2"))]
    model = timm.create_model("resnet18", num_classes=3)
    dcn_plugin.convert(model, rules)
    return export_model(model, folder, rules=rules)


def folder_of_mmengine(folder):
    options = {key: value for key, value in CLASSIFIER.items() if key != "name"}
    spec = dict(
        type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", features_only=False, num_classes=3, **options
    )
    return export_model(classifier(spec).model, folder, spec=spec)


def folder_of_a_detector(folder):
    module = detector()
    return export_model(module.model, folder, spec=module.spec)


@pytest.mark.parametrize("write", [folder_of_rules, folder_of_mmengine, folder_of_a_detector])
def test_transformers_refuses_what_it_cannot_build(write, tmp_path):
    folder = write(tmp_path)
    with pytest.raises((ValueError, KeyError), match="dcn_plugin"):
        AutoModelForImageClassification.from_pretrained(folder)
    load_exported(folder)


def test_the_wrapper_named_outright_says_which_weights_it_leaves_out(tmp_path, caplog):
    """It builds what timm's name says, without the rules: its own warnings are all that stands in the way."""
    TimmWrapperForImageClassification.from_pretrained(folder_of_rules(tmp_path))
    assert "model of type `dcn_plugin`" in caplog.text and "layer4.0.conv2.conv_offset.weight" in caplog.text
