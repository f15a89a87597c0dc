"""COCO files as they are found: ids of any kind work through a whole run, and what is wrong is named before it."""

import contextlib
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
from detector_runs import FASTER, SCENES, config, write_coco  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import CocoDataModule, DetectionModule, load_exported, run  # noqa: E402
from dcn_plugin.finetune.detection import write_scenes  # noqa: E402
from dcn_plugin.finetune.detection.annotations import AnnotationFile  # noqa: E402
from dcn_plugin.finetune.run import quiet  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words", "one_thread")

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("files") / "scenes"
    return write_scenes(root, **(SCENES | dict(train=4, val=2, test=3)))


def rewritten(scenes, folder, change):
    """The arguments for the same images with annotation files that are changed, in a folder of their own."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split in SPLITS:
        whole = json.loads((scenes / f"annotations/instances_{split}.json").read_text())
        change(split, whole)
        (folder / f"{split}.json").write_text(json.dumps(whole))
        splits[split] = dict(images=str(scenes / "images" / split), annotations=str(folder / f"{split}.json"))
    return dict(name="coco", in_chans=1, batch_size=2, **splits)


def with_ids(image, category, annotation=lambda key: key):
    def change(split, whole):
        for entry in whole["images"]:
            entry["id"] = image(entry["id"])
        for entry in whole["categories"]:
            entry["id"] = category(entry["id"])
        for entry in whole["annotations"]:
            entry.update(image_id=image(entry["image_id"]), category_id=category(entry["category_id"]))
            entry["id"] = annotation(entry["id"])

    return change


def settings(data, **changes):
    return config(data, model=dict(FASTER, box_score_thresh=0.0), trainer=dict(TRAINER, max_epochs=1), **changes)


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run on the scenes as they are, and what it found."""
    folder = tmp_path_factory.mktemp("trained")
    data = rewritten(scenes, folder / "data", lambda split, whole: None)
    with quiet():
        results = run(settings(data), folder)
        found = run(settings(data), folder, "predict", results["checkpoint"])["predictions"]
    return dict(data=data, results=results, found=json.loads(Path(found).read_text()))


