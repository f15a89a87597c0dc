"""Fine-tuning of segmenters: folders of images and masks, module, metric, runner and export, in small."""

import csv
import json
import struct
import zlib

import numpy as np
import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from PIL import Image  # noqa: E402
from segmenter_runs import SEGMENTER, config, mask_of, scenes_in, write_folders  # noqa: E402
from tiny import CLASSIFIER, TRAINER, trainer, write_config  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from dcn_plugin.finetune import (  # noqa: E402
    SegmentationDataModule,
    SegmentationModule,
    load_config,
    load_exported,
    run,
)
from dcn_plugin.finetune.masks import read_mask, with_palette  # noqa: E402
from dcn_plugin.finetune.run import build, find_checkpoint  # noqa: E402
from dcn_plugin.finetune.scenes import draw_scene  # noqa: E402
from dcn_plugin.finetune.segmentation import MaskWriter  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words", "one_thread")
NAMES = ["ground", "box", "floor"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("cache") / "scenes")


def folders(root, **options):
    split = write_folders(root)
    return SegmentationDataModule(root=str(root), **{"train": split, "val": split, "class_names": NAMES, **options})


# -- data -------------------------------------------------------------------------------------------------------------


def test_images_come_with_their_masks(tmp_path):
    data = folders(tmp_path, batch_size=4)
    data.setup("fit")
    assert data.num_classes == 3 and data._dataset("train").ids == [1, 2, 3, 4]
    images, targets = next(iter(data.train_dataloader()))
    assert sorted(target["image_id"] for target in targets) == [1, 2, 3, 4]
    for image, target in zip(images, targets, strict=True):
        number = target["image_id"] - 1
        assert image.shape == (3, 30, 40) and image.dtype == torch.float32 and type(target["mask"]) is torch.Tensor
        torch.testing.assert_close(image[:, 3, 7] * 255, torch.tensor([20.0 * number, 100, 50]))
        assert np.array_equal(target["mask"], mask_of(number))
    assert data.filenames("val") == {i + 1: f"train{i}.png" for i in range(4)}


def test_a_list_names_the_images_to_take_in_its_order(tmp_path):
    split = write_folders(tmp_path)
    (tmp_path / "lists/two.txt").write_text("\ufefftrain3\r\n\r\n  train1  \n", encoding="utf-8")
    data = folders(tmp_path, train=dict(split, list="lists/two.txt"), val=dict(images="images", masks="masks"))
    data.setup("fit")
    assert [path.stem for path in data._dataset("train").paths] == ["train3", "train1"]
    assert len(data._dataset("val")) == 4 and len(folders(tmp_path, limit=3)._dataset("val")) == 3


def test_images_and_masks_in_folders_below(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder / "city").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images/city/a.jpg")
    (tmp_path / "images/city/.b.jpg").write_bytes(b"")
    Image.fromarray(mask_of(0)).save(tmp_path / "masks/city/a.png")
    split = dict(images="images", masks="masks")
    data = SegmentationDataModule(root=str(tmp_path), val=split, num_classes=3)
    assert data._dataset("val").filename(0) == "city/a.jpg" and len(data._dataset("val")) == 1


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1"])
def test_masks_are_numbers_or_indices_of_a_palette(tmp_path, mode):
    truth = np.array([[0, 1, 1], [1, 0, 0]], np.uint8) if mode == "1" else np.array([[0, 3, 7], [255, 1, 2]], np.uint8)
    if mode == "P":
        image = with_palette(truth)
        assert image.convert("RGB").getpixel((0, 1)) == (224, 224, 192)  # VOC's own colour of ignored borders
        assert image.convert("RGB").getpixel((1, 0)) == (128, 128, 0)
    elif mode == "1":
        image = Image.fromarray(truth * 255).convert("1")
    else:
        image = Image.fromarray(truth.astype({"L": np.uint8, "I": np.int32, "I;16": np.uint16}[mode]))
    path = tmp_path / ("mask.tif" if mode == "I" else "mask.png")
    image.save(path)
    found = read_mask(path, 8, 255)
    assert found.dtype == np.uint8 and np.array_equal(found, truth)


