"""Fine-tuning detectors: annotations in COCO's format, embedded scenes, module, study."""

import json
import warnings
from functools import partial
from types import SimpleNamespace

from detector_runs import FASTER, write_coco
from PIL import Image
from studies.detection import run_study
from torch import nn
from torchmetrics.detection import mean_ap

from dcn_plugin.export import export_model
from dcn_plugin.finetune import CocoDataModule, DetectionModule
from dcn_plugin.finetune.detection.datasets import CocoImages
from dcn_plugin.finetune.images import UnreadableImage
from dcn_plugin.finetune.scenes import draw_scene, write_scenes
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
            warnings.filterwarnings("ignore", ".*(less than a pixel|is left out|has no objects)")
            data.setup(stage)
            if look is not None:
                look(data)

    return call


def annotation(**changes):
    return coco(dict(annotations=[BOX | changes]))


def entry(key, number, **changes):
    """The set as it is, but for one of its images, categories or annotations."""

    def spoil(path):
        whole = json.loads((path / "train.json").read_text())
        whole[key][number].update(changes)
        (path / "train.json").write_text(json.dumps(whole))

    return coco(spoil=spoil)


def val_with_categories(**names):
    def call(tmp_path):
        categories = [dict(id=int(key[1:]), name=name) for key, name in names.items()]
        coco(val=write_coco(tmp_path, [], name="val", categories=categories))(tmp_path)

    return call


def photos_of_other_kinds(path):
    for name in ("a.HEIC", "below/b.png", ".c.png", "d.pdf", "e.txt"):
        file = path / "nested" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def nothing_seen():
    made = module(3)
    made.trainer = SimpleNamespace(world_size=1, sanity_checking=False)
    made.on_validation_epoch_end()


def another_size(path):
    Image.new("RGB", (80, 60)).save(path / "train" / "2.png")


def unreadable(path, number="*"):
    for file in (path / "train").glob(f"{number}.png"):
        file.write_bytes(b"no image")


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
    Case(
        coco(stage="predict", predict="nested", spoil=photos_of_other_kinds),
        FileNotFoundError, "predict:", "expected images in", "found none that Pillow reads, but 1 .HEIC, 1 in folders",
    ),
    Case(coco(text='{"images": ['), ValueError, ANNOTATIONS, "is not JSON", "line 1 column"),
    Case(coco(text="[]"), ValueError, ANNOTATIONS, "expected a dict", "got []"),
    Case(
        coco(dict(annotations=None)), ValueError, ANNOTATIONS, "expected a list 'annotations'", "got None"
    ),
    Case(
        coco(dict(images={}, annotations=[])),
        ValueError, ANNOTATIONS, "expected a list 'images'", "got {}",
    ),
    Case(coco(dict(categories=[])), ValueError, ANNOTATIONS, "categories", "has no"),
    Case(coco(dict(annotations=["x"])), ValueError, "annotations[0]:", "expected a dict", "got 'x'"),
    Case(
        coco(dict(annotations=[BOX, BOX])),
        ValueError, "annotations[1]:", "an 'id' of its own", "got 1, which another one of 'annotations' has too",
    ),
    *(
        Case(entry("images", 2, id=key), ValueError, "images[2]:", "a whole number or a string", f"got {key!r}")
        for key in (None, 1.5, True, "", [1], float("nan"))
    ),
    *(
        Case(entry("categories", 1, name=name), ValueError, "category 7:", "expected 'name'", f"got {name!r}")
        for name in (None, "", " ", ["a"], True)
    ),
    Case(
        entry("categories", 1, name="kind3"),
        ValueError, ANNOTATIONS, "a name of its own for every category", "got 'kind3' for categories 3 and 7",
    ),
    *(
        Case(entry("images", 2, file_name=name), ValueError, "image 98:", "expected 'file_name'", f"got {name!r}")
        for name in (None, "", 7)
    ),
    *(
        Case(entry("images", 2, **sides), ValueError, "image 98:", "'width' and 'height' in whole pixels", got)
        for sides, got in (
            (dict(width=None), "got width None, height 30"), (dict(width="40", height="30"), "got width '40'"),
            (dict(height=0), "height 0"), (dict(height=29.5), "height 29.5"), (dict(width=True), "got width True"),
        )
    ),
    Case(annotation(image_id=5), ValueError, "annotation 1 is of image", "among the images", "5, which is not"),
    Case(annotation(image_id="100"), ValueError, "annotation 1 is of image", "100, which is a number", "'100', which"),
    Case(annotation(category_id=4), ValueError, "annotation 1 has category", "among them", "4, which is not"),
    Case(annotation(category_id="3"), ValueError, "annotation 1 has category", "3, which is a number", "'3', which"),
    *(
        Case(annotation(iscrowd=crowd), ValueError, "annotation 1:", "expected 'iscrowd' 0 or 1", f"got {crowd!r}")
        for crowd in (None, "0", 2, [])
    ),
    *(
        Case(annotation(area=area), ValueError, "annotation 1:", "expected 'area'", f"got {area!r}")
        for area in (None, "25", -1, float("inf"))
    ),
    *(
        Case(annotation(bbox=box), ValueError, "annotation 1:", "'bbox' [x, y, width, height]", f"got {box!r:.60}")
        for box in ([1, 2, 3], [1, 2, 3, float("nan")], None, ["1", "2", "3", "4"], [1, 2, 3, True], [0, 0, 9, 10**400])
    ),
    Case(
        coco(spoil=lambda path: (path / "train/2.png").unlink()),
        FileNotFoundError, "train.images:", "train.json names for image 98", "2.png does not exist",
    ),
    Case(
        coco(spoil=lambda path: ((path / "train/2.png").unlink(), (path / "train/2.png").mkdir())),
        FileNotFoundError, "train.images:", "train.json names for image 98", "2.png is no file",
    ),
    Case(coco(bad_boxes="raise"), ValueError, ANNOTATIONS, "bad_boxes='skip'", "[5, 5, 0, 9] of annotation 5"),
    Case(
        coco(dict(annotations=[])), ValueError, ANNOTATIONS, "to train on", "has no box",
    ),
    Case(no_images, ValueError, "train.json", "images", "leaves no"),
    Case(
        coco(
            spoil=lambda path: unreadable(path, 2), look=lambda data: list(data._dataset("train")),
        ),
        UnreadableImage, "2.png", "unreadable image", "cannot identify image",
    ),
    Case(
        coco(
            stage="predict", predict="train",
            spoil=lambda path: unreadable(path, 2), look=lambda data: list(data._dataset("predict")),
        ),
        UnreadableImage, "2.png", "unreadable image", "cannot identify image",
    ),
    Case(
        coco(spoil=unreadable, bad_images="skip", look=lambda data: data._dataset("train")[0]),
        ValueError, "bad_images:", "expected an image that can be read", "found none",
    ),
    Case(coco(spoil=another_size), ValueError, "2.png", "expected 40x30 pixels", "got 80x60"),
    Case(
        val_with_categories(i3="kind3", i7="kind7", i8="kind8"),
        ValueError, "val.annotations:", "category 8 ('kind8')", "is only in val",
    ),
    Case(
        val_with_categories(i3="kind3", i7="kind90", i90="kind7"),
        ValueError, "val.annotations:", "category 7 is 'kind90' in val", "'kind7' in train",
    ),
    Case(coco(num_classes=80), ValueError, "num_classes:", "expected 80 categories", "train.json has 3"),
    Case(of_two_processes("train", batch_size=3), ValueError, "batch_size:", "at most the 2 images", "got 3"),
    Case(
        of_two_processes("val", limit=1, batch_size=1),
        ValueError, "val:", "an image for each of 2 processes", "got 1",
    ),
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
    Case(data(bad_images="x"), ValueError, "bad_images:", "expected 'raise' or 'skip'", "got 'x'"),
    Case(data(bad_boxes="x"), ValueError, "bad_boxes:", "expected 'skip' or 'raise'", "got 'x'"),
    Case(
        data(name="digit_scenes", train=dict(images="a", annotations="b")),
        ValueError, "train:", "expected None, as 'digit_scenes' has splits of its own", "got {'images': 'a'",
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
    Case(
        lambda: CocoDataModule().num_classes,
        ValueError, "num_classes:", "expected a number, as without train", "got None",
    ),
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


def beside(trained_on=None, names=None, **given):
    """The module as it meets its data."""

    def call():
        made = module(10)
        made.category_ids, made.class_names = trained_on, names
        made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**given))
        made.setup("fit")

    return call


