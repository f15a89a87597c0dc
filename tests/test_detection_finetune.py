"""Fine-tuning of detectors: data in COCO's format, module, metric, runner and export, in small."""

import contextlib
import csv
import io
import json
import signal
import time
from pathlib import Path

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from detector_runs import ANCHORS, BACKBONE, FASTER, IDS, RFCN, config, scenes_in, write_coco  # noqa: E402
from PIL import Image  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402
from tiny import ROOT, TRAINER, launch, write_config  # noqa: E402

from dcn_plugin.finetune import (  # noqa: E402
    CocoDataModule,
    DetectionModule,
    OffsetMonitor,
    export_model,
    load_config,
    load_exported,
    run,
)
from dcn_plugin.finetune.run import build, find_checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words", "one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("cache") / "scenes")


# -- data -------------------------------------------------------------------------------------------------------------


def test_categories_of_any_numbers_crowds_and_empty_images(tmp_path):
    split = write_coco(tmp_path)
    data = CocoDataModule(root=str(tmp_path), train=split, val=split, batch_size=4)
    with pytest.warns(UserWarning, match=r"1 of 6 boxes.*\[5, 5, 0, 9\].*annotation 5"):
        data.setup("fit")
    assert data.category_ids == IDS and data.class_names == ["kind3", "kind7", "kind90"] and data.num_classes == 3
    truth = {  # labels in 1..3, boxes as corners, clipped to the image, without the crowd and the empty one
        100: ([[2, 3, 12, 8], [20, 10, 30, 25]], [3, 1]),
        99: ([[30, 20, 40, 25]], [2]),
        98: ([], []),
        97: ([], []),
    }
    found = {}
    for images, targets in data.train_dataloader():
        for image, target in zip(images, targets, strict=True):
            assert image.shape == (3, 30, 40) and image.dtype == torch.float32
            assert torch.allclose(image[:, 0, 0] * 255, torch.tensor([20.0 * (100 - target["image_id"]), 100, 50]))
            assert type(image) is torch.Tensor and type(target["boxes"]) is torch.Tensor
            assert target["boxes"].shape[1:] == (4,) and target["boxes"].dtype == torch.float32
            found[target["image_id"]] = (target["boxes"].tolist(), target["labels"].tolist())
    assert found == truth
    # Evaluation has every box as the file has it, for the metric to judge.
    targets = {t["image_id"]: t for _, batch in data.val_dataloader() for t in batch}
    assert targets[100]["iscrowd"].tolist() == [0, 0, 1] and targets[100]["area"].tolist() == [50, 140, 900]
    assert targets[100]["labels"].tolist() == [3, 1, 2]
    assert targets[99]["boxes"].tolist() == [[30, 20, 50, 25], [5, 5, 5, 14]]
    gray = CocoDataModule(root=str(tmp_path), train=split, in_chans=1, batch_size=1)
    assert next(iter(gray.train_dataloader()))[0][0].shape == (1, 30, 40)


@pytest.mark.filterwarnings("ignore:.*less than a pixel")
def test_images_without_boxes_are_dropped_on_request(tmp_path):
    split = write_coco(tmp_path)
    data = CocoDataModule(root=str(tmp_path), train=split, val=split, empty_images="drop")
    data.setup("fit")
    assert data._dataset("train").ids == [99, 100] and len(data._dataset("val")) == 4
    with pytest.raises(ValueError, match=r"train.annotations.*1 of 6 boxes.*bad_boxes='skip'"):
        CocoDataModule(root=str(tmp_path), train=split, bad_boxes="raise").setup("fit")
    nothing = write_coco(tmp_path, [], name="nothing")
    with pytest.raises(ValueError, match="nothing.json has no box to train on"):
        CocoDataModule(root=str(tmp_path), train=nothing, empty_images="drop").setup("fit")


