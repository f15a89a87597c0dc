"""Embedded digits and the data module, on files that the tests make."""

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
from dcn_plugin.finetune import Digits, ImageDataModule  # noqa: E402
from dcn_plugin.finetune.classification.preprocessing import resolve  # noqa: E402
from dcn_plugin.finetune.digits import SPLITS, _source  # noqa: E402

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_folder(root: Path, split: str, classes: dict, count: int = 4) -> Path:
    for name, colour in classes.items():
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20 + i, 24), colour).save(folder / f"{name}{i}.png")
    return root


def colour_of(image: torch.Tensor, data: ImageDataModule) -> str:
    mean, std = (torch.tensor(data.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
    rgb = ((image * std + mean).mean(dim=(1, 2)) * 255).round()
    return next(name for name, value in COLOURS.items() if torch.allclose(rgb, torch.tensor(value).float(), atol=1.5))


# -- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_and_splits_share_no_source_image():
    from sklearn.datasets import load_digits

    truth = load_digits()
    images, labels = _source()
    assert sorted(map(bytes, images.numpy().reshape(-1, 64))) == sorted(
        map(bytes, np.round(truth.images * 255 / 16).astype(np.uint8).reshape(-1, 64))
    )
    assert np.bincount(labels).tolist() == np.bincount(truth.target).tolist()
    spans = sorted(SPLITS.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(images)
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    sizes = {split: len(Digits(split)) for split in SPLITS}
    assert sizes == dict(train=1197, val=200, test=400)


def test_upright_digit_is_the_source_image_enlarged_in_the_middle():
    source = _source()[0][SPLITS["test"][0]].float()
    drawn = Digits("test", size=48, digit_size=32).draw(0).float()
    inner = drawn[:, 8:40, 8:40]
    assert drawn.sum() == inner.sum()
    small = torch.nn.functional.avg_pool2d(inner[None], 4)[0]
    assert torch.corrcoef(torch.stack([small.flatten(), source.flatten()]))[0, 1] > 0.95


def test_warps_are_drawn_from_seed_split_and_index_alone():
    one, again = (Digits("train", warp=True, copies=2, seed=3) for _ in range(2))
    order = [5, 1200, 5, 2393]
    assert all(torch.equal(one.draw(i), again.draw(i)) for i in order)
    assert one[5][1] == one[5 + 1197][1] and not torch.equal(one.draw(5), one.draw(5 + 1197))
    assert one.parameters(5) != Digits("train", warp=True, seed=4).parameters(5)
    assert one.parameters(5) != Digits("val", warp=True, seed=3).parameters(5)


def test_warp_parameters_stay_in_their_ranges_and_fill_them():
    digits = Digits("train", warp=True, degrees=50, scale=(0.5, 1.5), shear=10, translate=0.1, size=40)
    drawn = [digits.parameters(i) for i in range(600)]
    angles = np.array([p["angle"] for p in drawn])
    scales = np.array([p["scale"] for p in drawn])
    shears = np.array([p["shear"] for p in drawn])
    shifts = np.array([p["translate"] for p in drawn])
    for values, low, high in ((angles, -50, 50), (scales, 0.5, 1.5), (shears, -10, 10), (shifts, -4, 4)):
        assert values.min() >= low and values.max() <= high
        assert values.max() - values.min() > 0.95 * (high - low)


# -- folders, tars, shards --------------------------------------------------------------------------------------------


def test_folder_classes_transforms_and_labels(tmp_path):
    write_folder(tmp_path, "train", COLOURS)
    write_folder(tmp_path, "val", {k: COLOURS[k] for k in ("blue", "red")}, count=2)
    data = ImageDataModule("", str(tmp_path), batch_size=4, input_size=16, augment=dict(no_aug=True))
    assert data.num_classes == 3 and data.class_names == ["blue", "green", "red"]
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    for image, label in zip(images, labels, strict=True):
        assert colour_of(image, data) == data.class_names[label]
    # The validation split lacks a class: its labels must still mean what the training labels mean.
    images, labels = next(iter(data.val_dataloader()))
    seen = [(colour_of(image, data), data.class_names[t]) for image, t in zip(images, labels, strict=True)]
    assert len(seen) == 4 and all(a == b for a, b in seen) and ("red", "red") in seen


def test_preprocessing_of_the_loader_is_timms_for_the_model(tmp_path):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    root = tmp_path / "val" / "a"
    root.mkdir(parents=True)
    noise = np.random.RandomState(0).randint(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "x.png")
    write_folder(tmp_path, "train", {"a": (1, 2, 3)}, count=1)
    model = timm.create_model("test_resnet", num_classes=1)
    data = ImageDataModule("", str(tmp_path))
    data.data_config = resolve(data.preprocessing, model)
    truth = create_transform(**resolve_model_data_config(model))(Image.fromarray(noise))
    assert torch.equal(next(iter(data.val_dataloader()))[0][0], truth)


def test_tar_files_as_splits(tmp_path):
    folders = write_folder(tmp_path / "f", "train", COLOURS)
    for name in ("train.tar", "val.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for path in sorted((folders / "train").rglob("*.png")):
                tar.add(path, path.relative_to(folders / "train"))
    data = ImageDataModule(
        "", str(tmp_path), train_split="train.tar", val_split="val.tar", batch_size=12, input_size=16,
        augment=dict(no_aug=True),
    )  # fmt: skip
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(colour_of(i, data) == data.class_names[t] for i, t in zip(images, labels, strict=True))


def write_shards(root: Path, per_shard: int = 6) -> None:
    root.mkdir(exist_ok=True)
    info = {}
    for split in ("train", "validation"):
        files = []
        for shard in range(2):
            files.append(f"{split}-{shard:04d}.tar")
            with tarfile.open(root / files[-1], "w") as tar:
                for i in range(per_shard):
                    label, colour = i % 3, list(COLOURS.values())[i % 3]
                    image = io.BytesIO()
                    Image.new("RGB", (20, 20), colour).save(image, "PNG")
                    for ending, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"s{shard}{i:03d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        info[split] = dict(name=split, num_samples=2 * per_shard, filenames=files, shard_lengths=[per_shard, per_shard])
    (root / "_info.json").write_text(json.dumps(dict(splits=info)))


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path)
    data = ImageDataModule("wds/", str(tmp_path), batch_size=4, num_classes=3, input_size=16, augment=dict(no_aug=True))
    data.setup("fit")
    names = list(COLOURS)
    for loader, count in ((data.train_dataloader(), 12), (data.val_dataloader(), 12)):
        seen = [(colour_of(i, data), names[t]) for x, y in loader for i, t in zip(x, y, strict=True)]
        assert len(seen) == count and all(a == b for a, b in seen)


def test_webdataset_missing_shard_and_class_count(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path)
    (tmp_path / "train-0001.tar").unlink()
    data = ImageDataModule("wds/", str(tmp_path), batch_size=4)
    with pytest.raises(ValueError, match="num_classes.*wds/"):
        data.num_classes  # noqa: B018
    with pytest.raises(FileNotFoundError, match="train-0001.tar"):
        data.setup("fit")


def test_torchvision_data_set_by_timms_name(tmp_path):
    # CIFAR-10's own file format, four images a batch file, with the checksums torchvision asks for left out.
    import pickle

    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.RandomState(0).randint(0, 255, (4, 3072), dtype=np.uint8)
    names = [name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(dict(data=rows, labels=[0, 1, 2, 3])))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=list("abcdefghij"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        data = ImageDataModule("torch/cifar10", str(tmp_path), batch_size=4, input_size=32, augment=dict(no_aug=True))
        assert data.num_classes == 10 and data.class_names[2] == "c"
        data.setup("fit")
        images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 1, 2, 3]


def test_hub_data_set_by_timms_name(monkeypatch, tmp_path):
    # A stand-in for the `datasets` package with the few calls that timm makes: no hub is reachable when testing.
    names = sorted(COLOURS)

    class Table:
        info = SimpleNamespace(features={"label": SimpleNamespace(names=names)}, splits=None)

        def __init__(self, rows):
            self.rows = rows

        def cast_column(self, *_):
            return self

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    def load_dataset(name, split, cache_dir, **_):
        assert (name, cache_dir) == ("someone/colours", None) and split in ("train", "validation")
        rows = []
        for label, colour in enumerate(names):
            file = io.BytesIO()
            Image.new("RGB", (20, 20), COLOURS[colour]).save(file, "PNG")
            rows.append(dict(label=label, image=dict(bytes=file.getvalue(), path=None)))
        return Table(rows)

    fake = ModuleType("datasets")
    fake.load_dataset, fake.Image = load_dataset, lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    reader = "timm.data.readers.reader_hfds"  # is imported with the stand-in, and forgotten with it
    monkeypatch.setitem(sys.modules, reader, None)
    del sys.modules[reader]
    data = ImageDataModule("hfds/someone/colours", batch_size=3, input_size=16, augment=dict(no_aug=True))
    assert data.num_classes == 3 and data.class_names == names
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    assert [colour_of(i, data) for i in images] == [names[t] for t in labels] == names
    data._dataset("val").dataset.reader.dataset.rows[1]["image"]["bytes"] = b"no image"
    with pytest.raises(ValueError, match="unreadable image 1 of"):
        list(data.val_dataloader())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not an image", b"", None], ids=["text", "empty", "truncated"])
def test_unreadable_image_names_its_path(tmp_path, content):
    write_folder(tmp_path, "train", COLOURS, count=2)
    write_folder(tmp_path, "val", COLOURS, count=2)
    bad = tmp_path / "val" / "green" / "green1.png"
    if content is None:
        noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(bad)
        content = bad.read_bytes()[:4000]
    bad.write_bytes(content)
    data = ImageDataModule("", str(tmp_path), batch_size=2, input_size=16)
    data.setup("fit")
    with pytest.raises(ValueError, match="unreadable image .*green1.png"):
        list(data.val_dataloader())
    skipping = ImageDataModule("", str(tmp_path), batch_size=2, input_size=16, bad_images="skip")
    skipping.setup("fit")
    assert sum(len(labels) for _, labels in skipping.val_dataloader()) == 6