def from_weights_with_other_names(stage):
    def call():
        made = module(2)
        made.started_from, made.load_report = (["cat", "dog"], "start.safetensors"), SimpleNamespace(allowed=())
        given = SimpleNamespace(category_ids=[4, 5], class_names=["dog", "cat"])
        made.trainer = SimpleNamespace(datamodule=given)
        made.setup(stage)

    return call


def metric_without_pycocotools(monkeypatch):
    monkeypatch.setattr(mean_ap, "_PYCOCOTOOLS_AVAILABLE", False)
    module(3)


MODULE = [
    Case(nothing_seen, ValueError, "val:", "expected images to evaluate", "could read none"),
    Case(beside(in_chans=3), ValueError, "in_chans:", "expected the model's 1 channels", "got 3 of the data"),
    Case(beside(num_classes=4), ValueError, "num_classes:", "expected the model's 10 classes", "got 4 of the data"),
    Case(
        beside([1, 2], category_ids=[1, 3]),
        ValueError, "category_ids:", "category 2", "only in the model's training",
    ),
    Case(
        beside([1, 2], ["cat", "dog"], category_ids=[1, 2], class_names=["cat", "Dog"]),
        ValueError, "category_ids:", "category 2 is 'dog' in the model's training", "'Dog' in the data",
    ),
    Case(
        from_weights_with_other_names("test"),
        ValueError, "checkpoint:", "category 1 is 'cat' in start.safetensors", "'dog' in the data",
    ),
    Case(
        metric_without_pycocotools,
        ModuleNotFoundError, "DetectionModule", "pip install '.[detection]'", "needs pycocotools",
    ),
    Case(
        lambda: DetectionModule("faster_rcnn", 3),
        ValueError, "model:", "expected dict(name='faster_rcnn' or 'rfcn'", "got 'faster_rcnn'",
    ),
    Case(
        lambda: DetectionModule(FASTER | dict(backbone=dict(FASTER["backbone"], act_layer=nn.ReLU)), 3),
        TypeError, "model.backbone.act_layer:", "which checkpoints and exported folders hold", "got type <class",
    ),
    Case(
        lambda tmp_path: export_model(module(3).model, tmp_path, spec=dict(name="rfcn")),
        ValueError, "spec:", "expected dict(name=..., num_classes=..., ...) of a detector", "got {'name': 'rfcn'}",
    ),
    Case(lambda: module(0), ValueError, "num_classes:", "expected at least 1 class of objects", "got 0"),
    Case(
        lambda: DetectionModule(FASTER | dict(num_classes=10), 10),
        ValueError, "model.num_classes:", "or one more for the background", "got model.num_classes=10",
    ),
    *(
        Case(lambda arms=arms: run_study(".", ".", [0], arms), ValueError, "arms:", "expected some of", f"got {arms}")
        for arms in ([], ["rfcn", "rfcn"], ["yolo"])
    ),
]  # fmt: skip
CASES = FILES + DATA + SCENES + MODULE