@pytest.mark.filterwarnings("ignore:.*less than a pixel")
def test_transforms_by_name_move_the_boxes_too(tmp_path):
    split = write_coco(tmp_path)
    augment = [dict(type="RandomHorizontalFlip", p=1.0), dict(type="Resize", size=[60, 80])]
    data = CocoDataModule(root=str(tmp_path), train=split, augment=augment, batch_size=4)
    images, targets = next(iter(data.train_dataloader()))
    target = next(t for t in targets if t["image_id"] == 100)
    assert images[0].shape == (3, 60, 80)
    assert target["boxes"].tolist() == [[56, 6, 76, 16], [20, 20, 40, 50]] and target["labels"].tolist() == [3, 1]
    crop = [dict(type="RandomApply", transforms=[dict(type="CenterCrop", size=[10, 10])], p=1.0)]
    data = CocoDataModule(root=str(tmp_path), train=split, augment=crop, batch_size=4)
    _, targets = next(iter(data.train_dataloader()))
    target = next(t for t in targets if t["image_id"] == 100)
    assert target["boxes"].tolist() == [[5, 0, 10, 10]] and target["labels"].tolist() == [1]  # the other one is outside
    with pytest.raises(ValueError, match=r"augment\[0\].*RandomFlip"):
        CocoDataModule(root=str(tmp_path), train=split, augment=[dict(type="RandomFlip")])
    with pytest.raises(TypeError, match="augment.*list"):
        CocoDataModule(root=str(tmp_path), train=split, augment=dict(type="Resize"))


def test_order_of_training_images_depends_on_epoch_and_seed_alone(scenes, monkeypatch):
    def orders(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = CocoDataModule(**scenes).train_dataloader()
        result = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            torch.rand(epoch + 1)
            result.append([t["image_id"] for _, targets in loader for t in targets])
        return result

    first, again, other = orders(0), orders(0), orders(1)
    assert first == again and first != other and first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1]) == list(range(1, 9))


def test_two_processes_share_training_images_and_see_each_of_the_others_once(scenes):
    class Trainer:
        world_size, global_rank = 2, 0

    alone = CocoDataModule(**scenes, limit=1)
    alone.trainer = Trainer()
    with pytest.raises(ValueError, match="val: expected an image for each of 2 processes, got 1"):
        alone.val_dataloader()
    with pytest.raises(ValueError, match="batch_size: expected at most the 0 images"):
        alone.train_dataloader()
    shares = {"train": [], "val": []}
    for rank in (0, 1):
        data = CocoDataModule(**dict(scenes, eval_batch_size=1))
        data.trainer = Trainer()
        data.trainer.global_rank = rank
        for stage, share in shares.items():
            share.append([t["image_id"] for _, targets in data._loader(stage) for t in targets])
    assert sorted(sum(shares["train"], [])) == list(range(1, 9)) and len(shares["train"][0]) == 4
    assert sorted(sum(shares["val"], [])) == [1, 2, 3, 4]


def test_worker_processes_give_the_same(scenes):
    def first(**changes):
        return next(iter(CocoDataModule(**dict(scenes, **changes)).train_dataloader()))

    (images, targets), (other_images, other_targets) = first(), first(num_workers=1)
    assert all(map(torch.equal, images, other_images))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, other_targets, strict=True))


def test_embedded_scenes_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = dict(train=2, val=1, test=1)
    first, other = (CocoDataModule("digit_scenes", scenes=dict(small, noise=noise)) for noise in (3.0, 4.0))
    assert first.num_classes == other.num_classes == 10
    assert len(list((tmp_path / "dcn_plugin").iterdir())) == 2


# -- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [FASTER, RFCN], ids=lambda spec: spec["name"])
def test_losses_are_logged_and_summed_and_detections_are_cocos(tmp_path, scenes, model):
    logger = dict(type="CSVLogger", name="logs")
    results = run(config(scenes, model=model, logger=logger, trainer=dict(TRAINER, max_epochs=1)), tmp_path)
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row.get("train_loss"))
    parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    total = sum(float(row[f"train_{part}"]) for part in parts)
    assert float(row["train_loss"]) == pytest.approx(total, rel=1e-4) and total > 0
    for size in ("", "_50", "_75", "_small", "_medium", "_large"):
        assert f"val_map{size}" in set().union(*rows) and f"test_map{size}" in results
    assert results["test_map_large"] == -1.0  # no digit is that large
    module = DetectionModule.restore(results["checkpoint"]).eval()
    assert module.category_ids == list(range(1, 11)) and module.class_names == [str(i) for i in range(10)]
    found = module.predict_step(([torch.rand(1, 96, 96)], [dict(image_id=5)]), 0)
    assert found[0]["image_id"] == 5 and {"boxes", "labels", "scores"} <= set(found[0])


