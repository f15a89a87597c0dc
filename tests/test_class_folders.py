"""Class folders and tar files of them as they are found; the truth is the colour that each image was painted with."""

import os
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
from test_data import COLOURS, colour_of  # noqa: E402

from dcn_plugin.finetune import ImageDataModule  # noqa: E402

SPLIT_NAMES = {"": "folder", "torch/image_folder": "torchvision's folder", "tar": "tar"}


def paint(root: Path, split: str, *names: str) -> None:
    """Write images in the colour that their path names, and a hidden file in another one."""
    for name in names:
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = next(colour for colour in COLOURS if colour in name)
        Image.new("RGB", (20, 20), COLOURS[colour]).save(path)


def tar_of(folder: Path, inside: str = "") -> None:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, inside or ".")


def module(kind: str, root: Path, stage: str = "fit", **options) -> ImageDataModule:
    if kind == "tar":
        for split in ("train", "val", "new"):
            if (root / split).is_dir():
                tar_of(root / split)
        options = {**dict(train_split="train.tar", val_split="val.tar"), **options}
        if "predict_split" in options:
            options["predict_split"] += ".tar"
    if not (root / "val").exists():
        options["val_split"] = None
    data = ImageDataModule(
        "" if kind == "tar" else kind, str(root), **{**dict(batch_size=1, input_size=16), **options},
        augment=dict(no_aug=True),
    )  # fmt: skip
    data.setup(stage)
    return data


def seen(data: ImageDataModule, loader) -> list[tuple[str, str]]:
    """Colour and class name of every image."""
    return sorted((colour_of(i, data), data.class_names[t]) for x, y in loader for i, t in zip(x, y, strict=True))


each_kind = pytest.mark.parametrize("kind", SPLIT_NAMES, ids=SPLIT_NAMES.values())


@each_kind
def test_the_class_is_the_folder_below_the_split(tmp_path, kind):
    paint(tmp_path, "train", "red/monday/1.png", "red/friday/1.png", "blue/monday/deep/1.png", "green/1.png")
    paint(tmp_path, "val", "blue/images/1.png", "red/images/2.png")
    data = module(kind, tmp_path)
    assert data.class_names == ["blue", "green", "red"]
    assert seen(data, data.train_dataloader()) == [(c, c) for c in ("blue", "green", "red", "red")]
    assert seen(data, data.val_dataloader()) == [("blue", "blue"), ("red", "red")]


@each_kind
def test_hidden_folders_and_files_are_left_out(tmp_path, kind):
    visible = ["red/1.png", "blue/1.png"]
    hidden = ["red/.ipynb_checkpoints/1-red.png", ".ipynb_checkpoints/red.png", "red/._1.png", "__MACOSX/red/1.png"]
    hidden += ["blue/@eaDir/blue.png", ".blue.png", "._red/1.png"]
    for split in ("train", "val", "new"):
        paint(tmp_path, split, *visible, *hidden)
    (tmp_path / "train" / "red" / "._1.png").write_bytes(b"Mac OS X resource fork")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = module(kind, tmp_path)
        assert data.class_names == ["blue", "red"]
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert seen(data, loader) == [("blue", "blue"), ("red", "red")]
        data = module(kind, tmp_path, "predict", predict_split="new")
    assert [Path(name).as_posix() for name in data.filenames()] == ["blue/1.png", "red/1.png"]


@each_kind
def test_images_that_are_not_read_are_counted(tmp_path, kind):
    names = ["red/1.png", "red/2.webp", "red/3.bmp", "red/deep/4.bmp", "blue/1.jpg", "blue/2.tif"]
    paint(tmp_path, "train", *names)
    for name in ("notes.txt", "red/annotation.json", "blue/photo.heic", "blue/table.h5"):
        (tmp_path / "train" / name).write_bytes(b"x")
    unread = {"torch/image_folder": "1 .heic"}.get(kind, "2 .bmp, 1 .heic, 1 .tif, 1 .webp")
    with pytest.warns(UserWarning, match=f"train.* holds images that are not read: {unread} .*input_key=") as caught:
        data = module(kind, tmp_path)
    assert len([w for w in caught if "not read" in str(w.message)]) == 1
    count = len(data.train_dataloader())
    assert count == (6 if kind == "torch/image_folder" else 2)
    # What the warning advises reads all that Pillow reads.
    with pytest.warns(UserWarning, match=r"not read: 1 \.heic"):
        data = module(kind, tmp_path, dataset=dict(input_key=".png;.jpg;.jpeg;.bmp;.tif;.webp"))
    assert seen(data, data.train_dataloader()) == [("blue", "blue")] * 2 + [("red", "red")] * 4


