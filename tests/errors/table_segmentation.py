"""Segmentation: segmenters, masks, folders of images and masks, module, pictures."""

import importlib
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from segmenter_runs import SEGMENTER, write_folders
from tiny import trainer

from dcn_plugin.export import export_model
from dcn_plugin.finetune import SegmentationDataModule, SegmentationModule
from dcn_plugin.finetune.images import UnreadableImage
from dcn_plugin.finetune.masks import read_mask
from dcn_plugin.finetune.segmentation import MaskWriter
from dcn_plugin.segmentation import build_segmenter, deeplab, deeplabv3, fcn
from dcn_plugin.visualize import class_colours, draw_masks, paint_mask
from errors.case import Case

TINY = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))

MODELS = [
    Case(lambda: fcn(1, TINY), ValueError, "num_classes:", "an integer from 2 on", "got 1"),
    Case(lambda: deeplab(3, TINY, head_channels=0), ValueError, "head_channels:", "an integer from 1 on", "got 0"),
    Case(lambda: deeplabv3(3, TINY, atrous_rates=()), ValueError, "atrous_rates:", "as (12, 24, 36)", "got ()"),
    Case(lambda: fcn(3, TINY, output_stride=4), ValueError, "output_stride:", "8, 16, 32 or None", "got 4"),
    Case(
        lambda: fcn(3, dict(name="internimage_tiny", depths=(1, 1, 1, 1))),
        ValueError, "output_stride:", "expected 32 or None, as the stride of internimage_tiny cannot", "got 8",
    ),
    Case(
        lambda: fcn(3, dict(TINY, output_stride=8)),
        ValueError, "backbone:", "expected no output_stride, which is an argument beside it", "got 8",
    ),
    Case(lambda: fcn(3, dict(TINY, width=3)), TypeError, "width", "unexpected keyword argument", "width"),
    Case(
        lambda: fcn(3, dict(TINY, out_indices=(4,)), aux_loss=True),
        ValueError, "backbone:", "out_indices of two maps, as aux_loss needs both", "got (4,)",
    ),
    Case(lambda: fcn(3, TINY, image_std=(1.0,)), ValueError, "image_std:", "for each of 3 channels", "got (1.0,)"),
    Case(
        lambda: fcn(3, TINY)(torch.rand(3, 64, 64)), ValueError, "images:", "expected [N, 3, H, W]", "got [3, 64, 64]",
    ),
    *(
        Case(
            lambda given=given: fcn(3, TINY, image_std=given),
            ValueError, "image_std:", expected, f"got {given!r}",
        )
        for given, expected in (
            ((1.0, 0.0, 1.0), "expected numbers above 0"),
            ((1.0, float("inf"), 1.0), "expected one number for each of 3"),
            ("abc", "expected one number for each of 3"),
        )
    ),
    *(
        Case(
            lambda given=given: fcn(3, dict(TINY, out_indices=given)),
            ValueError, "backbone:", "expected out_indices of maps, as (-2, -1)", f"got {given!r}",
        )
        for given in ((), 3, "ab", (0.5,))
    ),
    Case(
        lambda: fcn(3, dict(TINY, out_indices=(9,))),
        ValueError, "backbone:", "expected out_indices among its maps", "got (9,)",
    ),
    Case(lambda: fcn(3, TINY)([torch.rand(3, 64, 64)]), ValueError, "images:", "expected [N, 3, H, W]", "got a list"),
    Case(lambda: build_segmenter(dict(name=["x"])), ValueError, "name:", "out of deeplab, deeplabv3, fcn", "['x']"),
    Case(lambda: build_segmenter("fcn"), TypeError, "spec:", "dict(name=..., num_classes=..., ...)", "got 'fcn'"),
    Case(lambda: build_segmenter(dict(name="unet")), ValueError, "name:", "out of deeplab, deeplabv3, fcn", "'unet'"),
    Case(
        lambda: build_segmenter(dict(name="fcn", num_classes=3, aux=True)),
        TypeError, "fcn:", "expected arguments num_classes, backbone", "got 'aux'",
    ),
    Case(lambda: build_segmenter(dict(name="fcn")), ValueError, "num_classes:", "a number for fcn", "got none"),
    Case(
        lambda tmp_path: export_model(fcn(3, TINY), tmp_path, spec=dict(name="fcn")),
        ValueError, "spec:", "expected dict(name=..., num_classes=..., ...) of a segmenter", "got {'name': 'fcn'}",
    ),
]  # fmt: skip


