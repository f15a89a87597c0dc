"""Reading checkpoint files without running code from them, and loading other projects' layouts by name."""

import collections
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import dcn_plugin
from dcn_plugin.checkpoint import LoadReport, load_checkpoint, read_checkpoint

timm = pytest.importorskip("timm")


def plain_resnet(seed=0):
    """A ResNet-50 in names and structure, one narrow block a stage, with nothing left at a trivial value."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet50", layers=(1, 1, 1, 1), channels=(4, 8, 12, 16), stem_width=4, num_classes=3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def dcn_resnet(seed=1, **layer):
    model = plain_resnet(seed)
    dcn_plugin.convert(model, dict(match="layer[2-4].*.conv2", layer=dict(dict(type="DCNv2"), **layer)))
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "conv_offset" in name:
            tensor.copy_(torch.randn(tensor.shape))
    return model


def same(model, expected):
    """Whether the model's state dict holds these values, for every name in expected."""
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in expected.items())


OFFSET_KEYS = [f"layer{i}.0.conv2.conv_offset.{kind}" for i in (2, 3, 4) for kind in ("weight", "bias")]


# Reading

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.pth.tar", "x.ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "meta": {"classes": ("cat", "dog")}},
        lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
        lambda w: {"model_state": w},
        lambda w: {"model_state_dict": w},
        lambda w: {"state_dict_ema": w, "arch": "resnet50"},
        lambda w: {"model": {"state_dict": w}},
    ],
    ids=["flat", "state_dict", "model", "model_state", "model_state_dict", "ema", "nested"],
)
def test_reads_what_torch_saved(tmp_path, name, wrap):
    torch.save(wrap(collections.OrderedDict(WEIGHTS)), tmp_path / name)
    state = read_checkpoint(tmp_path / name)
    assert list(state) == list(WEIGHTS)
    assert all(torch.equal(state[key], value) for key, value in WEIGHTS.items())


def test_reads_the_format_before_torch_1_6(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(read_checkpoint(str(tmp_path / "old.pth"))) == list(WEIGHTS)


def test_reads_safetensors(tmp_path):
    pytest.importorskip("safetensors.torch").save_file(WEIGHTS, tmp_path / "x.safetensors")
    state = read_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(state[key], value) for key, value in WEIGHTS.items())


def test_key_chooses_the_entry(tmp_path, caplog):
    other = {key: value + 1 for key, value in WEIGHTS.items()}
    torch.save({"state_dict": WEIGHTS, "teacher": other, "student": other}, tmp_path / "x.pth")
    assert torch.equal(read_checkpoint(tmp_path / "x.pth")["a.bias"], WEIGHTS["a.bias"])
    for key in ("teacher", "student"):
        assert torch.equal(read_checkpoint(tmp_path / "x.pth", key=key)["a.bias"], other["a.bias"])
    with pytest.raises(ValueError, match="which has 'state_dict', 'teacher', 'student', got 'pupil'"):
        read_checkpoint(tmp_path / "x.pth", key="pupil")
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    report = load_checkpoint(model, tmp_path / "x.pth")
    assert "took 'state_dict'; the file also holds 'teacher', 'student' (choose with key=)" in report.notes