def test_endings_are_known_in_any_case_and_without_a_dot(tmp_path):
    paint(tmp_path, "train", "red/1.PNG", "blue/2.WebP")
    data = module("", tmp_path, dataset=dict(input_key="png; webp"))
    assert seen(data, data.train_dataloader()) == [("blue", "blue"), ("red", "red")]


@each_kind
def test_images_to_predict_need_no_class_folders(tmp_path, kind):
    paint(tmp_path, "train", "red/1.png", "blue/1.png")
    paint(tmp_path, "new", "2red.png", "10blue.png", "deep/er/blue.png")
    data = module(kind, tmp_path, "predict", predict_split="new")
    # In torchvision's set as in timm's: natural order.
    assert data.filenames() == ["2red.png", "10blue.png", "deep/er/blue.png"]
    colours = [colour_of(image, data) for images, _ in data.predict_dataloader() for image in images]
    assert colours == ["red", "blue", "blue"]


def test_a_class_map_leaves_other_folders_out_and_says_so(tmp_path):
    paint(tmp_path, "train", "red/1.png", "blue/1.png", "green/1.png", "green/2.png")
    paint(tmp_path, "val", "blue/1.png", "green/1.png")
    with pytest.warns(UserWarning, match="train_split: class_map leaves out 2 green of"):
        data = module("", tmp_path, dataset=dict(class_map=dict(red=0, blue=1)))
    assert data.class_names == ["red", "blue"]
    assert seen(data, data.train_dataloader()) == [("blue", "blue"), ("red", "red")]
    assert seen(data, data.val_dataloader()) == [("blue", "blue")]


def test_a_class_map_may_join_folders(tmp_path):
    paint(tmp_path, "train", "red/1.png", "blue/1.png", "green/1.png")
    data = module("", tmp_path, dataset=dict(class_map=dict(red=0, blue=1, green=0)))
    assert data.class_names == ["red or green", "blue"] and data.num_classes == 2


@each_kind
def test_links_are_followed_and_never_in_circles(tmp_path, kind):
    paint(tmp_path, "store", "crimson red/1.png", "sky blue/1.png")
    train = tmp_path / "train"
    train.mkdir()
    for name in ("crimson red", "sky blue"):
        if kind == "tar":  # a link inside a tar has no content of its own
            os.rename(tmp_path / "store" / name, train / name)
        else:
            (train / name).symlink_to(tmp_path / "store" / name)
            (tmp_path / "store" / name / "up").symlink_to(train)
            (tmp_path / "store" / name / "self").symlink_to(tmp_path / "store" / name)
    data = module(kind, tmp_path)
    pairs = [("blue", "sky blue"), ("red", "crimson red")]
    assert set(pairs) <= set(seen(data, data.train_dataloader())) and data.class_names == ["crimson red", "sky blue"]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    paint(tmp_path, "train", "red/1.png", "blue/1.png")
    (tmp_path / "train" / "red" / "2.png").symlink_to(tmp_path / "gone.png")
    data = module("", tmp_path)
    with pytest.raises(ValueError, match="unreadable image .*train/red/2.png.*No such file"):
        list(data.train_dataloader())


# -- tar files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [".", "train", "data/train"])
def test_a_tar_may_hold_the_folder_of_the_split(tmp_path, inside):
    paint(tmp_path, "train", "red/monday/1.png", "blue/1.png", "blue/2.png")
    tar_of(tmp_path / "train", inside)
    data = ImageDataModule(
        "",
        str(tmp_path),
        train_split="train.tar",
        val_split=None,
        input_size=16,
        augment=dict(no_aug=True),
        batch_size=1,
    )
    data.setup("fit")
    assert data.class_names == ["blue", "red"]
    assert seen(data, data.train_dataloader()) == [("blue", "blue")] * 2 + [("red", "red")]