@pytest.mark.parametrize("decay", [None, 0.5])
def test_learning_rates_of_offsets_and_stages(tmp_path, scenes, decay):
    optimizer = dict(opt="sgd", lr=0.1, offset_lr_mult=0.3, roi_offset_lr_mult=0.2, weight_decay=0.01)
    optimizer["layer_decay"] = decay
    trainer, module, data = build(config(scenes, optimizer=optimizer, schedule=dict(sched="none")), tmp_path)
    rates = {}

    class Stop(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            names = {id(p): name for name, p in pl_module.model.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                rates.update({names[id(p)]: group["lr"] for p in group["params"]})
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = 0

    trainer.callbacks.append(Stop())
    trainer.fit(module, data)
    assert set(rates) == {name for name, _ in module.model.named_parameters()}
    for name, rate in rates.items():
        factor = 0.3 if "conv_offset" in name else 0.2 if ".offset_fc." in name else 1.0
        if decay is not None and name.startswith("backbone.body."):
            stages = ("layer3", "layer2", "layer1")
            factor *= decay ** next((i for i, stage in enumerate(stages, 1) if stage in name), 4)
        assert rate == pytest.approx(0.1 * factor), name
    assert any(".offset_fc." in name for name in rates) and any("conv_offset" in name for name in rates)


@pytest.mark.slow
def test_overfits_a_handful_of_images(tmp_path, scenes):
    model = dict(
        FASTER, backbone=dict(FASTER["backbone"], channels=[16, 32, 64, 64], stem_width=8), fpn_channels=32,
        roi_pool=dict(type="MultiScaleDeformRoIPool", deform_fc_channels=64),
        box_head=dict(type="TwoMLPHead", representation_size=64), rpn_anchor_generator=dict(
            sizes=ANCHORS, aspect_ratios=[[1.0, 1.5, 2.2]] * 4), rpn_batch_size_per_image=64,
        box_batch_size_per_image=32,
    )  # fmt: skip
    root = scenes["root"]
    split = dict(images=f"{root}/images/train", annotations=f"{root}/annotations/instances_train.json")
    CocoDataModule(**scenes).prepare_data()
    data = dict(name="coco", train=split, val=split, limit=5, batch_size=5, in_chans=1)
    trainer = dict(TRAINER, max_epochs=80, check_val_every_n_epoch=80, gradient_clip_val=5.0)
    optimizer = dict(opt="adamw", lr=3e-3, weight_decay=0.0, roi_offset_lr_mult=0.1)
    results = run(config(data, model=model, trainer=trainer, optimizer=optimizer), tmp_path)
    assert results["test_map_50"] >= 0.9
    moved = [p.abs().max() for name, p in load_exported(results["export"]).named_parameters() if "offset_fc.4" in name]
    assert moved and all(m > 0 for m in moved)


def by_hand(annotations, results):
    """COCO's own evaluation of a file of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_metric_is_cocos_own_with_crowds_sparse_ids_and_empty_images(tmp_path):
    torch.manual_seed(0)
    annotations, results = [], []
    for number in range(40):
        x, y, w, h = (torch.rand(4) * torch.tensor([20.0, 15.0, 18.0, 13.0]) + 1).tolist()
        image, category = 100 - number % 4, IDS[number % 3]
        crowd = int(number % 10 == 0)
        annotations.append(
            dict(
                id=number + 1, image_id=image, category_id=category, bbox=[x, y, w, h], area=0.6 * w * h, iscrowd=crowd
            )
        )
        for shift in (0.3, 3.0):
            box = [x + shift, y, w, h]
            results.append(dict(image_id=image, category_id=category, bbox=box, score=float(torch.rand(()))))
    annotations = [a for a in annotations if a["image_id"] != 98]  # detections on an image without objects
    split = write_coco(tmp_path, annotations)
    data = CocoDataModule(root=str(tmp_path), val=split, eval_batch_size=3)
    module = DetectionModule(dict(FASTER, backbone=dict(BACKBONE, in_chans=3, out_indices=[1, 2, 3])), 3)

    class Oracle(torch.nn.Module):
        """Finds what `results` says, whatever it is shown."""

        def forward(self, images, targets=None):
            found = []
            for _ in images:
                image_id = next(order)
                own = [r for r in results if r["image_id"] == image_id]
                boxes = torch.tensor([r["bbox"] for r in own])
                boxes[:, 2:] += boxes[:, :2]
                labels = torch.tensor([IDS.index(r["category_id"]) + 1 for r in own])
                found.append(dict(boxes=boxes, labels=labels, scores=torch.tensor([r["score"] for r in own])))
            return found

    order = iter([97, 98, 99, 100])
    module.model = Oracle()
    module.model.conv = torch.nn.Conv2d(3, 1, 1)
    trainer = pl.Trainer(**dict(TRAINER), logger=False, enable_checkpointing=False)
    found = trainer.validate(module, data, verbose=False)[0]
    truth = by_hand(tmp_path / "train.json", results)
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    assert [found[f"val_{name}"] for name in names] == pytest.approx(truth[:6].tolist(), abs=1e-5)
    assert found["val_mar_100"] == pytest.approx(truth[8], abs=1e-5) and 0.1 < found["val_map"] < 0.9


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_resumed_training_equals_uninterrupted(tmp_path, scenes):
    data = dict(scenes, augment=[dict(type="RandomPhotometricDistort"), dict(type="RandomHorizontalFlip", p=0.5)])
    whole = config(data, trainer=dict(TRAINER, max_epochs=3))
    run(whole, tmp_path / "whole")

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("the lights go out")

    trainer, module, datamodule = build(whole, tmp_path / "parts")
    trainer.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="lights"):
        trainer.fit(module, datamodule)
    last = find_checkpoint(tmp_path / "parts")
    assert torch.load(last, weights_only=True)["epoch"] == 1
    run(whole, tmp_path / "parts", checkpoint="auto")
    truth, done = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert done["epoch"] == 2 and done["global_step"] == truth["global_step"] == 6
    for name, value in truth["state_dict"].items():
        assert torch.equal(done["state_dict"][name], value), name


def test_script_survives_sigterm_and_resumes(tmp_path, scenes, script):
    path = tmp_path / "long.py"
    values = config(scenes, trainer=dict(TRAINER, max_epochs=500))
    write_config(path, **values)
    work_dir = tmp_path / "work"
    process = launch(ROOT / "scripts/finetune.py", path, "--work-dir", work_dir)
    deadline = time.time() + 120
    while not (work_dir / "last.ckpt").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume" in output, output
    epochs = torch.load(work_dir / "last.ckpt", weights_only=True)["epoch"] + 2
    again = ["finetune.py", path, "--work-dir", work_dir]
    status, output = script(*again, "--resume", "--cfg-options", f"trainer.max_epochs={epochs}")
    assert status == 0 and "test_map_50" in output and "export" in output, status
    assert torch.load(work_dir / "last.ckpt", weights_only=True)["epoch"] == epochs - 1
    status, output = script(*again, "--task", "predict")
    assert status == 0 and "detections.json" in output, status


def test_two_processes_with_gloo_find_what_one_finds(tmp_path):
    """Of three images to validate one process has two, the other one."""
    splits = {}
    for name, images in (("train", 8), ("val", 3)):
        whole = [
            dict(id=i + 1, image_id=100 - i, category_id=5, bbox=[1, 1, 38, 28 - i], area=900, iscrowd=0)
            for i in range(images)
        ]
        splits[name] = write_coco(tmp_path, whole, images, name, categories=[dict(id=5, name="picture")])
    data = dict(name="coco", root=str(tmp_path), **splits, batch_size=2, eval_batch_size=1)
    model = dict(
        FASTER, backbone=dict(BACKBONE, in_chans=3, out_indices=[1, 2, 3]), box_score_thresh=0.0,
        rpn_anchor_generator=dict(sizes=[[16], [32], [64], [90]]),
    )  # fmt: skip
    trainer = dict(TRAINER, devices=2, strategy="ddp", max_epochs=4)
    values = config(data, model=model, trainer=trainer, optimizer=dict(opt="adamw", lr=3e-3))
    path = tmp_path / "ddp.py"
    write_config(path, **values)
    process = launch(ROOT / "scripts" / "finetune.py", str(path), "--work-dir", str(tmp_path / "work"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.count("test_map_50 ") == 1, output
    saved = torch.load(tmp_path / "work" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 2 * (saved["epoch"] + 1)  # 8 images, 2 processes, 2 each
    score = next(float(v["best_model_score"]) for k, v in saved["callbacks"].items() if "val_map" in k)
    alone = run(config(data, model=model), tmp_path / "alone", "validate", tmp_path / "work" / "best.ckpt")
    assert score == pytest.approx(alone["val_map"], abs=1e-5) and score > 0


def test_validate_test_and_predict_tasks(tmp_path, scenes):
    settings = config(scenes, model=dict(FASTER, box_score_thresh=0.0))
    fitted = run(settings, tmp_path)
    best = fitted["checkpoint"]
    again = run(settings, tmp_path, "validate", best)
    assert again["val_map"] == pytest.approx(fitted["val_map"]) and "val_map_50" in again
    tested = run(settings, tmp_path, "test", best)
    assert tested["test_map"] == pytest.approx(fitted["test_map"])
    with open(run(settings, tmp_path, "predict", best)["predictions"]) as file:
        results = json.load(file)
    truth = by_hand(Path(scenes["root"]) / "annotations/instances_test.json", results)
    assert truth[0] == pytest.approx(tested["test_map"], abs=1e-5) and len(results) > 4
    assert results[0]["file_name"] == "000000.png" and {r["category_id"] for r in results} <= set(range(1, 11))
    # A folder of images, without annotations.
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in (1, 2, 3):
        Image.open(Path(scenes["root"]) / f"images/test/00000{i}.png").save(folder / f"photo{i}.png")
    data = dict(name="coco", predict=str(folder), in_chans=1, num_classes=10)
    with open(run(config(data, model=settings["model"]), tmp_path, "predict", best)["predictions"]) as file:
        photos = json.load(file)
    assert {r["file_name"] for r in photos} <= {"photo1.png", "photo2.png", "photo3.png"}
    for number in (1, 2, 3):
        here = [(r["category_id"], r["bbox"]) for r in photos if r["image_id"] == number]
        there = [(r["category_id"], r["bbox"]) for r in results if r["image_id"] == number + 1]
        assert len(here) == len(there)
        for (category, box), (known, truth) in zip(here, there, strict=True):
            assert category == known and box == pytest.approx(truth, abs=1e-3)
    with pytest.raises(ValueError, match="checkpoint.*test"):
        run(settings, tmp_path, "test")


# -- export and pretrained backbones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [FASTER, RFCN], ids=lambda spec: spec["name"])
def test_export_gives_identical_detections(tmp_path, model):
    subject = DetectionModule(dict(model, box_score_thresh=0.0), 3)
    with torch.no_grad():
        for name, parameter in subject.named_parameters():
            if "offset" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    export_model(subject.model, tmp_path, spec=subject.spec, class_names=["a", "b", "c"], category_ids=IDS)
    again, images = load_exported(tmp_path), [torch.rand(1, 96, 96), torch.rand(1, 80, 96)]
    for found, truth in zip(again(images), subject.eval()(images), strict=True):
        assert all(torch.equal(found[key], truth[key]) for key in ("boxes", "labels", "scores"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["label_names"] == ["a", "b", "c"] and saved["category_ids"] == IDS
    with pytest.raises(ValueError, match="spec.*detector.*None"):
        export_model(subject.model, tmp_path)


def test_what_a_pretrained_backbone_implies_is_kept_without_its_weights():
    model = dict(name="faster_rcnn", backbone=dict(name="resnet18_dcn.a1_in1k", pretrained=True), min_size=64)
    values = DetectionModule.without_initial_weights(dict(model=model, num_classes=3, checkpoint="start.pth"))
    assert values["checkpoint"] is None and values["model"]["backbone"]["pretrained"] is False
    subject = DetectionModule(**values).train()
    frozen = {name.split(".")[2] for name, p in subject.model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}  # torchvision trains the last three stages of a pretrained backbone
    norms = [m for m in subject.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert model["backbone"]["pretrained"] is True
    plain = dict(model, backbone=dict(name="resnet18_dcn"))
    assert DetectionModule.bare(plain) == plain


def test_rules_and_checkpoint_of_a_plain_detector(tmp_path):
    spec = dict(FASTER, backbone=dict(FASTER["backbone"], name="resnet18"))
    plain = DetectionModule(spec, 3).eval()
    torch.save(plain.model.state_dict(), tmp_path / "plain.pth")
    start = dict(path=str(tmp_path / "plain.pth"), allow_missing="*.conv_offset.*")
    rules = [dict(match="backbone.body.layer4.*.conv2", layer=dict(type="DCNv2"))]
    spec = dict(FASTER, backbone=dict(FASTER["backbone"], name="resnet18", out_indices=[2, 3, 4]))
    plain = DetectionModule(spec, 3).eval()
    torch.save(plain.model.state_dict(), tmp_path / "plain.pth")
    subject = DetectionModule(spec, 3, rules=rules, checkpoint=start).eval()
    assert len(list(subject.conversion)) == 1
    image = torch.rand(1, 1, 96, 96)
    truth, found = plain.backbone(image), subject.backbone(image)
    assert all(torch.allclose(found[key], truth[key], atol=1e-4) for key in truth)


# -- offset monitor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"), [(FASTER, "roi_heads.box_roi_pool"), (RFCN, "roi_heads.box_roi_pool.scores")]
)
def test_monitor_tells_shifts_in_sizes_of_the_roi(tmp_path, scenes, model, name):
    trainer, module, data = build(
        config(
            scenes, model=model, optimizer=dict(opt="sgd", lr=0.0), trainer=dict(TRAINER, max_steps=1, max_epochs=1),
        ), tmp_path,
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith(("offset_fc.4.bias", "score_offsets.conv.bias")):
                parameter.fill_(20.0)  # (2, 2) sizes of the RoI
    trainer.callbacks.append(OffsetMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match=rf"{name} shifts bins by up to 2\.8 RoI sizes \(limit 1\.0\)"):
        trainer.fit(module, data)
    metrics = trainer.callback_metrics
    assert metrics[f"offset/{name}/mean"] == pytest.approx(8**0.5, rel=1e-3)
    assert not any(getattr(layer, "_sampling_hooks", None) for layer in module.modules())


def test_monitor_leaves_undeformed_r_fcn_alone(tmp_path, scenes):
    settings = config(scenes, model=dict(RFCN, deformable=False), trainer=dict(TRAINER, max_steps=1))
    trainer, module, data = build(settings, tmp_path)
    trainer.callbacks.append(OffsetMonitor(every_n_steps=1))
    trainer.fit(module, data)
    logged = {key for key in trainer.callback_metrics if key.startswith("offset/")}
    assert logged and not any("roi" in key for key in logged)


# -- configs ----------------------------------------------------------------------------------------------------------


def test_1x_schedule_is_the_usual_one():
    values = load_config(ROOT / "configs/detection/faster-rcnn_resnet50-dcn-fpn_deform-roi-pool_coco.py")
    from timm.scheduler import create_scheduler_v2

    per_epoch = 7330  # 117266 images, 16 at a time
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=values["optimizer"]["lr"])
    scheduler, epochs = create_scheduler_v2(
        optimizer, **values["schedule"], num_epochs=12, step_on_epochs=False, updates_per_epoch=per_epoch
    )
    rates = {}
    for step in (0, 250, 500, 8 * per_epoch - 2, 8 * per_epoch, 11 * per_epoch - 2, 11 * per_epoch):
        scheduler.step_update(step)
        rates[step] = optimizer.param_groups[0]["lr"]
    truth = [2e-5, 0.01, 0.02, 0.02, 0.002, 0.002, 0.0002]
    assert list(rates.values()) == pytest.approx(truth, rel=0.01)