def folders(spoil=None, stage="fit", look=None, **options):
    """A set of four images with masks, spoilt, as it is set up or looked at."""

    def call(tmp_path):
        split = write_folders(tmp_path)
        if spoil is not None:
            spoil(tmp_path)
        given = {"train": split, "num_classes": 3, **options}
        data = SegmentationDataModule(root=str(tmp_path), **given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is left out")
            data.setup(stage)
            if look is not None:
                look(data)

    return call


def masked(values, mode=None, number=1):
    def spoil(path):
        image = Image.fromarray(np.asarray(values, np.uint8))
        (image if mode is None else image.convert(mode)).save(path / f"masks/train{number}.png")

    return spoil


def out_of_range(values):
    mask = np.zeros((30, 40))
    mask[3, 4:6] = values
    return masked(mask)


def unreadable(path):
    for file in (path / "masks").glob("*.png"):
        file.write_bytes(b"no image")


def listed(text):
    return lambda path: (path / "lists/train.txt").write_text(text)


def without_torchvision(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dcn_plugin.segmentation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision.models.segmentation.fcn", None)
    importlib.import_module("dcn_plugin.segmentation")


def no_images(path):
    for file in (path / "images").iterdir():
        file.unlink()


def everything(**changes):
    given = dict(images="images", masks="masks")
    return dict(train=given | changes)


DATA = [
    Case(
        lambda tmp_path: read_mask(tmp_path / "none.png", 3, 255),
        UnreadableImage, "none.png", "unreadable image", "No such file",
    ),
    Case(
        folders(augment=[dict(type="RandomApply", transforms=[dict(type="RandomFlip")])]),
        ValueError, "augment[0].transforms[0]:", "known: ", "unknown type 'RandomFlip'",
    ),
    Case(folders(train=dict(images="none", masks="masks")), FileNotFoundError, "train.images:", "a folder", "none'"),
    Case(folders(train=dict(images="images", masks="none")), FileNotFoundError, "train.masks:", "a folder", "none'"),
    Case(folders(**everything(list="none.txt")), FileNotFoundError, "train.list:", "expected a file", "none.txt'"),
    Case(folders(**everything(mask="a")), ValueError, "train:", "did you mean 'masks'?", "unknown key 'mask'"),
    Case(folders(train=dict(images="images")), ValueError, "train.masks:", "expected a path", "got none"),
    Case(folders(**everything(images=5)), ValueError, "train.images:", "expected a path", "got 5"),
    Case(folders(**everything(list=["a"])), ValueError, "train.list:", "expected a path", "got ['a']"),
    Case(
        folders(lambda path: (path / "lists/train.txt").write_bytes(b"caf\xe9\n")),
        ValueError, "train.list:", "expected text in UTF-8", "train.txt'",
    ),
    Case(
        folders(listed("train1.png\n")),
        FileNotFoundError, "train.images:", "without ending it is 'train1'", "train1.png has no image",
    ),
    Case(folders(listed("train9\n")), FileNotFoundError, "train9 has no image", "train.txt names", "train.images:"),
    Case(folders(listed("\n\n")), ValueError, "train.list:", "names of images, one in a line", "got none in"),
    Case(folders(listed("train1\ntrain1")), ValueError, "train.list:", "each image once", "got 'train1' 2 times"),
    Case(
        folders(no_images, **everything()),
        ValueError, "train.images:", "expected images in", "found none that Pillow reads",
    ),
    Case(
        folders(lambda path: Image.new("L", (40, 30)).save(path / "images/train1.bmp")),
        ValueError, "train.images:", "one image for each mask", "train1.png",
    ),
    Case(
        folders(lambda path: (path / "masks/train2.png").unlink()),
        FileNotFoundError, "train.masks:", "train2.png does not exist", "the mask of image",
    ),
    Case(folders(unreadable), UnreadableImage, "train0.png", "unreadable image", "cannot identify image"),
    Case(
        folders(unreadable, bad_images="skip", look=lambda data: data._dataset("train")[0]),
        ValueError, "bad_images:", "expected an image that can be read", "found none",
    ),
    Case(
        folders(lambda path: (path / "images/train1.png").write_bytes(b"no image")),
        UnreadableImage, "images/train1.png", "unreadable image", "cannot identify image",
    ),
    Case(
        folders(masked(np.zeros((40, 30)))),
        ValueError, "masks/train1.png: of another size than its image", "expected 30x40 pixels", "got 40x30",
    ),
    Case(
        folders(out_of_range([7, 3])),
        ValueError, "masks/train1.png", "expected class ids 0 to 2, or 255", "got 7 (2 of 1200 pixels are wrong)",
    ),
    *(
        Case(
            folders(masked(np.zeros((30, 40)), mode)),
            ValueError, "masks/train1.png", "class ids in one channel, or a palette", f"got {mode}",
        )
        for mode in ("RGB", "RGBA", "LA")
    ),
    Case(
        folders(look=lambda data: MaskWriter(data.root).setup(SimpleNamespace(datamodule=data), module(3), "predict")),
        ValueError, "directory:", "another folder for predicted masks than those of the data", "beside train.masks in",
    ),
    Case(folders(name="folder"), ValueError, "name:", "did you mean 'folders'?", "data set name 'folder'"),
    Case(folders(limit=0), ValueError, "limit:", "expected at least 1", "got 0"),
    Case(folders(bad_images="x"), ValueError, "bad_images:", "expected 'raise' or 'skip'", "got 'x'"),
    Case(folders(in_chans=2), ValueError, "in_chans:", "expected 1 or 3", "got 2"),
    Case(folders(ignore_index=-100), ValueError, "ignore_index:", "an integer from 0 on", "got -100"),
    Case(folders(class_names="abc"), TypeError, "class_names:", "a list of names", "got 'abc'"),
    *(
        Case(folders(num_classes=n), ValueError, "num_classes:", "integer of at least 2, or class_names", f"got {n!r}")
        for n in (None, 1, 2.5, "3")
    ),
    Case(folders(class_names=5), TypeError, "class_names:", "a list of names", "got 5"),
    Case(folders(class_names=["a", "b", "a"]), ValueError, "class_names:", "each name once", "got 'a' 2 times"),
    Case(folders(class_names=["a", "b"]), ValueError, "class_names:", "expected 3 names", "got 2"),
    Case(folders(train=None), ValueError, "train:", "expected dict(images=..., masks=...)", "got None"),
    Case(folders(batch_size=5), ValueError, "batch_size:", "at most the 4 images", "got 5"),
]  # fmt: skip

module = partial(SegmentationModule, SEGMENTER)


def beside(names=None, make=module, **given):
    """The module as it meets its data."""

    def call():
        made = make(3)
        made.class_names = names
        made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**given))
        made.setup("fit")

    return call