def test_a_tar_may_hold_a_tar_for_each_class(tmp_path):
    paint(tmp_path, "train", "red/1.png", "red/.2.png", "blue/1.png", "blue/deep/2.png")
    for name in ("red", "blue"):
        tar_of(tmp_path / "train" / name)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("red.tar", "blue.tar"):
            tar.add(tmp_path / "train" / name, f"train/{name}")
    data = ImageDataModule(
        "", str(tmp_path), train_split="train.tar", val_split=None, batch_size=1, input_size=16, num_workers=2,
        augment=dict(no_aug=True),
    )  # fmt: skip
    data.setup("fit")
    assert seen(data, data.train_dataloader()) == [("blue", "blue")] * 2 + [("red", "red")]


def test_an_unreadable_image_of_a_tar_is_named_with_its_tar(tmp_path):
    paint(tmp_path, "train", "red/1.png", "blue/1.png")
    (tmp_path / "train" / "red" / "1.png").write_bytes(b"no image")
    tar_of(tmp_path / "train")
    data = ImageDataModule("", str(tmp_path), train_split="train.tar", val_split=None, batch_size=1, input_size=16)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"unreadable image red/1.png of .*train.tar: cannot identify"):
        list(data.train_dataloader())


def test_a_tar_without_images_and_a_compressed_one_are_errors(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.webp").write_bytes(b"x")
    tar_of(tmp_path / "train")
    data = ImageDataModule("", str(tmp_path), train_split="train.tar", val_split=None)
    with pytest.warns(UserWarning, match="1 .webp"), pytest.raises(FileNotFoundError, match=r"no images.*but 1 \.webp"):
        data.setup("fit")
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "train", ".")
    data = ImageDataModule("", str(tmp_path), train_split="train.tar.gz", val_split=None)
    with pytest.raises(
        ValueError, match="train_split: expected a folder or an uncompressed tar file, got .*train.tar.gz"
    ):
        data.setup("fit")


# -- names of classes -------------------------------------------------------------------------------------------------


@each_kind
def test_a_class_spelt_otherwise_is_named(tmp_path, kind):
    paint(tmp_path, "train", "blue/1.png", "red/1.png")
    paint(tmp_path, "val", "Pale blue/1.png", "red/1.png")
    words = "val_split: 'val.*' has class 'Pale blue', which training split 'train.*' lacks"
    with pytest.raises(ValueError, match=words):
        module(kind, tmp_path)


def test_class_maps_of_another_order_are_named(tmp_path):
    for split, order in (("train", ["blue", "green", "red"]), ("val", ["blue", "red", "green"])):
        paint(tmp_path, split, "blue/1.png", "red/1.png", "green/1.png")
        (tmp_path / split / "classes.txt").write_text("\n".join(order))
    words = "val_split: expected the order of the training split, where class 'red' is 2, got 1"
    with pytest.raises(ValueError, match=words):
        module("", tmp_path, dataset=dict(class_map="classes.txt"))
    # In every order of asking.
    data = ImageDataModule("", str(tmp_path), val_split="val", dataset=dict(class_map="classes.txt"))
    data._dataset("val")
    with pytest.raises(ValueError, match=words):
        data.num_classes  # noqa: B018
    # The test split, too.
    data = ImageDataModule("", str(tmp_path), val_split=None, test_split="val", dataset=dict(class_map="classes.txt"))
    data.setup("fit")
    with pytest.raises(ValueError, match=words.replace("val_split", "test_split")):
        data.setup("test")


def test_torchvisions_own_order_is_kept(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    paint(tmp_path, "train", "red10/1.png", "red9/1.png", "Red/red.png")
    truth = torchvision.datasets.ImageFolder(tmp_path / "train").classes
    assert module("torch/image_folder", tmp_path).class_names == truth == ["Red", "red10", "red9"]
    assert module("", tmp_path).class_names == ["Red", "red9", "red10"]
