"""The studies of warps and of effective dilation, in small: equal sizes, warps, sizes of objects, stages and tables."""

import json
from pathlib import Path

import pytest
import torch

for _name in (
    "pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools", "matplotlib",
):  # fmt: skip
    pytest.importorskip(_name)
import timm  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from studies import dilation, stages, warps  # noqa: E402
from studies.digits import multiply_adds  # noqa: E402
from tiny import ROOT  # noqa: E402

from dcn_plugin.finetune import Digits, load_config, load_exported  # noqa: E402
from dcn_plugin.layers import DCNv1, DCNv3, SpatialTransformer, sampling_layers  # noqa: E402
from dcn_plugin.models.build import build_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIERS, DETECTORS = ROOT / "configs" / "classification", ROOT / "configs" / "detection"
SILENT = {"trainer.enable_progress_bar": False}


def network(arm):
    return build_model(load_config(CLASSIFIERS / warps.CONFIG, warps.ARMS[arm].changes)["model"]).eval()


# -- warps ------------------------------------------------------------------------------------------------------------


def test_the_controls_are_as_large_as_the_largest_deformable_network():
    sizes = {}
    for arm in warps.ARMS:
        model = network(arm)
        sizes[arm] = sum(p.numel() for p in model.parameters()), multiply_adds(model, (1, 48, 48))
    for arm in ("plain-wide", "dcnv3"):
        assert sizes[arm] == pytest.approx(sizes["dcnv2"], rel=0.05), arm
    # No other arm has a larger network than these, and the plain one is smaller by more than what they differ by.
    assert all(size <= 1.05 * most for own in sizes.values() for size, most in zip(own, sizes["dcnv2"], strict=True))
    assert all(size < 0.9 * most for size, most in zip(sizes["plain"], sizes["dcnv2"], strict=True))
    assert sizes["plain"] == sizes["dilated"] and sizes["affine"] < sizes["bounded"] == sizes["dcnv1"] < sizes["dcnv2"]


def test_arms_are_what_they_are_called():
    kinds = {arm: {type(layer).__name__ for layer in sampling_layers(network(arm)).values()} for arm in warps.ARMS}
    assert kinds["plain"] == kinds["plain-wide"] == set()
    assert kinds["dilated"] == {"Dilated"} and kinds["transformer"] == {"SpatialTransformer"}
    assert kinds["active"] == {"ActiveConv2d"} and kinds["dcnv3"] == {"DCNv3"} and kinds["dcnv2"] == {"DCNv2"}
    first = {arm: network(arm).layer2[0].conv2 for arm in ("affine", "similarity", "bounded", "dcnv1")}
    assert all(type(layer) is DCNv1 for layer in first.values())
    assert [layer.offset_form for layer in first.values()] == ["affine", "similarity", None, None]
    assert [layer.offset_bound for layer in first.values()] == [None, None, 1.0, None]