def png_of(rows, bits):
    """A gray PNG file by its specification, with so many bits a pixel."""
    filled = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
    lines = [
        b"\0" + int(row.ljust(-len(row) % 8 + len(row), "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in filled
    ]
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    )
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_values_of_a_mask_are_the_files_own(tmp_path, bits):
    rows = [[value % 2**bits for value in row] for row in ([0, 1, 2, 3, 0], [1, 15, 7, 9, 4])]
    (tmp_path / "mask.png").write_bytes(png_of(rows, bits))
    assert read_mask(tmp_path / "mask.png", 16, 255).tolist() == rows


def test_many_classes_need_more_than_a_byte(tmp_path):
    truth = np.array([[0, 299], [300, 2]])
    with_palette(truth).save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png", 300, 300)
    assert np.array_equal(found, truth) and found.dtype == np.int64


def test_transforms_move_masks_and_fill_them_with_what_is_ignored(tmp_path):
    augment = [
        dict(type="RandomHorizontalFlip", p=1.0),
        dict(type="RandomApply", transforms=[dict(type="Pad", padding=[2, 3, 0, 1], fill=9)], p=1.0),
        dict(type="Resize", size=[68, 84]),
    ]
    data = folders(tmp_path, augment=augment, batch_size=4)
    images, targets = next(iter(data.train_dataloader()))
    for image, target in zip(images, targets, strict=True):
        moved = np.pad(mask_of(target["image_id"] - 1)[:, ::-1], ((3, 1), (2, 0)), constant_values=255)
        assert np.array_equal(target["mask"], moved.repeat(2, 0).repeat(2, 1)) and image.shape == (3, 68, 84)
        torch.testing.assert_close(image[:, 0, 0] * 255, torch.full((3,), 9.0))
    # Evaluation has every mask as it is.
    assert np.array_equal(next(iter(data.val_dataloader()))[1][0]["mask"], mask_of(0))


def test_an_image_is_turned_to_its_mask(tmp_path):
    split = write_folders(tmp_path, images=1, suffix="jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.fromarray(np.full((40, 30, 3), 90, np.uint8))
    pixels.rotate(0).save(tmp_path / "images/train0.jpg", exif=exif)  # stored 30x40, shown 40x30
    data = SegmentationDataModule(root=str(tmp_path), val=split, num_classes=3)
    assert data._dataset("val")[0][0].shape == (3, 30, 40)


def test_masks_of_two_values_that_look_like_one_class_are_warned_of(tmp_path):
    split = write_folders(tmp_path, images=2)
    for number in range(2):
        Image.fromarray((mask_of(number) == 1).astype(np.uint8) * 255).save(tmp_path / f"masks/train{number}.png")
    with pytest.warns(UserWarning, match="val.masks: 2 masks looked at have class 0 and.*255, and no other"):
        SegmentationDataModule(root=str(tmp_path), val=split, num_classes=2)._dataset("val")


def test_what_cannot_be_read_is_passed_over_on_request(tmp_path):
    data = folders(tmp_path, bad_images="skip", batch_size=4)
    (tmp_path / "masks/train1.png").write_bytes(b"no image")
    (tmp_path / "images/train2.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="unreadable image .*; it is left out"):
        trained = [target["image_id"] for _, targets in data.train_dataloader() for target in targets]
        seen = [target["image_id"] for _, targets in data.val_dataloader() for target in targets]
    assert sorted(trained) == [1, 4, 4, 4] and seen == [1, 4]


def test_embedded_scenes_have_masks(scenes):
    data = SegmentationDataModule(**scenes)
    data.setup("fit")
    (image, target), options = (
        data._dataset("val")[1],
        {k: v for k, v in scenes["scenes"].items() if k not in data.splits},
    )
    drawn = draw_scene("val", 1, **options)
    assert np.array_equal((image[0] * 255).round(), drawn.image) and np.array_equal(target["mask"], drawn.mask)
    assert data.class_names == ["background", *map(str, range(10))]


# -- module -----------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """Gives the scores that it was told, image after image."""

    def __init__(self, classes):
        super().__init__()
        self.scores, self.in_chans = [F.one_hot(torch.as_tensor(c).long(), 3).movedim(-1, 0) * 4.0 for c in classes], 3
        self.backbone = nn.Identity()

    def forward(self, images):
        return dict(out=torch.stack([self.scores.pop(0) for _ in images]))


@pytest.mark.parametrize("size", [1, 3])
def test_scores_are_those_computed_by_hand(tmp_path, size):
    """Over all labelled pixels of the split, whatever the batches; loss and accuracy are means over pixels."""
    rng = np.random.RandomState(0)
    predicted = [rng.randint(0, 2, (30, 40)) for _ in range(4)]  # never class 2
    data = folders(tmp_path, eval_batch_size=size)
    module = SegmentationModule(SEGMENTER, 3)
    module.model = Says(predicted)
    found = trainer().validate(module, data, verbose=False)[0]
    truth, guess = (np.stack(maps).ravel() for maps in ([mask_of(i) for i in range(4)], predicted))
    truth, guess = truth[truth != 255], guess[np.stack([mask_of(i) for i in range(4)]).ravel() != 255]
    ious = [((truth == k) & (guess == k)).sum() / ((truth == k) | (guess == k)).sum() for k in range(3)]
    assert ious[2] == 0 and found["val_miou"] == pytest.approx(np.mean(ious), rel=1e-5)
    right = (truth == guess).mean()
    assert found["val_pixel_accuracy"] == pytest.approx(right, rel=1e-5)
    hit, miss = (np.log(np.exp(4) + 2) - score for score in (4, 0))
    assert found["val_loss"] == pytest.approx(right * hit + (1 - right) * miss, rel=1e-5)


def test_a_class_that_nowhere_occurs_does_not_count(tmp_path):
    split = write_folders(tmp_path, images=1)
    truth = np.zeros((30, 40), np.uint8)
    truth[:, 20:] = 1
    Image.fromarray(truth).save(tmp_path / "masks/train0.png")
    guess = np.zeros((30, 40), int)
    guess[:, 30:] = 1
    module = SegmentationModule(SEGMENTER, 3)
    module.model = Says([guess])
    data = SegmentationDataModule(root=str(tmp_path), val=split, num_classes=3)
    found = trainer().validate(module, data, verbose=False)[0]
    assert found["val_miou"] == pytest.approx((20 / 30 + 10 / 20) / 2)


def images_and_masks(count=2, size=64, in_chans=1, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(count, in_chans, size, size, generator=generator))
    masks = torch.randint(0, classes, (count, size, size), generator=generator)
    masks[:, :9] = 255
    return images, [dict(image_id=i, mask=mask) for i, mask in enumerate(masks)]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0]])
