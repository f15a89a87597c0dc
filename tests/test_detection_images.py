"""Boxes and the image they belong to: turned photos, other sizes, other depths, files that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
from detector_runs import FASTER, config, write_coco  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import CocoDataModule, DetectionModule, run  # noqa: E402
from dcn_plugin.finetune.detection import write_scenes  # noqa: E402
from dcn_plugin.finetune.images import UnreadableImage  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words", "one_thread")

WIDTH, HEIGHT = 40, 30
BOX = [4, 6, 10, 20]  # x, y, width, height in the upright image
# What a camera stores for each orientation, from the upright pixels [H, W, C] (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def upright():
    """Noise, and in the box one colour that is nowhere else."""
    pixels = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), np.uint8)
    x, y, width, height = BOX
    pixels[y : y + height, x : x + width] = (250, 10, 20)
    return pixels


def save(path, pixels, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels))).save(path, exif=exif.tobytes())


def coco(root, size, box=BOX, **options):
    """A set of the one image of the folder `photos`, annotated with that size and box."""
    image = dict(id=1, file_name="a.png") | ({} if size is None else dict(width=size[0], height=size[1]))
    whole = dict(
        images=[image],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=box, area=200, iscrowd=0)],
        categories=[dict(id=1, name="red")],
    )
    (root / "a.json").write_text(json.dumps(whole))
    split = dict(images="photos", annotations="a.json")
    return CocoDataModule(root=str(root), train=split, val=split, batch_size=1, **options)


def samples(data, *stages):
    for stage in stages or ("train", "val"):
        images, targets = next(iter(getattr(data, f"{stage}_dataloader")()))
        yield images[0], targets[0]


def inside(image, box):
    x1, y1, x2, y2 = (int(side) for side in box)
    return (image[:, y1:y2, x1:x2] * 255).round().flatten(1).unique(dim=1).T.tolist()


# -- orientation and size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("sized", [True, False], ids=("size", "no-size"))
def test_photo_is_turned_to_what_was_annotated(tmp_path, orientation, sized):
    save(tmp_path / "photos" / "a.png", upright(), orientation)
    data = coco(tmp_path, (WIDTH, HEIGHT) if sized else None)
    data.setup("fit")
    for image, target in samples(data):
        assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(upright()).permute(2, 0, 1))
        assert inside(image, target["boxes"][0]) == [[250, 10, 20]]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_photo_that_was_annotated_as_it_is_stored_stays_so(tmp_path, orientation):
    save(tmp_path / "photos" / "a.png", upright(), orientation)
    stored = np.ascontiguousarray(STORED[orientation](upright()))
    rows, columns = np.nonzero((stored == (250, 10, 20)).all(axis=2))
    x, y = int(columns.min()), int(rows.min())
    box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
    for image, target in samples(coco(tmp_path, (HEIGHT, WIDTH), box)):
        assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(stored).permute(2, 0, 1))
        assert inside(image, target["boxes"][0]) == [[250, 10, 20]]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (80, 60)), (1, (30, 40)), (6, (60, 80))])
def test_another_size_than_annotated_is_an_error(tmp_path, stage, orientation, size):
    save(tmp_path / "photos" / "a.png", upright(), orientation)
    stored = "40x30" if orientation == 1 else "30x40"
    with pytest.raises(ValueError, match=rf"photos.a\.png: expected {size[0]}x{size[1]} pixels.*got {stored}") as error:
        coco(tmp_path, size, bad_images="skip").setup(stage)  # it can be read: its boxes are wrong
    assert not isinstance(error.value, UnreadableImage)
    assert orientation == 1 or "turned by its EXIF orientation 40x30" in str(error.value)


def test_a_set_whose_odd_image_comes_late_is_still_an_error(tmp_path):
    boxes = [dict(id=i, image_id=100 - i, category_id=3, bbox=[1, 2, 10, 5]) for i in range(40)]
    split = write_coco(tmp_path, boxes, images=40)
    Image.new("RGB", (41, 30)).save(tmp_path / "train" / "2.png")
    data = CocoDataModule(root=str(tmp_path), train=split, batch_size=1)
    data.setup("fit")  # looks at some images only
    with pytest.raises(ValueError, match=r"2\.png: expected 40x30 pixels.*got 41x30"):
        list(data.train_dataloader())


@pytest.mark.parametrize("orientation", STORED)
def test_prediction_for_a_folder_is_in_the_upright_image(tmp_path, orientation):
    save(tmp_path / "photos" / "a.png", upright(), orientation)
    data = CocoDataModule(root=str(tmp_path), predict="photos", num_classes=1)
    data.setup("predict")
    ((image, target),) = samples(data, "predict")
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(upright()).permute(2, 0, 1))
    assert target == dict(image_id=1) and data.filenames() == {1: "a.png"}


def test_detections_of_a_turned_photo_are_those_of_the_upright_one(tmp_path):
    for orientation in (1, 6):
        save(tmp_path / f"photos{orientation}" / "a.png", upright(), orientation)
    model = dict(FASTER, backbone=dict(FASTER["backbone"], in_chans=3), box_score_thresh=0.0)
    torch.manual_seed(0)
    torch.save(DetectionModule(model, 1).model.state_dict(), tmp_path / "start.pth")
    found = []
    for orientation in (1, 6):
        data = dict(name="coco", root=str(tmp_path), predict=f"photos{orientation}", num_classes=1)
        values = config(data, model=model, checkpoint=str(tmp_path / "start.pth"), callbacks={})
        path = run(values, tmp_path / str(orientation), "predict")["predictions"]
        found.append(json.loads(Path(path).read_text()))
    assert found[0] and found[0] == found[1]


# -- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_scaled(tmp_path, channels):
    values = np.linspace(0, 65535, WIDTH * HEIGHT).round().reshape(HEIGHT, WIDTH)
    (tmp_path / "photos").mkdir()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "photos" / "a.png")
    truth = torch.from_numpy(values / 65535).float().expand(channels, -1, -1)
    for image, _ in samples(coco(tmp_path, (WIDTH, HEIGHT), in_chans=channels)):
        assert image.shape == truth.shape and (image - truth).abs().max() <= 0.51 / 255
    data = CocoDataModule(root=str(tmp_path), predict="photos", num_classes=1, in_chans=channels)
    ((image, _),) = samples(data, "predict")
    assert (image - truth).abs().max() <= 0.51 / 255


def test_floating_point_values_are_refused_with_the_path(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.linspace(-3, 900, WIDTH * HEIGHT).astype(np.float32).reshape(HEIGHT, WIDTH)).save(
        tmp_path / "photos" / "a.tif"
    )
    (tmp_path / "photos" / "a.tif").rename(tmp_path / "photos" / "a.png")
    with pytest.raises(UnreadableImage, match=r"a\.png.*floating-point"):
        coco(tmp_path, (WIDTH, HEIGHT)).setup("fit")
    data = CocoDataModule(root=str(tmp_path), predict="photos", num_classes=1)
    with pytest.raises(UnreadableImage, match=r"a\.png.*floating-point"):
        list(data.predict_dataloader())


# -- what cannot be read ------------------------------------------------------------------------------------------


def many_pixels(path):
    Image.new("1", (2000, 1000)).save(path)


def no_image(path):
    path.write_bytes(b"no image")


@pytest.mark.parametrize("spoil", [many_pixels, no_image])
def test_what_cannot_be_read_is_named_or_left_out(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    boxes = [dict(id=i, image_id=100 - i, category_id=3, bbox=[i, 2, 10, 5]) for i in range(4)]
    split = write_coco(tmp_path, boxes)
    whole = json.loads((tmp_path / "train.json").read_text())
    spoil(tmp_path / "train" / "1.png")
    for image in whole["images"]:
        del image["width"], image["height"]
    (tmp_path / "train.json").write_text(json.dumps(whole))
    options = dict(root=str(tmp_path), train=split, val=split, predict="train", batch_size=2)
    with pytest.raises(UnreadableImage, match=r"unreadable image .*train.1\.png: "):
        CocoDataModule(**options).setup("fit")
    with pytest.raises(UnreadableImage, match=r"unreadable image .*train.1\.png: "):
        list(CocoDataModule(**options).predict_dataloader())
    data = CocoDataModule(**options, bad_images="skip")
    with pytest.warns(UserWarning, match=r"unreadable image .*train.1\.png: .*; it is left out"):
        data.setup("fit")
        seen = {
            stage: [[target["image_id"] for target in targets] for _, targets in getattr(data, f"{stage}_dataloader")()]
            for stage in ("train", "val", "predict")
        }
    assert seen["val"] == [[97, 98], [100]] and seen["predict"] == [[1], [3, 4]]
    # Batches keep their size in training: image 100 stands in for 99, with its own box.
    assert sorted(sum(seen["train"], [])) == [97, 98, 100, 100]
    targets = {t["image_id"]: t["boxes"].tolist() for _, batch in data.train_dataloader() for t in batch}
    assert targets == {97: [[3, 2, 13, 7]], 98: [[2, 2, 12, 7]], 100: [[0, 2, 10, 7]]}


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_a_run_that_leaves_out_a_whole_batch_counts_the_others(tmp_path):
    root = write_scenes(tmp_path / "scenes", train=2, val=3, test=2, size=96, digit_size=[20, 34], digits=[2, 3])
    splits = {
        split: dict(images=f"images/{split}", annotations=f"annotations/instances_{split}.json")
        for split in ("train", "val", "test")
    }
    data = dict(name="coco", root=str(root), in_chans=1, batch_size=1, **splits)
    settings = config(data, model=dict(FASTER, box_score_thresh=0.0), trainer=dict(TRAINER, max_epochs=1))
    checkpoint = run(settings, tmp_path / "work")["checkpoint"]
    file = root / splits["val"]["annotations"]
    whole = json.loads(file.read_text())
    kept = dict(
        whole, images=whole["images"][:1] + whole["images"][2:],
        annotations=[a for a in whole["annotations"] if a["image_id"] != 2],
    )  # fmt: skip
    file.write_text(json.dumps(kept))
    truth = run(settings, tmp_path / "work", "validate", checkpoint)
    file.write_text(json.dumps(whole))
    no_image(root / "images" / "val" / "000001.png")
    settings["data"] = dict(data, bad_images="skip", test=splits["val"])
    assert run(settings, tmp_path / "work", "validate", checkpoint) == truth
    found = json.loads(Path(run(settings, tmp_path / "work", "predict", checkpoint)["predictions"]).read_text())
    assert {entry["image_id"] for entry in found} == {1, 3}


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_an_evaluation_of_nothing_is_an_error(tmp_path):
    split = write_coco(tmp_path, [dict(id=1, image_id=100, category_id=3, bbox=[1, 2, 10, 5])])
    for file in (tmp_path / "train").iterdir():
        no_image(file)
    data = dict(name="coco", root=str(tmp_path), val=split, bad_images="skip", num_classes=3)
    model = dict(FASTER, backbone=dict(FASTER["backbone"], in_chans=3))
    torch.save(DetectionModule(model, 3).model.state_dict(), tmp_path / "start.pth")
    settings = config(data, model=model, checkpoint=str(tmp_path / "start.pth"), callbacks={})
    for task, stage in (("validate", "val"), ("test", "test")):
        with pytest.raises(ValueError, match=f"{stage}: expected images to evaluate, could read none"):
            run(settings, tmp_path / "work", task)


def test_split_without_objects_says_what_its_metric_will_be(tmp_path):
    crowd = [dict(id=1, image_id=100, category_id=3, bbox=[1, 2, 10, 5], iscrowd=1)]
    for annotations in ([], crowd):
        data = CocoDataModule(root=str(tmp_path), val=write_coco(tmp_path, annotations))
        with pytest.warns(UserWarning, match=r"val.annotations: .*has no objects: .* of val will be -1"):
            data.setup("validate")


def test_photos_that_are_not_read_are_counted(tmp_path):
    for name in ("a.png", "below/b.png", ".c.png", "@eaDir/d.png"):
        save(tmp_path / "photos" / name, upright())
    for name in ("e.heic", "f.HEIC", "g.pdf", "h.txt"):
        (tmp_path / "photos" / name).write_bytes(b"")
    data = CocoDataModule(root=str(tmp_path), predict="photos", num_classes=1)
    with pytest.warns(UserWarning, match="photos holds images that are not read: 1 .HEIC, 1 .heic, 1 in folders below"):
        data.setup("predict")
    assert data.filenames() == {1: "a.png"}