def test_a_fresh_network_behind_a_transformer_is_the_network():
    options = dict(in_chans=1, num_classes=4, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    behind = timm.create_model("resnet18_behind_transformer", **options).eval()
    plain = timm.create_model("resnet18", **options).eval()
    missing = plain.load_state_dict(behind.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.startswith("transformer.") for key in missing.unexpected_keys)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(behind(images), plain(images))
    # Once it turns, the network sees what it makes.
    with torch.no_grad():
        behind.transformer.localiser[-1].bias.copy_(torch.tensor([-1.0, 0, 0, 0, -1.0, 0]))
    assert isinstance(behind.transformer, SpatialTransformer)
    assert torch.allclose(behind(images), plain(images.flip(2, 3)), atol=1e-5)


def test_dcnv3_takes_the_place_of_the_second_convolution_with_its_dilation():
    model = timm.create_model("resnet18_of_dcnv3", in_chans=1, num_classes=4, channels=(8, 16, 24, 32), output_stride=8)
    plain = timm.create_model("resnet18", in_chans=1, channels=(8, 16, 24, 32), output_stride=8)
    for stage, group in (("layer2", 2), ("layer3", 3), ("layer4", 4)):
        for block, other in zip(getattr(model, stage), getattr(plain, stage), strict=True):
            layer, conv = block.conv2, other.conv2
            assert isinstance(layer, DCNv3) and (layer.group, layer.channels) == (group, conv.in_channels)
            assert (layer.dilation, layer.pad) == (conv.dilation[0], conv.padding[0])
    assert model(torch.rand(2, 1, 48, 48)).shape == (2, 4)


def test_images_are_turned_and_scaled_around_their_middle():
    images = torch.rand(2, 1, 10, 10)
    assert torch.allclose(warps.turned_and_scaled(images, 0.0, 1.0, -1.0), images, atol=1e-5)
    quarter = warps.turned_and_scaled(images, 90.0, 1.0, -1.0)
    assert any(torch.allclose(quarter, images.rot90(turns, (2, 3)), atol=1e-4) for turns in (1, 3))
    halved = warps.turned_and_scaled(torch.ones(1, 1, 12, 12), 0.0, 0.5, -1.0)[0, 0]
    wanted = torch.full((12, 12), -1.0)
    wanted[3:9, 3:9] = 1
    assert torch.allclose(halved, wanted, atol=1e-5)


def test_warp_study_gives_numbers_table_and_plot_and_reuses_what_is_finished(tmp_path, capsys):
    small = {"data.dataset.size": 32, "data.dataset.digit_size": 20, "data.input_size": [1, 32, 32]}
    options = {**warps.QUICK, **SILENT, **small, "data.dataset.limit": 16, "data.batch_size": 16}
    study = warps.run_study(CLASSIFIERS, tmp_path, [0, 1], ["dcnv3"], options)
    rows = study["rows"]
    assert [(row["arm"], row["trained_on"]) for row in rows] == [("dcnv3", how) for how in warps.TRAININGS]
    lines = study["table"].splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and lines[2].count("±") == len(warps.IN_TABLE)
    assert (tmp_path / "results.md").read_text() == study["table"]
    assert json.loads((tmp_path / "results.json").read_text()) == dict(seeds=[0, 1], rows=rows)
    assert imread(study["files"]["warps"]).std() > 0.01

    # What the study says of a stage is what its network says of digits that are turned in another way.
    stage = json.loads((tmp_path / "seed1" / "dcnv3_turned" / "result.json").read_text())
    assert stage["config"]["data"]["dataset"]["warp"] and stage["config"]["seed"] == 1
    model, digits = load_exported(stage["export"]), Digits("test", size=32, digit_size=20, limit=16)
    images = torch.stack([digits.draw(i) for i in range(16)]) / 127.5 - 1
    labels = torch.tensor(digits.targets)
    with torch.no_grad():
        right = [(model(images.rot90(turns, (2, 3))).argmax(1) == labels).float().mean().item() for turns in (0, 1, 3)]
    assert stage["upright"] == pytest.approx(right[0]) and stage["±90°"] == pytest.approx(sum(right[1:]) / 2)
    upright = json.loads((tmp_path / "seed1" / "dcnv3_upright" / "result.json").read_text())
    assert not upright["config"]["data"]["dataset"]["warp"]

    capsys.readouterr()
    again = warps.run_study(CLASSIFIERS, tmp_path, [0, 1], ["dcnv3"], options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 4 and "started" not in printed and again["rows"] == rows
    # As if the power had gone before one stage was measured.
    state = tmp_path / "seed0" / "dcnv3_upright" / "result.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    resumed = warps.run_study(CLASSIFIERS, tmp_path, [0], ["dcnv3"], options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 1 and printed.count("resumed") == 1 and "started" not in printed
    for row, before in zip(resumed["rows"], rows, strict=True):
        assert all(row[name]["values"] == before[name]["values"][:1] for name in warps.WARPS)


def test_quick_form_runs_the_arms_that_are_asked_for(script, tmp_path):
    status, printed = script(
        "warps_study.py", "--quick", "--arms", "affine", "plain", "--work-dir", tmp_path, "--cfg-options",
        "data.dataset.limit=24", "trainer.enable_progress_bar=False",
    )  # fmt: skip
    assert status == 0
    table = [line.split("|")[1:3] for line in printed.splitlines() if line.startswith("| ")]
    titles = [title.strip() for title, _ in table]
    assert titles == ["network", *(warps.ARMS[arm].title for arm in ("affine", "plain", "affine", "plain"))]
    assert [how.strip() for _, how in table[1::2]] == list(warps.TRAININGS)
    assert (tmp_path / "warps.png").is_file() and "4 of 4" in printed
    stage = json.loads((tmp_path / "seed0" / "affine_turned" / "result.json").read_text())["config"]
    assert (stage["trainer"]["max_epochs"], stage["data"]["dataset"]["limit"]) == (1, 24)


# -- effective dilation -----------------------------------------------------------------------------------------------


def test_units_belong_to_the_object_that_they_lie_on():
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(8.0)).view(4, 8, 2)
    # 1x1, 2x2, 3x3; and one that covers part of the last.
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 3, 2], [4, 1, 7, 4], [6, 3, 7, 4]])
    sizes = dilation.sizes_of_units(places, boxes, (1.5, 2.5))
    assert sizes.tolist() == [
        [0, 1, 1, 3, 3, 3, 3, 3],
        [3, 1, 1, 3, 2, 2, 2, 3],
        [3, 3, 3, 3, 2, 2, 2, 3],
        [3, 3, 3, 3, 2, 2, -1, 3],
    ]
    assert (dilation.sizes_of_units(places, torch.empty(0, 4), (1.5, 2.5)) == 3).all()