def test_loss_is_the_mean_over_labelled_pixels_and_of_the_auxiliary_head_a_part(weights):
    torch.manual_seed(0)
    module = SegmentationModule(dict(SEGMENTER, aux_loss=True), 3, class_weights=weights, aux_weight=0.4).eval()
    module.trainer = trainer()
    module.log = lambda *args, **options: None
    images, targets = images_and_masks()
    loss, truth = module.training_step((images, targets), 0), 0
    masks = torch.stack([target["mask"] for target in targets])
    for name, factor in (("out", 1.0), ("aux", 0.4)):
        chances = module(torch.stack(images))[name].log_softmax(1).movedim(1, -1)
        own = torch.ones(3) if weights is None else torch.tensor(weights)
        here = masks != 255
        parts = -chances[here].gather(1, masks[here][:, None])[:, 0] * own[masks[here]]
        truth += factor * parts.sum() / own[masks[here]].sum()
    torch.testing.assert_close(loss, truth)
    for target in targets:
        target["mask"] = torch.full_like(target["mask"], 255)
    module.zero_grad()
    nothing = module.training_step((images, targets), 0)
    nothing.backward()
    assert nothing == 0 and all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_images_of_several_sizes_are_evaluated_each_as_if_alone():
    torch.manual_seed(0)
    module = SegmentationModule(SEGMENTER, 3).eval()
    images = [torch.rand(1, 64, 48), torch.rand(1, 40, 64), torch.rand(1, 64, 48)]
    found = module.predict_step((images, [dict(image_id=i) for i in (7, 8, 9)]), 0)
    assert [item["image_id"] for item in found] == [7, 8, 9]
    for image, item in zip(images, found, strict=True):
        assert torch.equal(item["mask"], module(image[None])["out"][0].argmax(0).to(torch.uint8))


