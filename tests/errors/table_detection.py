"""Fine-tuning detectors: annotations in COCO's format, embedded scenes, module, study."""

import json
import sys
import warnings
from functools import partial
from types import SimpleNamespace

from test_detection_finetune import FASTER, write_coco
from torchmetrics.detection import mean_ap

from dcn_plugin.finetune import CocoDataModule, DetectionModule
from dcn_plugin.finetune.detection.data import CocoImages
from dcn_plugin.finetune.detection.scenes import draw_scene, write_scenes
from dcn_plugin.finetune.detection.study import run_study
from errors.case import Case

BOX = dict(id=1, image_id=100, category_id=3, bbox=[1, 1, 5, 5])


def coco(changes=None, stage="fit", text=None, spoil=None, look=None, **options):
    """A set of four images whose annotations are changed (or replaced by a text), as it is set up or looked at."""

    def call(tmp_path):
        split = write_coco(tmp_path)
        file = tmp_path / "train.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})) if text is None else text)
        if spoil is not None:
            spoil(tmp_path)
        data = CocoDataModule(root=str(tmp_path), **{"train": split, **options})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*less than a pixel")
            data.setup(stage)
            if look is not None:
                look(data)

    return call


def annotation(**changes):
    return coco(dict(annotations=[BOX | changes]))


def val_with_other_categories(tmp_path):
    categories = [dict(id=i, name="x") for i in (3, 7, 8)]
    coco(val=write_coco(tmp_path, [], name="val", categories=categories))(tmp_path)


def without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    coco()(tmp_path)


def of_two_processes(stage, **options):
    def look(data):
        data.trainer = SimpleNamespace(world_size=2, global_rank=0)
        data._loader(stage)

    return coco(look=look, val=dict(images="train", annotations="train.json"), **options)


def no_images(tmp_path):
    CocoImages(tmp_path / "train", tmp_path / write_coco(tmp_path)["annotations"], limit=0)


ANNOTATIONS = "train.annotations:"
FILES = [
    Case(
        coco(train=dict(images="nowhere", annotations="train.json")),
        FileNotFoundError, "train.images:", "expected a folder", "nowhere', which does not exist",
    ),
    Case(
        coco(train=dict(images="train.json", annotations="train.json")),
        FileNotFoundError, "train.images:", "expected a folder", "train.json', which is no folder",
    ),
    Case(
        coco(train=dict(images="train", annotations="none.json")),
        FileNotFoundError, "train.annotations:", "expected a file", "none.json', which does not exist",
    ),
    Case(
        coco(stage="predict", predict="nowhere"),
        FileNotFoundError, "predict:", "expected a folder", "nowhere', which does not exist",
    ),
    Case(
        coco(stage="predict", predict="empty", spoil=lambda path: (path / "empty").mkdir()),
        FileNotFoundError, "predict:", "expected images in", "found none",
    ),
    Case(without_pycocotools, ModuleNotFoundError, "COCO data", "'dcn_plugin[detection]'", "needs pycocotools"),
    Case(coco(text='{"images": ['), ValueError, ANNOTATIONS, "is not JSON", "line 1 column"),
    Case(coco(text="[]"), ValueError, ANNOTATIONS, "is not in COCO's format", "<class 'list'>"),
    Case(
        coco(dict(annotations=None)), ValueError, ANNOTATIONS, "is not in COCO's format", "'NoneType' object"
    ),
    Case(
        coco(dict(images={}, annotations=[])),
        ValueError, ANNOTATIONS, "expected a list 'images'", "got {}",
    ),
    Case(coco(dict(categories=[])), ValueError, ANNOTATIONS, "categories", "has no"),
    Case(
        coco(dict(annotations=[BOX, BOX])),
        ValueError, ANNOTATIONS, "an 'id' of its own for everything in 'annotations'", "got [1, 1]",
    ),
    Case(annotation(image_id=5), ValueError, "annotation 1 is of image", "among the images", "5, which is not"),
    Case(annotation(category_id=4), ValueError, "annotation 1 has category", "among them", "4, which is not"),
    *(
        Case(annotation(bbox=box), ValueError, "annotation 1:", "'bbox' [x, y, width, height]", f"got {box!r}")
        for box in ([1, 2, 3], [1, 2, 3, float("nan")], None)
    ),
    Case(
        coco(spoil=lambda path: (path / "train/2.png").unlink()),
        FileNotFoundError, "train.images:", "train.json names", "2.png does not exist",
    ),
    Case(coco(bad_boxes="raise"), ValueError, ANNOTATIONS, "bad_boxes='skip'", "[5, 5, 0, 9] of annotation 5"),
    Case(
        coco(dict(annotations=[]), empty_images="drop"),
        ValueError, ANNOTATIONS, "with boxes to train on", "leaves no images",
    ),
    Case(no_images, ValueError, "train.json", "images", "leaves no"),
    Case(
        coco(
            spoil=lambda path: (path / "train/2.png").write_bytes(b"no image"),
            look=lambda data: list(data._dataset("train")),
        ),
        ValueError, "2.png", "unreadable image", "cannot identify image",
    ),
    Case(
        coco(
            stage="predict", predict="train",
            spoil=lambda path: (path / "train/2.png").write_bytes(b"no image"),
            look=lambda data: list(data._dataset("predict")),
        ),
        ValueError, "2.png", "unreadable image", "cannot identify image",
    ),
    Case(
        val_with_other_categories,
        ValueError, "val.annotations:", "only one of val and train", "category 8",
    ),
    Case(coco(num_classes=80), ValueError, "num_classes:", "expected 80 categories", "train.json has 3"),
    Case(of_two_processes("train", batch_size=3), ValueError, "batch_size:", "at most the 2 images", "got 3"),
    Case(of_two_processes("val", limit=1), ValueError, "val:", "an image for each of 2 processes", "got 1"),
]  # fmt: skip