def test_effective_dilation_of_each_size_by_hand():
    """A filter that spreads its taps by as much as the pixel is bright: its dilation is 1 more than that."""
    layer = DCNv1(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.conv_offset.bias.fill_(1e-6)  # as trained ones have
        for tap in range(9):
            layer.conv_offset.weight[2 * tap : 2 * tap + 2, 0, 1, 1] = torch.tensor([tap // 3 - 1.0, tap % 3 - 1.0])
    images, boxes = torch.zeros(2, 1, 16, 16), [torch.empty(0, 4), torch.tensor([[1.0, 1, 4, 4], [5, 5, 15, 15]])]
    images[0] = 0.5
    images[1, 0, 1:4, 1:4], images[1, 0, 5:15, 5:15] = 1, 2
    model = torch.nn.Sequential(layer)
    found = dilation.dilation_by_size(model, [(images, [torch.tensor([[0.0, 0, 16, 16]]), boxes[1]])], (3.5, 12))["0"]
    assert [found[size]["units"] for size in dilation.SIZES] == [9, 100, 256, 256 - 109]
    means = [found[size]["mean"] for size in dilation.SIZES]
    assert means == pytest.approx([2.0, 3.0, 1.5, 1.0], abs=1e-5)
    assert all(found[size]["deviation"] == pytest.approx(0, abs=1e-5) for size in dilation.SIZES)
    # On a map of half the size, units lie on every other pixel.
    strided = torch.nn.Sequential(torch.nn.AvgPool2d(2), layer)
    found = dilation.dilation_by_size(strided, [(images[:1], [torch.tensor([[0.0, 0, 8, 16]])])], (3.5, 20))["1"]
    assert found["medium"]["units"] == found["background"]["units"] == 32
    assert found["medium"]["mean"] == pytest.approx(1.5, abs=1e-5)


def test_dilation_study_gives_numbers_table_and_plot_and_reuses_what_is_finished(tmp_path, capsys):
    options = {**dilation.QUICK, **SILENT, "data.root": str(tmp_path / "scenes"), "data.batch_size": 2}
    options["data.scenes"] = dict(train=2, val=1, test=4)
    study = dilation.run_study(DETECTORS, tmp_path, [0], ["rfcn"], options)
    assert [row["layer"] for row in study["rows"]] == [f"backbone.body.layer{stage}.0.conv2" for stage in (2, 3, 4)]
    lines = study["table"].splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    stage = json.loads((tmp_path / "seed0" / "rfcn" / "result.json").read_text())
    for row, undeformed in zip(study["rows"], (1, 2, 4), strict=True):
        # After one step offsets are near zero, where the effective dilation is the layer's own.
        assert [row[size]["mean"] for size in dilation.SIZES] == pytest.approx([undeformed] * 4, abs=0.2)
        assert sum(row["units"].values()) <= 4 * 16 * 16 and min(row["units"].values()) > 0
        assert row["AP"]["mean"] == stage["AP"] and row["limits"][0] < row["limits"][1]
    assert imread(study["files"]["dilation"]).std() > 0.01
    capsys.readouterr()
    again = dilation.run_study(DETECTORS, tmp_path, [0], ["rfcn"], options)
    assert capsys.readouterr().out.count("reused") == 1 and again["rows"] == study["rows"]


@pytest.mark.parametrize("study", [warps, dilation])
@pytest.mark.parametrize("arms", [[], ["yolo"]])
def test_bad_arms_are_named(study, arms, tmp_path):
    with pytest.raises(ValueError, match="arms: expected some of .*, got"):
        study.run_study(Path("."), tmp_path, [0], arms)
    assert not list(tmp_path.iterdir())


def test_time_of_an_interrupted_session_counts_and_a_torn_result_is_none(tmp_path, monkeypatch):
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(stages, "CLOCKS", dict(train_seconds=lambda: next(ticks)))
    result, exported = tmp_path / stages.RESULT, tmp_path / "model.pt2"

    def interrupted(resume):
        (tmp_path / "last.ckpt").touch()
        raise KeyboardInterrupt

    def whole(resume):
        exported.touch()
        return dict(export=str(exported), resumed=resume is not None)

    with pytest.raises(KeyboardInterrupt):
        stages.run_once(tmp_path, "key", "a network", interrupted)
    assert json.loads(result.read_text())["train_seconds"] == 10
    outcome = stages.run_once(tmp_path, "key", "a network", whole)
    assert outcome["train_seconds"] == 20 and outcome["resumed"] and [*tmp_path.glob("*.new")] == []
    assert stages.run_once(tmp_path, "key", "a network", interrupted) == outcome  # reused
    result.write_text(result.read_text()[:-9])
    assert stages.run_once(tmp_path, "key", "a network", whole)["train_seconds"] == 10