def nothing_labelled(stage):
    def call():
        made = module(3)
        made.trainer = trainer()
        getattr(made, f"on_{stage}_epoch_end")()

    return call


def of_two_sizes():
    images, masks = [torch.rand(1, 40, 40), torch.rand(1, 32, 40)], [dict(mask=torch.zeros(40, 40))] * 2
    module(3).training_step((images, masks), 0)


def from_weights_with_other_names():
    made = module(2)
    made.started_from, made.load_report = (["cat", "dog"], "start.safetensors"), SimpleNamespace(allowed=())
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(class_names=["dog", "cat"]))
    made.setup("test")


def from_a_checkpoint_of_other_classes():
    made = module(2)
    made.class_names = ["dog", "cat"]
    made.on_load_checkpoint(dict(dcn_plugin=dict(class_names=["cat", "dog"])))


MODULE = [
    Case(
        without_torchvision,
        ModuleNotFoundError, "dcn_plugin.segmentation", "pip install torchvision", "which is not installed",
    ),
    Case(
        from_weights_with_other_names,
        ValueError, "class_names:", "class 0 is 'cat' in start.safetensors", "'dog' in the data",
    ),
    Case(
        from_a_checkpoint_of_other_classes,
        ValueError, "class_names:", "class 0 is 'cat' in the checkpoint", "'dog' in the data",
    ),
    Case(lambda: SegmentationModule("fcn", 3), ValueError, "model:", "dict(name='deeplab', 'deep", "got 'fcn'"),
    Case(
        lambda: SegmentationModule(SEGMENTER | dict(num_classes=4), 3),
        ValueError, "num_classes:", "expected one number of classes", "got 4 in model and 3",
    ),
    *(
        Case(lambda w=w: module(3, aux_weight=w), ValueError, "aux_weight:", "a number from 0 on", f"got {w!r}")
        for w in (-1.0, float("inf"), "x")
    ),
    *(
        Case(lambda w=w: module(3, class_weights=w), ValueError, "class_weights:", "3 numbers", f"got {w!r}")
        for w in ([1.0, 2.0], [1.0, float("inf"), 1.0], [1.0, -1.0, 1.0], [0, 0, 0], 5, ["a", "b", "c"])
    ),
    *(
        Case(lambda n=n: module(3, ignore_index=n), ValueError, "ignore_index:", "an integer or None", f"got {n!r}")
        for n in (2.5, "255", True)
    ),
    Case(beside(in_chans=3), ValueError, "in_chans:", "expected the model's 1 channels", "got 3 of the data"),
    Case(beside(num_classes=4), ValueError, "num_classes:", "expected the model's 3 classes", "got 4 of the data"),
    Case(
        beside(make=partial(module, ignore_index=0), ignore_index=255),
        ValueError, "ignore_index:", "expected the module's 0", "got 255 of the data",
    ),
    Case(
        beside(["a", "b", "c"], class_names=["a", "c", "b"]),
        ValueError, "class_names:", "class 1 is 'b' in what the model was trained on", "'c' in the data",
    ),
    *(
        Case(nothing_labelled(stage), ValueError, f"{name}:", "expected labelled pixels", "got none")
        for stage, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    ),
    Case(of_two_sizes, ValueError, "images:", "expected one size in a batch", "got (32, 40) and (40, 40)"),
]  # fmt: skip

IMAGE = torch.rand(3, 4, 5)
PICTURES = [
    Case(lambda: class_colours(257), ValueError, "count:", "expected 1 to 256 colours", "got 257"),
    Case(
        lambda: paint_mask(IMAGE, torch.zeros(5, 4, dtype=torch.uint8)),
        ValueError, "mask:", "integers [H, W] for an image [C, H, W]", "got [5, 4] of torch.uint8 for [3, 4, 5]",
    ),
    Case(lambda: paint_mask(IMAGE, torch.zeros(4, 5)), ValueError, "mask:", "expected integers", "torch.float32"),
    Case(
        lambda: draw_masks([IMAGE], [torch.zeros(4, 5, dtype=torch.uint8)], []),
        ValueError, "masks:", "one annotated for each of some images", "got 0 for 1",
    ),
]  # fmt: skip
CASES = MODELS + DATA + MODULE + PICTURES