def data(**options):
    return lambda: CocoDataModule(**options)


AUGMENT = "expected a list of dict(type=..., ...)"
DATA = [
    Case(data(name="cocoo"), ValueError, "name:", "did you mean 'coco'?", "unknown data set name 'cocoo'"),
    Case(data(batch_size=0), ValueError, "batch_size:", "expected at least 1", "got 0"),
    Case(data(num_workers=-1), ValueError, "num_workers:", "expected 0 or more", "got -1"),
    Case(data(in_chans=2), ValueError, "in_chans:", "expected 1 or 3", "got 2"),
    Case(data(empty_images="drp"), ValueError, "empty_images:", "expected 'keep' or 'drop'", "got 'drp'"),
    Case(data(bad_boxes="x"), ValueError, "bad_boxes:", "expected 'skip' or 'raise'", "got 'x'"),
    Case(
        data(name="digit_scenes", train=dict(images="a", annotations="b")),
        ValueError, "train:", "'digit_scenes' has splits of its own", "got {'images': 'a'",
    ),
    Case(data(scenes=dict(train=3)), ValueError, "scenes:", "only 'digit_scenes' takes them", "got {'train': 3}"),
    Case(data(train=dict(images="a")), ValueError, "train.annotations:", "expected a path", "got none"),
    Case(
        data(train=dict(images="a", annotation="b")),
        ValueError, "train:", "did you mean 'annotations'?", "unknown key 'annotation'",
    ),
    Case(data(augment=dict(type="Resize")), TypeError, "augment:", AUGMENT, "got {'type': 'Resize'}"),
    Case(data(augment=[dict(type="RandomFlip")]), ValueError, "augment[0]:", "known: ", "type 'RandomFlip'"),
    Case(
        data(augment=[dict(type="RandomApply", transforms=[dict(type="RandomFlip")])]),
        ValueError, "augment[0].transforms[0]:", "known: ", "unknown type 'RandomFlip'",
    ),
    Case(lambda: CocoDataModule().setup("fit"), ValueError, "train:", "dict(images=..., annotations=...)", "got None"),
    Case(lambda: CocoDataModule().num_classes, ValueError, "num_classes:", "pass num_classes", "nothing names"),
]  # fmt: skip


def scenes(**options):
    def call(tmp_path):
        before = list(tmp_path.iterdir())
        try:
            write_scenes(tmp_path / "scenes", **dict(train=3, val=2, test=2) | options)
        finally:
            assert list(tmp_path.iterdir()) == before

    return call


def into_another_folder(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "thesis.txt").write_text("")
    scenes()(tmp_path)


SCENES = [
    Case(lambda: draw_scene("valid", 0), ValueError, "split:", "expected one of train, val, test", "got 'valid'"),
    Case(scenes(digits=(4, 2)), ValueError, "digits:", "(smallest, largest) within 1..100", "got (4, 2)"),
    Case(scenes(digit_size=(5, 20)), ValueError, "digit_size:", "within 12..128", "got (5, 20)"),
    Case(scenes(digit_size=(20, 300)), ValueError, "digit_size:", "within 12..128", "got (20, 300)"),
    Case(scenes(stretch=(0.0, 1.0)), ValueError, "stretch:", "within 0.1..10.0", "got (0.0, 1.0)"),
    Case(scenes(noise=-1), ValueError, "noise:", "expected 0 or more", "got -1"),
    Case(scenes(overlap=1.0), ValueError, "overlap:", "expected 0 <= overlap < 1", "got 1.0"),
    Case(scenes(train=0), ValueError, "train:", "expected at least 1 scene", "got 0"),
    Case(scenes(sizes=3), ValueError, "scenes:", "known: train, val, test, limit", "unknown option 'sizes'"),
    Case(into_another_folder, FileExistsError, "root:", "a folder for the scenes", "which holds something else"),
]
module = partial(DetectionModule, FASTER)


def beside(trained_on=None, **given):
    """The module as it meets its data."""

    def call():
        made = module(10)
        made.category_ids = trained_on
        made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**given))
        made.setup("fit")

    return call


def metric_without_pycocotools(monkeypatch):
    monkeypatch.setattr(mean_ap, "_PYCOCOTOOLS_AVAILABLE", False)
    module(3)


MODULE = [
    Case(beside(in_chans=3), ValueError, "in_chans:", "the model takes 1 channels", "the data has 3"),
    Case(beside(num_classes=4), ValueError, "num_classes:", "the model has 10 classes", "the data has 4"),
    Case(
        beside([1, 2], category_ids=[1, 3]),
        ValueError, "category_ids:", "the model was trained on [1, 2]", "the data has [1, 3]",
    ),
    Case(
        metric_without_pycocotools,
        ModuleNotFoundError, "DetectionModule", "pip install 'dcn_plugin[detection]'", "needs pycocotools",
    ),
    Case(
        lambda: DetectionModule("faster_rcnn", 3),
        ValueError, "model:", "expected dict(name='faster_rcnn' or 'rfcn'", "got 'faster_rcnn'",
    ),
    Case(lambda: module(0), ValueError, "num_classes:", "expected at least 1 class of objects", "got 0"),
    Case(
        lambda: DetectionModule(FASTER | dict(num_classes=10), 10),
        ValueError, "model.num_classes:", "count one more for the background", "got model.num_classes=10",
    ),
    *(
        Case(lambda arms=arms: run_study(".", ".", [0], arms), ValueError, "arms:", "expected some of", f"got {arms}")
        for arms in ([], ["rfcn", "rfcn"], ["yolo"])
    ),
]  # fmt: skip
CASES = FILES + DATA + SCENES + MODULE