class Evil:
    """Leaves a trace when its pickle is executed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, zipped):
    trace = tmp_path / "executed"
    torch.save(
        {"state_dict": WEIGHTS, "x": Evil(str(trace))}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match="so it is not read") as error:
        read_checkpoint(tmp_path / "x.pth")
    assert not trace.exists()
    assert "x.pth" in str(error.value)
    assert not zipped or "io.open" in str(error.value)


def test_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"expected weights alone, got objects of .*torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "model.pth")


def test_mmengine_training_file_is_refused_with_a_remedy_that_works(tmp_path):
    buffer = pytest.importorskip("mmengine.logging").HistoryBuffer
    torch.save(
        {"state_dict": WEIGHTS, "message_hub": {"log_scalars": {"loss": buffer([1.0], [1])}}}, tmp_path / "e.pth"
    )
    with pytest.raises(ValueError, match="HistoryBuffer.*dcn_plugin.WeightsOnlyCheckpointHook") as error:
        read_checkpoint(tmp_path / "e.pth")
    exec(re.search(r'python -c "(.*?)"', str(error.value)).group(1), {})
    assert list(read_checkpoint(tmp_path / "e_weights.pth")) == list(WEIGHTS)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_raw_pickle_is_refused(tmp_path):
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"model": {"a": np.zeros(2)}, "__author__": "someone"}, file)
    with pytest.raises(ValueError, match="expected what torch.save writes.*detectron2's .pkl"):
        read_checkpoint(tmp_path / "R-50.pkl")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: expected a checkpoint file, got none"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="download it first"):
        read_checkpoint("https://example.org/weights.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path)
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    contents = {"empty.pth": b"", "cut.pth": whole[: len(whole) // 2], "text.pth": b"hello", "x.safetensors": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)


# Loading


def test_loads_its_own_weights(tmp_path, caplog):
    source, target = dcn_resnet(1), dcn_resnet(2)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="dcn_plugin"):
        report = load_checkpoint(target, tmp_path / "x.pth")
    assert same(target, source.state_dict())
    assert report.loaded == list(source.state_dict()) and not report.problems
    assert not (report.renamed or report.missing or report.unexpected or report.mismatched or report.notes)
    assert f"{len(report.loaded)} tensors loaded" in str(report) and str(tmp_path / "x.pth") in str(report)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_plain_resnet_into_deformable_resnet():
    source, target = plain_resnet(), dcn_resnet()
    offsets = {name: value.clone() for name, value in target.state_dict().items() if "conv_offset" in name}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(RuntimeError, match="6 missing") as error:
        load_checkpoint(target, source.state_dict())
    assert all(name in str(error.value) for name in OFFSET_KEYS)
    assert same(target, before), "a refused load changes nothing"

    report = load_checkpoint(target, source.state_dict(), allow_missing=("*.conv_offset.*",))
    assert same(target, source.state_dict()) and same(target, offsets)
    assert report.allowed == report.missing == OFFSET_KEYS
    assert "6 not loaded, as allowed" in str(report)

    incomplete = source.state_dict()
    del incomplete["layer2.0.bn1.weight"]
    with pytest.raises(RuntimeError, match="1 missing .*layer2.0.bn1.weight$"):
        load_checkpoint(target, incomplete, allow_missing="*.conv_offset.*")


def test_every_problem_is_named_at_once_and_strict_false_loads_the_rest():
    source, target = dcn_resnet(1), dcn_resnet(2)
    state = source.state_dict()
    state["layer5.weight"] = state.pop("layer1.0.conv1.weight")
    state["fc.weight"] = torch.zeros(7, 64)
    with pytest.raises(RuntimeError, match="nothing was loaded") as error:
        load_checkpoint(target, state)
    for words in (
        "1 missing (in the model, not in the source): layer1.0.conv1.weight",
        "1 unexpected (in the source, not in the model): layer5.weight",
        "shape of fc.weight differs: source has [7, 64], model has [3, 64]",
    ):
        assert words in str(error.value)
    kept = target.fc.weight.clone()
    report = load_checkpoint(target, state, strict=False)
    assert (report.missing, report.unexpected) == (["layer1.0.conv1.weight"], ["layer5.weight"])
    assert report.mismatched == {"fc.weight": ((7, 64), (3, 64))}
    assert torch.equal(target.fc.weight, kept)
    assert same(target, {k: v for k, v in source.state_dict().items() if k in report.loaded})
    assert len(report.problems) == 3 and all(problem in str(report) for problem in report.problems)
    allowed = load_checkpoint(
        target, state, allow_missing="layer1.*", allow_unexpected=["layer5.*"], allow_mismatched="fc.*"
    )
    assert allowed.problems == [] and sorted(allowed.allowed) == ["fc.weight", "layer1.0.conv1.weight", "layer5.weight"]


def test_num_batches_tracked_may_be_absent_but_is_reported():
    source, target = dcn_resnet(1), dcn_resnet(2)
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    report = load_checkpoint(target, state)
    assert same(target, state) and report.allowed == report.missing
    assert (
        all(name.endswith("num_batches_tracked") for name in report.allowed)
        and "bn1.num_batches_tracked" in report.missing
    )


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.", "module.backbone.", "_orig_mod."])
def test_usual_prefixes_are_found_and_reported(prefix, caplog):
    source, target = dcn_resnet(1), dcn_resnet(2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    state["neck.lateral.weight"] = torch.zeros(2)
    report = load_checkpoint(target, state)
    assert same(target, source.state_dict())
    assert report.outside == ["neck.lateral.weight"]
    assert f"prefix {prefix!r} removed" in report.notes[0] and "neck.lateral.weight" in str(report)
    assert caplog.records[0].levelname == "WARNING"


def test_prefix_by_name():
    source, target = dcn_resnet(1), dcn_resnet(2)
    state = {"teacher.net." + name: value for name, value in source.state_dict().items()}
    with pytest.raises(RuntimeError, match="missing"):
        load_checkpoint(target, state)
    for prefix in ("teacher.net.", "teacher.net"):  # the dot may be left out
        target = dcn_resnet(2)
        report = load_checkpoint(target, state, prefix=prefix)
        assert same(target, source.state_dict())
        assert report.notes == [f"prefix 'teacher.net.' removed from {len(state)} names"]
    with pytest.raises(ValueError, match="prefix: expected the start of names .* got 'student.'"):
        load_checkpoint(target, state, prefix="student.")
    with pytest.raises(RuntimeError, match="unexpected"):  # '' means: the names as they are
        load_checkpoint(target, {"module." + k: v for k, v in source.state_dict().items()}, prefix="")


@pytest.mark.parametrize(
    "new, old",
    [(r"conv2\.conv_offset\.", "conv2_offset."), (r"conv2\.conv_offset\.", "conv2.conv_offset_mask.")],
    ids=["sibling", "conv_offset_mask"],
)
@pytest.mark.parametrize("activation", ["sigmoid", "2*sigmoid"])
def test_earlier_names_of_conv_offset(new, old, activation, caplog):
    source, target = dcn_resnet(1), dcn_resnet(2, mask_activation=activation)
    state = {"backbone." + re.sub(new, old, name): value for name, value in source.state_dict().items()}
    assert f"backbone.layer3.0.{old}weight" in state
    report = load_checkpoint(target, state)
    assert same(target, source.state_dict())
    assert list(report.renamed.values()) == OFFSET_KEYS
    assert report.renamed[f"layer3.0.{old}weight"] == "layer3.0.conv2.conv_offset.weight"
    assert f"6 renamed: layer2.0.{old}weight -> layer2.0.conv2.conv_offset.weight, " in str(report)
    # Whoever used these names used the plain sigmoid.
    assert ("build it with mask_activation='sigmoid'" in str(report)) == (activation == "2*sigmoid")
    assert len(caplog.records) == 1, "reported once"


def detectron2_names(name):
    """Torchvision's names to detectron2's, as its ResNet has them: the other way round from the loader's table."""
    if name.startswith("fc."):
        return None
    if name.startswith(("conv1.", "bn1.")):
        return "stem." + name.replace("bn1.", "conv1.norm.")
    stage, index, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name).groups()
    rest = re.sub(r"^bn(\d)\.", r"conv\1.norm.", rest)
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    rest = rest.replace("conv2.conv_offset.", "conv2_offset.")
    return f"res{int(stage) + 1}.{index}.{rest}"


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "backbone.", "bottom_up.", ""])
def test_detectron2_names(prefix, tmp_path):
    source, target = dcn_resnet(1), dcn_resnet(2, mask_activation="sigmoid")
    head = [name for name in target.state_dict() if name.startswith("fc.")]
    state = {
        prefix + detectron2_names(name): value.numpy()
        for name, value in source.state_dict().items()
        if name not in head and not name.endswith("num_batches_tracked")
    }
    assert prefix + "res3.0.conv2_offset.weight" in state and prefix + "res2.0.shortcut.norm.bias" in state
    state["backbone.fpn_lateral2.weight"] = np.zeros((2, 2), np.float32)
    report = load_checkpoint(target, {"model": state, "__author__": "someone"}, allow_missing="fc.*")
    assert same(target, {k: v for k, v in source.state_dict().items() if k in report.loaded})
    assert len(report.loaded) == len(state) - 1
    assert report.renamed[prefix + "stem.conv1.norm.running_var"] == "bn1.running_var"
    assert report.renamed[prefix + "res4.0.conv2_offset.bias"] == "layer3.0.conv2.conv_offset.bias"
    assert report.renamed[prefix + "res5.0.conv3.norm.weight"] == "layer4.0.bn3.weight"
    assert report.outside == ["backbone.fpn_lateral2.weight"]
    assert "(all in .renamed)" in str(report)
    assert any("STRIDE_IN_1X1" in note for note in report.notes)
    assert [name for name in report.missing if not name.endswith("num_batches_tracked")] == head


