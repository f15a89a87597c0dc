"""A file that names what to build calls nothing but what is registered with MMEngine."""

import json

import pytest
import torch
from mmengine.registry import MODELS as ROOT
from torch import nn

from dcn_plugin.finetune import FinetuneModule, export_model, load_exported
from dcn_plugin.models.build import check_saved_model
from dcn_plugin.registry import MODELS

TINY = dict(
    type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", features_only=False, num_classes=3, in_chans=1,
    layers=[1, 1, 1, 1], channels=[8, 8, 8, 8],
)  # fmt: skip


class Wrapped(nn.Module):
    """A classifier of a user's, around a module that MMEngine builds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = MODELS.build(inner)

    def forward(self, images):
        return self.inner(images)


MINE = dict(type=f"{__name__}.Wrapped", inner=TINY)


def exported(tmp_path, spec):
    model = MODELS.build(spec).eval()
    export_model(model, tmp_path, spec=spec)
    return model


def saved(tmp_path, model):
    """Write what of a checkpoint `restore` reads before it builds."""
    torch.save(dict(hyper_parameters=dict(model=model, num_classes=3), state_dict={}), tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def hostile(tmp_path):
    return dict(type="builtins.open", file=str(tmp_path / "opened"), mode="w")


HIDDEN = {
    "top": lambda bad: bad,
    "nested": lambda bad: dict(TINY, pretrained_cfg=dict(what=bad)),
    "in a list": lambda bad: dict(type="DCNResNet", modules=[TINY, [bad]]),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_what_is_not_registered_is_not_called(place, tmp_path):
    spec = HIDDEN[place](hostile(tmp_path))
    exported(tmp_path / "export", TINY)
    config = tmp_path / "export" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(dcn_plugin=dict(model=spec))))
    said = "type: expected a name that is registered with MMEngine, got 'builtins.open' from the file"
    with pytest.raises(ValueError, match=said):
        load_exported(tmp_path / "export")
    with pytest.raises(ValueError, match=said + r".*or name it in restore\(path, model=...\)"):
        FinetuneModule.restore(saved(tmp_path, spec))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["os", "this", "torch.hub.load", "dcn_plugin.registry.MODELS.build", "no.such", 7, ""])
def test_neither_modules_nor_functions_are_imported(name):
    with pytest.raises(ValueError, match="model.type: expected a name that is registered"):
        check_saved_model(dict(type=name), "here")


def test_a_scope_is_one_that_is_known():
    with pytest.raises(ValueError, match="model._scope_: expected a name that is registered.*'antigravity'"):
        check_saved_model(dict(TINY, _scope_="antigravity"), "here")
    check_saved_model(dict(TINY, _scope_="dcn_plugin"), "here")
    check_saved_model(dict(TINY, _scope_="mmengine"), "here")


def test_what_is_registered_is_taken_by_every_name_of_its():
    for name in ("dcn_plugin.DCNv2", "DCNResNet", "mmengine.Kaiming", "dcn_plugin.layers.DCNv2", "MMCVDCN"):
        check_saved_model(dict(type="dcn_plugin.DCNResNet", inner=[dict(type=name)]), "here")
    check_saved_model(dict(name="resnet18", anything=dict(type="os.system")), "here")  # nobody builds that


def test_a_class_of_ones_own_is_registered_or_named_again(tmp_path):
    model, images = exported(tmp_path, MINE), torch.rand(1, 1, 32, 32)
    with pytest.raises(ValueError, match=r"Wrapped' from the file.*or name it in load_exported\(directory, spec=...\)"):
        load_exported(tmp_path)
    assert torch.equal(load_exported(tmp_path, spec=MINE)(images), model(images))
    again = FinetuneModule.restore(_whole(tmp_path, MINE, model), model=MINE)
    assert torch.equal(again.eval()(images), model(images))
    ROOT.register_module(name="TestsWrapped", module=Wrapped)
    try:
        assert torch.equal(load_exported(tmp_path)(images), model(images))
        again = FinetuneModule.restore(_whole(tmp_path, dict(MINE, type="TestsWrapped"), model))
        assert torch.equal(again.eval()(images), model(images))
    finally:
        del ROOT.module_dict["TestsWrapped"]


def _whole(tmp_path, spec, model):
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save(dict(hyper_parameters=dict(model=spec, num_classes=3), state_dict=state), tmp_path / "whole.ckpt")
    return tmp_path / "whole.ckpt"


def test_weights_that_were_started_from_are_not_read_again(tmp_path):
    start = tmp_path / "start.pth"
    torch.save(MODELS.build(TINY).model.state_dict(), start)
    spec = dict(TINY, checkpoint_path=str(start))
    model, images = exported(tmp_path / "export", spec), torch.rand(1, 1, 32, 32)
    start.unlink()
    assert torch.equal(load_exported(tmp_path / "export")(images), model(images))
    again = FinetuneModule.restore(_whole(tmp_path, spec, model))
    assert torch.equal(again.eval()(images), model(images))
    named = dict(name="resnet18_dcn", checkpoint_path=str(start), pretrained=True, num_classes=3)
    assert FinetuneModule.bare(named) == dict(name="resnet18_dcn", pretrained=False, num_classes=3)
