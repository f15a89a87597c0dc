"""Files in the layouts that are in users' hands: descriptions as text, weights drawn here.

What a description says is built by the libraries it is for, so a change of what is read shows.
"""

import json

import pytest
import torch

timm = pytest.importorskip("timm")
for _name in ("pytorch_lightning", "mmengine", "torchvision", "torchmetrics", "sklearn"):
    pytest.importorskip(_name)
import safetensors.torch  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.detection import build_detector  # noqa: E402
from dcn_plugin.export import load_exported  # noqa: E402
from dcn_plugin.finetune import FinetuneModule  # noqa: E402

TINY = '"name": "resnet18_dcn", "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]'
DETECTOR = f"""{{
  "dcn_plugin": {{"detector": {{
    "name": "faster_rcnn", "backbone": {{{TINY}, "out_indices": [1, 2, 3]}}, "fpn_channels": 8,
    "roi_pool": {{"type": "MultiScaleDeformRoIPool", "deform_fc_channels": 8, "output_size": 3, "modulated": true}},
    "box_head": {{"type": "TwoMLPHead", "representation_size": 16}}, "min_size": 64, "max_size": 64,
    "rpn_anchor_generator": {{"sizes": [[16], [24], [32], [48]]}}, "box_score_thresh": 0.0, "num_classes": 4}}}},
  "model_type": "dcn_plugin", "pretrained_cfg": {{"in_chans": 1}},
  "label_names": ["a", "b", "c"], "category_ids": [3, 7, 90]
}}"""
MMENGINE = """{
  "dcn_plugin": {"model": {"type": "dcn_plugin.DCNResNet", "depth": 18, "base_channels": 8, "dcn": {"type": "DCNv2"}}},
  "model_type": "dcn_plugin", "pretrained_cfg": {}, "label_names": null
}"""
RULES = """{
  "architecture": "resnet18", "num_classes": 2, "num_features": 8, "global_pool": "avg",
  "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
  "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 2,
                     "first_conv": "conv1", "classifier": "fc"},
  "dcn_plugin": {"rules": [{"match": "layer4.*.conv2", "layer": {"type": "DCNv2"}}]},
  "label_names": ["cat", "dog"], "model_type": "dcn_plugin"
}"""


def with_offsets(model):
    """Weights that deform: fresh ones would not show it if offsets were not read."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in dcn_plugin.layers.offset_parameters(model):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def a_detector():
    return build_detector(json.loads(DETECTOR)["dcn_plugin"]["detector"]), [torch.rand(1, 64, 64)]


def of_mmengine():
    return dcn_plugin.mm.DCNResNet(18, base_channels=8, dcn=dict(type="DCNv2")), torch.rand(1, 3, 32, 32)


def by_rules():
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
    dcn_plugin.convert(model, dict(match="layer4.*.conv2", layer=dict(type="DCNv2")))
    return model, torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("text", "make", "names", "ids"),
    [
        (DETECTOR, a_detector, ["a", "b", "c"], [3, 7, 90]),
        (MMENGINE, of_mmengine, None, None),
        (RULES, by_rules, ["cat", "dog"], None),
    ],
    ids=["detector", "mmengine", "rules"],
)
def test_folders_load(text, make, names, ids, tmp_path):
    torch.manual_seed(0)
    model, image = make()
    with_offsets(model)
    (tmp_path / "config.json").write_text(text)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, str(tmp_path / "model.safetensors"))
    loaded = load_exported(tmp_path)
    assert (loaded.class_names, loaded.category_ids) == (names, ids)
    with torch.no_grad():
        found, expected = loaded(image), model(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if text == DETECTOR:
        assert len(found[0]["boxes"]), "nothing was compared"


def test_lightning_checkpoints_load(tmp_path):
    torch.manual_seed(0)
    args = dict(layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], num_classes=2)
    model = with_offsets(timm.create_model("resnet18_dcn", **args))
    file = dict(
        hyper_parameters=dict(
            model=dict(name="resnet18_dcn", pretrained=True, **args), num_classes=2, rules=None, checkpoint=None,
            optimizer=dict(opt="adamw", lr=1e-3, offset_lr_mult=0.1), loss="cross_entropy", mixup=None,
        ),
        state_dict={f"model.{name}": value for name, value in model.state_dict().items()},
        dcn_plugin=dict(data_config=dict(input_size=[3, 32, 32]), class_names=["cat", "dog"]),
    )  # fmt: skip
    torch.save(file, tmp_path / "last.ckpt")
    module = FinetuneModule.restore(tmp_path / "last.ckpt").eval()
    assert module.class_names == ["cat", "dog"] and module.lr_mults["offset_lr_mult"] == 0.1
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(image), model(image), rtol=0, atol=0)