def test_torchvision_weights():
    models = pytest.importorskip("torchvision.models")
    source = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=3)
    target = timm.create_model("resnet50", layers=(1, 1, 1, 1), num_classes=3)
    dcn_plugin.convert(target, dict(match="layer[2-4].*.conv2", layer=dict(type="DCNv2")))
    load_checkpoint(target, source.state_dict(), allow_missing="*.conv_offset.*")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given, wanted", [("DCNv1", "DCNv2"), ("DCNv2", "DCNv1")])
def test_offsets_of_the_other_version_are_explained(given, wanted):
    source, target = dcn_resnet(1, type=given), dcn_resnet(2, type=wanted)
    with pytest.raises(RuntimeError) as error:
        load_checkpoint(target, source.state_dict())
    rows = {"DCNv1": 18, "DCNv2": 27}
    for i, channels in ((2, 8), (3, 12), (4, 16)):
        name = f"layer{i}.0.conv2.conv_offset.weight"
        shapes = f"source has [{rows[given]}, {channels}, 3, 3], model has [{rows[wanted]}, {channels}, 3, 3]"
        assert f"shape of {name} differs: {shapes}" in str(error.value)
        assert f"{rows[given]} outputs would fit {given} with offset_groups=1" in str(error.value)


def test_tensors_shared_in_the_model_need_to_be_there_once(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")

    def tied():
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    source, target = tied(), tied()
    safetensors.save_model(source, str(tmp_path / "x.safetensors"))
    report = load_checkpoint(target, tmp_path / "x.safetensors")
    assert len(report.loaded) == 3 and not report.missing
    assert same(target, source.state_dict())


def test_module_versions_reach_the_modules(tmp_path):
    class Versioned(nn.Linear):
        _version = 5

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    source, target = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    load_checkpoint(target, tmp_path / "x.pth")
    assert target[0].seen == 5
    torch.save(nn.ModuleDict({"module": source}).state_dict(), tmp_path / "y.pth")
    target[0].seen = None
    load_checkpoint(target, tmp_path / "y.pth")
    assert target[0].seen == 5


def test_extra_state_is_loaded():
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    source, target = Counting(2, 2), Counting(2, 2)
    source.count = 7
    load_checkpoint(target, source.state_dict())
    assert target.count == 7


def test_the_given_state_dict_is_left_alone():
    source = dcn_resnet(1)
    state = {k.replace("conv2.conv_offset.", "conv2_offset."): v for k, v in source.state_dict().items()}
    before = dict(state)
    load_checkpoint(dcn_resnet(2), state)
    assert list(state) == list(before) and all(state[name] is before[name] for name in before)


def test_empty_report_prints():
    assert str(LoadReport("file")) == "file: 0 tensors loaded"