@pytest.mark.parametrize("decay", [None, 0.5])
def test_learning_rates_of_offsets_and_stages(tmp_path, scenes, decay):
    optimizer = dict(opt="sgd", lr=0.1, offset_lr_mult=0.3, weight_decay=0.01, layer_decay=decay)
    tuner, module, data = build(config(scenes, optimizer=optimizer, schedule=dict(sched="none")), tmp_path)
    rates = {}

    class Stop(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            names = {id(p): name for name, p in pl_module.model.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                rates.update({names[id(p)]: group["lr"] for p in group["params"]})
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = 0

    tuner.callbacks.append(Stop())
    # Stopped before a batch, it would complain of an epoch without labelled pixels.
    module.on_train_epoch_end = lambda: None
    tuner.fit(module, data)
    assert set(rates) == {name for name, _ in module.model.named_parameters()}
    for name, rate in rates.items():
        factor = 0.3 if "conv_offset" in name else 1.0
        if decay is not None and name.startswith("backbone."):
            stages = ("layer4", "layer3", "layer2", "layer1")
            factor *= decay ** next((i for i, stage in enumerate(stages, 1) if stage in name), 5)
        assert rate == pytest.approx(0.1 * factor), name


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_short_training_learns_the_embedded_scenes(tmp_path):
    """Digits of other writers against the ground: what says the ground everywhere has a mean IoU below a half."""
    easy = dict(strokes=0, fragments=0, noise=3.0, digits=[1, 1], digit_size=[44, 60])
    data = scenes_in(tmp_path / "scenes", 8, train=32, val=4, test=8, **easy)
    model = dict(name="fcn", backbone=dict(CLASSIFIER, channels=[16, 16, 32, 32]), output_stride=8)
    tuning = dict(TRAINER, max_epochs=24, check_val_every_n_epoch=6)
    values = config(data, model=model, trainer=tuning, optimizer=dict(opt="adamw", lr=1e-2))
    results = run(values, tmp_path / "work")
    module, found = SegmentationModule.restore(results["checkpoint"]).eval(), SegmentationDataModule(**data)
    hits = np.zeros((2, 2))
    for image, target in found._dataset("test"):
        with torch.no_grad():
            guess = module(image[None])["out"][0].argmax(0) > 0
        labelled, truth = target["mask"] != 255, target["mask"] > 0
        for a, b in np.ndindex(2, 2):
            hits[a, b] += ((truth == a) & (guess == b) & labelled).sum()
    ious = [hits[k, k] / (hits[k].sum() + hits[:, k].sum() - hits[k, k]) for k in (0, 1)]
    assert np.mean(ious) > 0.7, ious
    assert module.class_names == found.class_names


def test_resumed_training_equals_uninterrupted(tmp_path, scenes):
    augment = [dict(type="RandomHorizontalFlip", p=0.5), dict(type="RandomCrop", size=[48, 48])]
    model = dict(SEGMENTER, name="deeplabv3", atrous_rates=[2, 4])  # with dropout
    del model["head_channels"]
    whole = config(dict(scenes, augment=augment), model=model, trainer=dict(TRAINER, max_epochs=3))
    run(whole, tmp_path / "whole")

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("the lights go out")

    tuner, module, data = build(whole, tmp_path / "parts")
    tuner.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="lights"):
        tuner.fit(module, data)
    assert torch.load(find_checkpoint(tmp_path / "parts"), weights_only=True)["epoch"] == 1
    run(whole, tmp_path / "parts", checkpoint="auto")
    truth, done = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert done["epoch"] == 2 and done["global_step"] == truth["global_step"] == 6
    for name, value in truth["state_dict"].items():
        assert torch.equal(done["state_dict"][name], value), name


def test_it_is_trained_evaluated_predicted_exported_and_loaded_again(tmp_path, scenes):
    callbacks = config(scenes)["callbacks"] | dict(
        freeze=dict(type="BackboneFinetuning", unfreeze_backbone_at_epoch=1),
        offsets=dict(type="OffsetMonitor", every_n_steps=1), ema=dict(type="EMAWeightAveraging", decay=0.5),
    )  # fmt: skip
    values = config(scenes, callbacks=callbacks, logger=dict(type="CSVLogger", name="logs"))
    values = load_config(write_config(tmp_path / "digits.py", **values))
    fitted = run(values, tmp_path / "work")
    with open(next((tmp_path / "work").rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "val_loss", "val_miou", "val_pixel_accuracy"} <= set(rows[0])
    assert any("offset/backbone.layer4.0.conv2/max" in key for key in rows[0])
    best = fitted["checkpoint"]
    tested = run(values, tmp_path / "work", "test", best)
    assert tested == {key: pytest.approx(fitted[key]) for key in ("test_loss", "test_miou", "test_pixel_accuracy")}
    assert run(values, tmp_path / "work", "validate", best)["val_miou"] == pytest.approx(fitted["val_miou"])
    masks = run(values, tmp_path / "work", "predict", best)["predictions"]
    assert masks == str(tmp_path / "work" / "masks")
    loaded, data = load_exported(fitted["export"]), SegmentationDataModule(**scenes)
    for index, (image, _) in enumerate(data._dataset("test")):
        with torch.no_grad():
            wanted = loaded(image[None])["out"][0].argmax(0)
        assert np.array_equal(np.asarray(Image.open(f"{masks}/{index:06d}.png")), wanted)
    saved = json.loads((tmp_path / "work/export/config.json").read_text())
    assert saved["dcn_plugin"]["segmenter"]["num_classes"] == 11 and saved["label_names"] == data.class_names


def test_a_folder_of_photos_is_predicted_without_masks(tmp_path):
    torch.manual_seed(0)
    module = SegmentationModule(dict(SEGMENTER, backbone=dict(SEGMENTER["backbone"], in_chans=3)), 3)
    write_folders(tmp_path)
    for name, size in (("a.png", (40, 30)), ("a.jpg", (50, 35)), ("b.png", (64, 64))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 30, 90)).save(tmp_path / "photos" / name)
    data = SegmentationDataModule(root=str(tmp_path), predict="photos", num_classes=3)
    tuner = trainer(tmp_path, callbacks=[MaskWriter(tmp_path / "out")])
    tuner.predict(module, data, return_predictions=False)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out/masks").iterdir()}
    assert sizes == {"a.png.png": (40, 30), "a.jpg.png": (50, 35), "b.png": (64, 64)}


def test_no_mask_replaces_another(tmp_path):
    """`u.jpg` with its ending is `u.jpg.bmp` without one."""
    torch.manual_seed(0)
    (tmp_path / "photos").mkdir()
    widths = {"u.jpg": 33, "u.png": 34, "u.jpg.bmp": 35, "v.jpg.bmp": 36}
    for name, width in widths.items():
        Image.new("L", (width, 32)).save(tmp_path / "photos" / name)
    data = SegmentationDataModule(root=str(tmp_path), predict="photos", num_classes=3, in_chans=1)
    tuner = trainer(tmp_path, callbacks=[MaskWriter(tmp_path / "out")])
    tuner.predict(SegmentationModule(SEGMENTER, 3), data, return_predictions=False)
    found = {path.name: Image.open(path).width for path in (tmp_path / "out/masks").iterdir()}
    assert found == {"u.jpg.png": 33, "u.png.png": 34, "u.jpg.bmp.png": 35, "v.jpg.png": 36}


@pytest.mark.parametrize("work, predict", [(".", None), ("masks", None), ("photos", "photos/masks")])
def test_predictions_do_not_replace_the_data(tmp_path, work, predict):
    split = write_folders(tmp_path)
    moved = dict(split, masks="masks/masks/deeper")
    (tmp_path / "masks").rename(tmp_path / "before")
    (tmp_path / "masks/masks").mkdir(parents=True)
    (tmp_path / "before").rename(tmp_path / moved["masks"])
    (tmp_path / "photos").mkdir()
    (tmp_path / "images").rename(tmp_path / "photos/masks")
    moved["images"] = "photos/masks"
    data = SegmentationDataModule(root=str(tmp_path), test=None if predict else moved, predict=predict, num_classes=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    tuner = trainer(tmp_path, callbacks=[MaskWriter(tmp_path / work)])
    model = dict(SEGMENTER, backbone=dict(SEGMENTER["backbone"], in_chans=3))
    with pytest.raises(ValueError, match="directory: expected another folder for predicted masks"):
        tuner.predict(SegmentationModule(model, 3), data, return_predictions=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_masks_in_a_folder_below_that_of_photos_are_none_of_them(tmp_path):
    """A run in the folder itself, as where one predicts for all images here."""
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    for _ in range(2):
        data = SegmentationDataModule(root=str(tmp_path), predict=".", num_classes=3, in_chans=1)
        tuner = trainer(tmp_path, callbacks=[MaskWriter(tmp_path / "work")])
        tuner.predict(SegmentationModule(SEGMENTER, 3), data, return_predictions=False)
    assert [path.name for path in (tmp_path / "work/masks").iterdir()] == ["a.png"]


def test_another_number_is_ignored_if_the_data_says_so(tmp_path):
    split = write_folders(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == 255] = 9
        Image.fromarray(mask).save(path)
    data = SegmentationDataModule(root=str(tmp_path), val=split, num_classes=3, ignore_index=9)
    module = SegmentationModule(SEGMENTER, 3)
    module.model = Says([np.where(mask_of(i) == 255, 2, mask_of(i)) for i in range(4)])
    found = trainer().validate(module, data, verbose=False)[0]
    assert found["val_miou"] == 1.0 and found["val_pixel_accuracy"] == 1.0