# -- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "category", "annotation"),
    [
        ("img_{:03d}".format, "kind {:02d}".format, int),
        ("{:03d}".format, float, "box {}".format),
        (float, float, float),
    ],
    ids=("strings", "strings-and-floats", "floats"),
)
def test_ids_of_other_kinds_work_through_a_whole_run(scenes, trained, tmp_path, image, category, annotation):
    """Train, evaluate, predict, export, restore: all as with numbers, but for the ids."""
    data = rewritten(scenes, tmp_path / "data", with_ids(image, category, annotation))
    results = run(settings(data), tmp_path)
    for key, value in trained["results"].items():
        if "map" in key or "mar" in key:
            assert results[key] == value, key
    weights, truth = (torch.load(r["checkpoint"], weights_only=True) for r in (results, trained["results"]))
    assert all(torch.equal(weights["state_dict"][key], value) for key, value in truth["state_dict"].items())
    path = run(settings(data), tmp_path, "predict", results["checkpoint"])["predictions"]
    found = json.loads(Path(path).read_text())
    assert found and found == [
        entry | dict(image_id=image(entry["image_id"]), category_id=category(entry["category_id"]))
        for entry in trained["found"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        if annotation is int:  # COCO's own evaluation puts these ids into an array
            coco = COCO(data["test"]["annotations"])
            evaluation = COCOeval(coco, coco.loadRes(path), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(results["test_map"], abs=1e-5)
    ids = [category(i) for i in range(1, 11)]
    assert DetectionModule.restore(results["checkpoint"]).category_ids == ids
    assert json.loads((Path(results["export"]) / "config.json").read_text())["category_ids"] == ids
    images = [torch.rand(1, 96, 96)]
    one, other = (load_exported(r["export"])(images)[0] for r in (results, trained["results"]))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_labels_follow_ids_in_ascending_order(tmp_path):
    names = {"b": "x", "a": "y", 2: "z", 10: "w"}
    split = write_coco(tmp_path, [], categories=[dict(id=key, name=name) for key, name in names.items()])
    data = CocoDataModule(root=str(tmp_path), val=split)
    assert data.category_ids == [2, 10, "a", "b"] and data.class_names == ["z", "w", "y", "x"]


# -- fields -------------------------------------------------------------------------------------------------------


def test_what_files_may_leave_out_or_write_in_other_ways(tmp_path):
    boxes = [
        dict(id=1, image_id=100, category_id=3, bbox=[1, 2, 10, 5], iscrowd=False, segmentation=None, score=None),
        dict(id=2, image_id=100, category_id=7.0, bbox=[1, 2, 3.5, 4], iscrowd=1.0, area=7),
        dict(id=3, image_id=99, category_id=90, bbox=[1, 2, 3, 4]),
    ]
    split = write_coco(tmp_path, boxes, licenses=None, info=[])
    file = tmp_path / "train.json"
    whole = json.loads(file.read_text())
    whole["categories"][1]["name"] = 7
    del whole["categories"][0]["name"]
    del whole["images"][1]["width"], whole["images"][1]["height"]
    whole["images"][0] |= dict(width=40.0, file_name="below/0.png", date_captured=None)
    (tmp_path / "train" / "below").mkdir()
    (tmp_path / "train" / "0.png").rename(tmp_path / "train" / "below" / "0.png")
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(whole).encode())  # the mark that some editors put before UTF-8
    data = CocoDataModule(root=str(tmp_path), train=split, val=split, eval_batch_size=4)
    data.setup("fit")
    assert data.class_names == ["kind3", "7", "90"] and data.filenames("val")[100] == "below/0.png"
    targets = {target["image_id"]: target for target in next(iter(data.val_dataloader()))[1]}
    assert targets[100]["iscrowd"].tolist() == [0, 1] and targets[100]["area"].tolist() == [50, 7]
    assert targets[100]["labels"].tolist() == [1, 2] and targets[99]["area"].tolist() == [12]


def test_twins_are_told(tmp_path):
    file = tmp_path / write_coco(tmp_path)["annotations"]
    whole = json.loads(file.read_text())
    whole["categories"].append(dict(id=1, name="kind3", supercategory="none"))  # a parent without objects
    whole["images"][3]["file_name"] = "0.png"
    file.write_text(json.dumps(whole))
    with pytest.warns(UserWarning, match=r"train.json: images 97 and 100 are the same file, '0.png'"):
        assert list(AnnotationFile(file, "train").categories) == [1, 3, 7, 90]


SPOILT = {
    "iscrowd": ("annotations", dict(iscrowd=None), "annotation 1: expected 'iscrowd' 0 or 1, got None"),
    "area": ("annotations", dict(area=None), "annotation 1: expected 'area'.*got None"),
    "bbox": ("annotations", dict(bbox=["1", "2", "3", "4"]), "annotation 1: expected 'bbox'.*got \\['1'"),
    "width": ("images", dict(width="96"), "image 1: expected 'width' and 'height'.*got width '96', height 96"),
    "size": ("images", dict(width=97), "000000.png: expected 97x96 pixels.*got 96x96"),
    "file": ("images", dict(file_name="nothing.png"), "nothing.png does not exist.*names for image 1"),
    "name": ("categories", dict(name="nought"), "category 1 is .*'nought'"),
}


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("split", SPLITS)
def test_faults_are_named_before_any_epoch(scenes, tmp_path, split, fault):
    key, changes, said = SPOILT[fault]

    def change(of, whole):
        if of == split:
            whole[key][0].update(changes)

    data = rewritten(scenes, tmp_path / "data", change)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        run(settings(data, logger=dict(type="CSVLogger", name="logs")), tmp_path / "work")
    assert fault == "file" or str(tmp_path / "data") in str(caught.value) or str(scenes) in str(caught.value)
    assert not list((tmp_path / "work").rglob("*.ckpt")) and not list((tmp_path / "work").rglob("metrics.csv"))


def test_test_split_is_the_validation_split_unless_it_is_given(tmp_path):
    split = write_coco(tmp_path, [dict(id=1, image_id=100, category_id=3, bbox=[1, 2, 10, 5])])
    data = CocoDataModule(root=str(tmp_path), train=split, val=split)
    data.setup("fit")
    assert data._dataset("test") is data._dataset("val") is not data._dataset("train")
    alone = CocoDataModule(root=str(tmp_path), train=split)  # neither validates nor tests
    alone.setup("fit")
    assert set(alone._datasets) == {"train"}


# -- names --------------------------------------------------------------------------------------------------------


def renamed(scenes, folder):
    def change(split, whole):
        whole["categories"][2]["name"], whole["categories"][6]["name"] = "6", "2"

    return rewritten(scenes, folder, change)


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_checkpoint_whose_names_differ_from_the_datas(scenes, trained, tmp_path, task):
    data = renamed(scenes, tmp_path / "data")
    with pytest.raises(ValueError, match="category 3 is '2' in the model's training and '6' in the data"):
        run(settings(data), tmp_path / "work", task, trained["results"]["checkpoint"])
    if task == "fit":  # and with one category more, and with another id
        for ids, said in (
            ({3: 11}, "category 3 .'2'. is only in the model's training"),
            ({10: 12}, "category 10 .'9'. is only in the model's training"),
        ):
            change = with_ids(int, lambda key, ids=ids: ids.get(key, key))
            with pytest.raises(ValueError, match=said):
                run(
                    settings(rewritten(scenes, tmp_path / "other", change)), tmp_path / "work", task,
                    trained["results"]["checkpoint"],
                )  # fmt: skip


def test_a_folder_of_images_has_no_names_to_compare(scenes, trained, tmp_path):
    data = dict(name="coco", predict=str(scenes / "images" / "test"), in_chans=1, num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        path = run(settings(data), tmp_path, "predict", trained["results"]["checkpoint"])["predictions"]
    found = json.loads(Path(path).read_text())
    assert [(entry["bbox"], entry["category_id"]) for entry in found] == [
        (entry["bbox"], entry["category_id"]) for entry in trained["found"]
    ]


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_weights_to_start_from_whose_names_differ(stage):
    """As they stand in an exported folder: training may go on to other classes, evaluation may not."""

    def meet(start, names, allowed=()):
        subject = DetectionModule(FASTER, 2)
        subject.started_from, subject.load_report = (start, "exported"), SimpleNamespace(allowed=allowed)
        subject.trainer = SimpleNamespace(datamodule=SimpleNamespace(category_ids=[4, 5], class_names=names))
        subject.setup(stage)
        assert subject.class_names == names

    said = r"counted by label, category 1 is 'cat' in exported and 'dog' in the data"
    with pytest.warns(UserWarning, match=said) if stage == "fit" else pytest.raises(ValueError, match=said):
        meet(["cat", "dog"], ["dog", "cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meet(["cat", "dog"], ["cat", "dog"])
        meet(None, ["dog", "cat"])
        meet(["cat", "dog"], ["dog", "cat"], ["roi_heads.box_predictor.cls_score.weight"])
