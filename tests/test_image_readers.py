"""Every reader that the data module offers reads an image alike: upright, scaled to 8 bits, named where it cannot."""

import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
from test_images import RAMP, encoded, oriented, tiff  # noqa: E402

from dcn_plugin.finetune import ImageDataModule  # noqa: E402

# What the files are to look like: stored lying and turned upright by EXIF; 16 bits of grey; a map of many pixels.
UPRIGHT = oriented(6, "PNG").getvalue()
DEEP = encoded(Image.fromarray(np.full((16, 16), 257 * 100, np.uint16)), "PNG").getvalue()
LARGE = encoded(Image.new("1", (64, 64)), "PNG").getvalue()
FLOAT = tiff(np.ones((16, 16)), 32, sample_format=3).getvalue()
PLAIN = encoded(Image.new("RGB", (16, 16), (100, 100, 100)), "PNG").getvalue()
OPTIONS = dict(batch_size=1, input_size=16, augment=dict(no_aug=True), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def folder(root: Path, files: list[bytes], **options) -> ImageDataModule:
    for split in ("train", "val"):
        for i, file in enumerate(files):
            path = root / split / f"c{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    return ImageDataModule(options.pop("name", ""), str(root), val_split="val", **OPTIONS, **options)


def torch_folder(root: Path, files: list[bytes], **options) -> ImageDataModule:
    return folder(root, files, name="torch/image_folder", **options)


def tar(root: Path, files: list[bytes], **options) -> ImageDataModule:
    data = folder(root, files, train_split="train.tar", **options)
    data.splits["val"] = "val.tar"
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as file:
            file.add(root / split, ".")
    return data


def shards(root: Path, files: list[bytes], **options) -> ImageDataModule:
    pytest.importorskip("webdataset")
    splits = {}
    for split in ("train", "val"):
        splits[split] = dict(name=split, num_samples=len(files), filenames=[f"{split}.tar"], shard_lengths=[len(files)])
        with tarfile.open(root / f"{split}.tar", "w") as file:
            for i, content in enumerate(files):
                for ending, data in (("png", content), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    (root / "_info.json").write_text(json.dumps(dict(splits=splits)))
    return ImageDataModule("wds/", str(root), val_split="val", num_classes=2, **OPTIONS, **options)


class Table(list):
    """A stand-in for a table of the `datasets` package, with the few calls that timm makes."""

    def __init__(self, rows, names):
        super().__init__(rows)
        features = dict(label=SimpleNamespace(names=names))
        self.info = SimpleNamespace(features=features, splits=dict(val=None))

    def cast_column(self, *_):
        return self


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The `datasets` package, as timm imports it; what it has is set by the tests."""
    fake, distributed, splits = (
        ModuleType("datasets"),
        ModuleType("datasets.distributed"),
        ModuleType("datasets.splits"),
    )
    fake.content = {}
    fake.Image = lambda decode: None
    fake.load_dataset = lambda name, split, **_: fake.content[split]
    splits.SplitInfo = SimpleNamespace

    def decoded(split):  # as the package decodes: turned upright, otherwise as the file has it
        from PIL import ImageOps

        for row in fake.content[split]:
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            image.load()
            yield dict(row, image=ImageOps.exif_transpose(image) if image.getexif().get(0x0112) else image)

    class Stream:
        num_shards = 1

        def __init__(self, split):
            self.split = split

        def shuffle(self, **_):
            return self

        def set_epoch(self, epoch):
            pass

        def __iter__(self):
            return decoded(self.split)

    def builder(name, **_):
        infos = {split: SimpleNamespace(num_examples=len(table)) for split, table in fake.content.items()}
        info = SimpleNamespace(splits=infos, features=next(iter(fake.content.values())).info.features)
        return SimpleNamespace(info=info, as_streaming_dataset=Stream)

    fake.load_dataset_builder = builder
    distributed.split_dataset_by_node = lambda stream, **_: stream
    fake.__version__ = "0"
    for name, value in (("", fake), (".distributed", distributed), (".splits", splits)):
        monkeypatch.setitem(sys.modules, "datasets" + name, value)
    for name in ("hfds", "hfids"):  # are imported with the stand-in, and forgotten with it
        monkeypatch.setitem(sys.modules, f"timm.data.readers.reader_{name}", None)
        del sys.modules[f"timm.data.readers.reader_{name}"]
    return fake


def table(files: list[bytes], names=("c0", "c1")) -> Table:
    return Table([dict(label=i % 2, image=dict(bytes=file, path=None)) for i, file in enumerate(files)], list(names))


def read(data: ImageDataModule, split: str = "val") -> list[torch.Tensor]:
    data.setup("fit")
    loader = data.val_dataloader() if split == "val" else data.train_dataloader()
    return [image for images, _ in loader for image in images]


def check(images: list[torch.Tensor]) -> None:
    upright, deep = images
    want = torch.zeros(3, 24, 16)  # the 16 x 24 pixels stored, a quarter turn on
    want[2, :8, :8] = want[0, :8, 8:] = want[1, 16:, 8:] = 250 / 255
    torch.testing.assert_close(upright, want[:, 4:20])  # the centre crop
    torch.testing.assert_close(deep, torch.full((3, 16, 16), 100 / 255))


@pytest.mark.parametrize("make", [folder, torch_folder, tar, shards])
def test_every_reader_turns_and_scales(make, tmp_path):
    check(read(make(tmp_path, [UPRIGHT, DEEP])))


@pytest.mark.parametrize("name", ["hfds", "hfids"])
def test_hub_readers_turn_and_scale(hub, name):
    hub.content = dict(train=table([UPRIGHT, DEEP]), val=table([UPRIGHT, DEEP]))
    check(read(ImageDataModule(f"{name}/someone/photos", val_split="val", num_classes=2, **OPTIONS)))


def test_a_torchvision_set_of_files_turns_and_scales(tmp_path, monkeypatch):
    # Places365, whose files are found by lists, of a size that no test downloads.
    import torchvision

    class Places(torchvision.datasets.VisionDataset):
        classes = ["c0", "c1"]

        def __init__(self, root, split, loader=None, **_):
            super().__init__(root)
            self.loader = loader or torchvision.datasets.folder.default_loader

        def __len__(self):
            return 2

        def __getitem__(self, index):
            image = self.loader(f"{self.root}/{index}.png")
            return (image if self.transform is None else self.transform(image)), index

    monkeypatch.setattr("timm.data.dataset_factory.Places365", Places)
    for i, file in enumerate((UPRIGHT, DEEP)):
        (tmp_path / f"{i}.png").write_bytes(file)
    check(read(ImageDataModule("torch/places365", str(tmp_path), val_split="val", **OPTIONS)))
    (tmp_path / "1.png").write_bytes(b"no image")
    data = ImageDataModule("torch/places365", str(tmp_path), val_split="val", **OPTIONS)
    with pytest.raises(ValueError, match="unreadable image .*1.png: cannot identify.*data.bad_images='skip'"):
        read(data)
    data = ImageDataModule("torch/places365", str(tmp_path), val_split="val", bad_images="skip", **OPTIONS)
    with pytest.warns(UserWarning, match="1.png.*the next image is taken instead"):
        assert torch.equal(*read(data))


@pytest.mark.parametrize("make", [folder, torch_folder, tar])
@pytest.mark.parametrize("file", [LARGE, FLOAT, b"", UPRIGHT[:100]], ids=["too many pixels", "float", "empty", "cut"])
def test_what_cannot_be_read_is_named_or_skipped(make, file, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match=r"unreadable image .*c0/2.png.* \(with data.bad_images='skip' the next"):
        read(make(tmp_path, [UPRIGHT, DEEP, file]))
    with pytest.warns(UserWarning, match=r"unreadable image .*c0/2.png.*; the next image is taken instead"):
        images = read(make(tmp_path, [UPRIGHT, DEEP, file, PLAIN], bad_images="skip"))
    assert len(images) == 4  # sorted by path: 0 and 2 of the first class, 1 and 3 of the second
    check([images[0], images[2]])
    assert torch.equal(images[1], images[2])  # taken in place of the bad one


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_skipped_image_has_no_prediction(tmp_path, num_workers):
    import csv

    import pytorch_lightning as pl

    from dcn_plugin.finetune.classification.writer import PredictionWriter

    class Brightness(pl.LightningModule):
        def predict_step(self, batch):
            images, _ = batch
            return dict(label=(images.mean(dim=(1, 2, 3)) * 255).round().long(), score=torch.ones(len(images)))

    (tmp_path / "new").mkdir()
    for i, level in enumerate((10, None, 30, 40, None)):
        file = b"no image" if level is None else encoded(Image.new("RGB", (16, 16), (level,) * 3), "PNG").getvalue()
        (tmp_path / "new" / f"{i}.png").write_bytes(file)
    data = ImageDataModule(
        "",
        str(tmp_path),
        predict_split="new",
        bad_images="skip",
        num_workers=num_workers,
        **OPTIONS | dict(batch_size=2),
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PredictionWriter(tmp_path)],
    )  # fmt: skip
    trainer.predict(Brightness(), data, return_predictions=False)
    rows = list(csv.DictReader(open(tmp_path / "predictions.csv")))
    assert [(row["file"], row["label"]) for row in rows] == [("0.png", "10"), ("2.png", "30"), ("3.png", "40")]
    assert data.unreadable() == [1, 4]


def test_what_a_hub_set_cannot_read_is_named_or_skipped(hub, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    hub.content = dict(train=table([PLAIN]), val=table([UPRIGHT, LARGE, DEEP]))
    options = dict(val_split="val", num_classes=2, **OPTIONS)
    with pytest.raises(ValueError, match="unreadable image 1 of the data set: .*4096 pixels"):
        read(ImageDataModule("hfds/someone/photos", **options))
    with pytest.warns(UserWarning, match="image 1 of the data set.*the next image is taken instead"):
        images = read(ImageDataModule("hfds/someone/photos", bad_images="skip", **options))
    check([images[0], images[2]])
    assert torch.equal(images[1], images[2])


def test_a_stream_leaves_out_what_it_cannot_scale_where_asked(tmp_path):
    files = [UPRIGHT, FLOAT, DEEP]
    with pytest.raises(
        ValueError, match=r"unreadable image 1 that came from wds/ 'val': .*bad_images='skip' it is left out"
    ):
        read(shards(tmp_path, files))
    with pytest.warns(UserWarning, match="unreadable image 1 .*floating-point values.*; it is left out"):
        check(read(shards(tmp_path, files, bad_images="skip")))


def test_a_grey_stream_stays_grey(tmp_path):
    ramp = encoded(Image.fromarray(np.kron(RAMP[:, :4], np.ones((4, 4), np.uint16))), "PNG").getvalue()
    data = shards(tmp_path, [ramp, ramp])
    data.preprocessing |= dict(input_size=(1, 16, 16), mean=(0.0,), std=(1.0,))
    image = read(data)[0]
    want = np.round(np.kron(RAMP[:, :4], np.ones((4, 4))) / 257) / 255
    assert image.shape == (1, 16, 16) and np.allclose(image[0], want, atol=1e-6)


# -- labels by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hfds", "hfids"])
@pytest.mark.parametrize("names, words", [
    (("c1", "c0"), "expected the order of the training split, where class 'c1' is 1, got 0"),
    (("c0", "C1"), "'val' has class 'C1', which training split 'train' lacks"),
])  # fmt: skip
def test_hub_splits_of_other_names_are_named(hub, monkeypatch, name, names, words):
    hub.content = dict(train=table([PLAIN]), val=table([PLAIN], names))
    if name == "hfids":  # has one builder for all splits, unless each split is a set of its own
        builder = hub.load_dataset_builder
        tables = iter([dict(train=hub.content["train"]), dict(val=hub.content["val"])])

        def next_builder(*args, **options):
            hub.content = next(tables)
            return builder(*args, **options)

        hub.load_dataset_builder = next_builder
    data = ImageDataModule(f"{name}/someone/photos", val_split="val", num_classes=2, **OPTIONS)
    with pytest.raises(ValueError, match=f"val_split: {words}"):
        data.setup("fit")


def test_torchvision_splits_of_other_names_are_named(tmp_path, monkeypatch):
    class Set(list):
        def __init__(self, root, train, **_):
            self.classes = ["cat", "dog"] if train else ["dog", "cat"]

    monkeypatch.setitem(sys.modules["timm.data.dataset_factory"]._TORCH_BASIC_DS, "cifar10", Set)
    data = ImageDataModule("torch/cifar10", str(tmp_path), val_split="val", **OPTIONS)
    with pytest.raises(ValueError, match="val_split: expected the order of the training split, where class 'dog' is 1"):
        data.setup("fit")


def test_shards_with_class_maps_of_another_order_are_named(tmp_path):
    data = shards(
        tmp_path, [PLAIN, PLAIN], dataset=dict(class_map={0: 0, 1: 1}), train_dataset=dict(class_map={0: 1, 1: 0})
    )
    with pytest.raises(
        ValueError, match="val_split: expected the order of the training split, where class 0 is 1, got 0"
    ):
        data.setup("fit")
