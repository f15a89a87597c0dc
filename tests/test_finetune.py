"""The Lightning module, its callbacks, export, the runner and the study, on the embedded digits in small."""

import csv
import functools
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
import timm  # noqa: E402
from classifier_runs import CALLBACKS, DATA, MODEL, TINY, config, module  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from tiny import ROOT, TRAINER, launch, write_config  # noqa: E402
from torch import nn  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.finetune import (  # noqa: E402
    Digits,
    FinetuneModule,
    ImageDataModule,
    OffsetMonitor,
    export_model,
    load_exported,
    run,
)
from dcn_plugin.finetune.module import param_groups  # noqa: E402
from dcn_plugin.finetune.run import build, find_checkpoint  # noqa: E402
from dcn_plugin.layers import DCNv2, ModulatedDeformRoIPoolPack, OffsetConv  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

# -- module -----------------------------------------------------------------------------------------------------------


def test_offsets_have_their_own_learning_rate_and_norms_no_weight_decay():
    model = timm.create_model("resnet18_dcn", num_classes=4)
    groups = param_groups(model, weight_decay=0.05, offset_lr_mult=0.1)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr_scale"] == (0.1 if ".conv_offset." in name else 1.0), name
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_offset_factor_multiplies_layer_decay():
    model = timm.create_model("resnet18_dcn", num_classes=4)
    decayed = {}
    for group in timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.7):
        decayed |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    scales = set()
    for group in param_groups(model, 0.05, layer_decay=0.7, offset_lr_mult=0.5):
        for p in group["params"]:
            scale, decay = decayed[id(p)]
            assert group["lr_scale"] == pytest.approx(scale * (0.5 if "conv_offset" in names[id(p)] else 1))
            assert group["weight_decay"] == decay
            scales.add(round(group["lr_scale"], 6))
    assert len(scales) > 8


def test_branches_of_roi_pooling_have_a_learning_rate_of_their_own():
    class Field(nn.Module):
        offset_branches = {"conv": 1.0}  # what R-FCN's offset fields say

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

    parts = dict(conv=DCNv2(4, 4, 3), pool=ModulatedDeformRoIPoolPack(2, 4, 8), field=Field(), head=nn.Linear(4, 2))
    model = nn.ModuleDict(parts)
    names = {id(p): name for name, p in model.named_parameters()}
    for given, roi in (({}, 0.01), (dict(roi_offset_lr_mult=0.3), 0.3)):
        groups = param_groups(model, weight_decay=0.05, offset_lr_mult=0.1, **given)
        found = {names[id(p)]: group for group in groups for p in group["params"]}
        assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
        for name, group in found.items():
            expected = roi if name.startswith("pool.") else 0.1 if ".conv_offset." in name or "field" in name else 1.0
            assert group["lr_scale"] == pytest.approx(expected), name
            assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.05)


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = timm.create_model("resnet18_dcn", num_classes=4)
    model.conv1.requires_grad_(False)
    held = {id(p) for group in param_groups(model, 0.1) for p in group["params"]}
    assert id(model.conv1.weight) not in held and id(model.fc.weight) in held


@pytest.mark.parametrize(
    ("accumulate", "length"), [(1, dict(max_epochs=4)), (2, dict(max_epochs=4)), (1, dict(max_steps=11))]
)
def test_learning_rates_follow_warm_up_and_cosine_in_both_groups(accumulate, length):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append({g["lr_scale"]: g["lr"] for g in optimizer.param_groups})

    trainer = pl.Trainer(
        **{**TRAINER, "max_epochs": None, **length}, accumulate_grad_batches=accumulate, callbacks=[Watch()],
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    subject = module(
        optimizer=dict(opt="sgd", lr=0.1, offset_lr_mult=0.25),
        schedule=dict(sched="cosine", warmup_epochs=1, warmup_lr=0.02, min_lr=0.004),
    )
    trainer.fit(subject, ImageDataModule(**dict(DATA, dataset=dict(DATA["dataset"], limit=64))))
    per_epoch = 4 // accumulate
    total = length.get("max_steps", 4 * per_epoch)
    assert len(rates) == total
    for step, seen in enumerate(rates):
        if step < per_epoch:
            truth = 0.02 + (0.1 - 0.02) * step / per_epoch
        else:
            truth = 0.004 + 0.5 * (0.1 - 0.004) * (1 + math.cos(math.pi * step / total))
        assert seen[1.0] == pytest.approx(truth) and seen[0.25] == pytest.approx(0.25 * truth)


def test_mixed_targets_and_label_smoothing_give_timms_loss():
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    subject = module(label_smoothing=0.1, mixup=dict(mixup_alpha=0.4, cutmix_alpha=0.0)).eval()
    subject.log = lambda *args, **kwargs: None
    np.random.seed(0)
    loss = subject.training_step((images.clone(), labels), 0)
    np.random.seed(0)
    mixed, targets = Mixup(0.4, 0.0, label_smoothing=0.1, num_classes=10)(images.clone(), labels)
    truth = SoftTargetCrossEntropy()(subject(mixed), targets)
    assert torch.allclose(loss, truth, atol=1e-6)


def test_accuracy_against_counting_and_top5_capped_by_classes():
    subject = FinetuneModule(dict(name="resnet18_dcn", **TINY), num_classes=3)
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [1, 3, 2]])
    result = subject.metrics["val"](logits, torch.tensor([0, 1, 2, 0]))
    assert result["val_top1"] == 0.5 and set(result) == {"val_top1", "val_top3"}
    assert result["val_top3"] == 1.0


def test_predict_step_and_restore_give_the_same_scores(tmp_path):
    results = run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path)
    restored = FinetuneModule.restore(results["checkpoint"]).eval()
    image = torch.randn(3, 1, 32, 32)
    again = restored.predict_step((image, None), 0)
    exported = timm.create_model(f"local-dir:{results['export']}", pretrained=True).eval()
    assert torch.allclose(again["scores"], exported(image).softmax(-1), atol=1e-6)
    assert torch.equal(again["label"], again["scores"].argmax(-1))
    assert restored.data_config["input_size"] == [1, 32, 32] and restored.class_names == Digits.classes


def test_checkpoint_of_a_plain_resnet_starts_the_deformable_one(tmp_path):
    plain = timm.create_model("resnet18", num_classes=10, **TINY).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    start = dict(path=str(tmp_path / "plain.pth"), allow_missing="*.conv_offset.*")
    subject = module(checkpoint=start).eval()
    image = torch.randn(2, 1, 32, 32)
    assert torch.allclose(subject(image), plain(image), atol=1e-5)
    with pytest.raises(RuntimeError, match="conv_offset"):
        module(checkpoint=str(tmp_path / "plain.pth"))


def test_mmengine_model_and_channels_last():
    spec = dict(type="dcn_plugin.DCNv2", in_channels=1, out_channels=10, kernel_size=32)
    subject = FinetuneModule(spec, num_classes=10, channels_last=True)
    assert isinstance(subject.model, OffsetConv)
    assert subject(torch.randn(2, 1, 32, 32)).shape == (2, 10, 1, 1)


def test_training_learns_and_moves_offsets(tmp_path):
    data = dict(DATA, dataset=dict(warp=False, limit=160, size=32, digit_size=28), batch_size=32)
    trainer = dict(TRAINER, max_epochs=12)
    results = run(config(data=data, trainer=trainer, optimizer=dict(lr=5e-3, offset_lr_mult=0.5)), tmp_path)
    assert results["test_top1"] > 0.3  # chance is 0.1; 0.37 to 0.45 by number of threads
    model = load_exported(results["export"])
    moved = [m.conv_offset.weight.abs().max() for m in model.modules() if isinstance(m, OffsetConv)]
    assert moved and all(m > 0 for m in moved)


# -- Lightning's own features -----------------------------------------------------------------------------------------


def test_callbacks_of_lightning_by_name(tmp_path):
    callbacks = dict(
        CALLBACKS,
        ema=dict(type="EMAWeightAveraging", decay=0.9),
        stop=dict(type="EarlyStopping", monitor="val_loss", patience=5),
        lr=dict(type="LearningRateMonitor", logging_interval="step"),
        freeze=dict(type="BackboneFinetuning", unfreeze_backbone_at_epoch=1),
        offsets=dict(type="OffsetMonitor", every_n_steps=1),
    )
    trainer = dict(TRAINER, gradient_clip_val=0.5, precision="bf16-mixed")
    logger = dict(type="CSVLogger", name="logs")
    results = run(config(callbacks=callbacks, trainer=trainer, logger=logger), tmp_path)
    # What was tested is what is exported: the averaged weights.
    digits, exported = Digits("test", **DATA["dataset"]), load_exported(results["export"])
    images = torch.stack([digits.draw(i) for i in range(len(digits))]) / 127.5 - 1
    right = exported(images).argmax(1) == torch.tensor(digits.targets)
    assert right.float().mean() == pytest.approx(results["test_top1"], abs=1.5 / 32)
    again = run(config(callbacks=callbacks), tmp_path / "again", "test", results["checkpoint"])  # in float32
    assert again["test_top1"] == pytest.approx(right.float().mean().item())
    best = torch.load(results["checkpoint"], weights_only=True)
    name = "model.fc.weight"
    assert torch.equal(best["state_dict"][name], exported.fc.weight)
    assert not torch.equal(best["current_model_state"][name], exported.fc.weight)
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = set().union(*rows)
    for name in ("val_top1", "val_top5", "val_loss", "train_loss", "offset/layer4.0.conv2/max"):
        assert name in columns
    assert any(name.startswith("lr-AdamW") for name in columns)
    zero = [float(row["offset/layer4.0.conv2/max"]) for row in rows if row.get("offset/layer4.0.conv2/max")]
    assert zero[:2] == [0.0, 0.0] and zero[-1] > 0  # frozen in the first epoch, trained in the second
    more = config(callbacks=callbacks, trainer=dict(trainer, max_epochs=3), logger=logger)
    run(more, tmp_path, checkpoint="auto")  # all of their states are read back with weights_only=True
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


def test_resume_continues_exactly_where_it_stopped(tmp_path):
    short = config(trainer=dict(TRAINER, max_epochs=3))
    whole = run(short, tmp_path / "whole")

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("the lights go out")

    trainer, subject, data = build(short, tmp_path / "parts")
    trainer.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="lights"):
        trainer.fit(subject, data)
    last = find_checkpoint(tmp_path / "parts")
    assert last.name == "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    resumed = run(short, tmp_path / "parts", checkpoint="auto")
    done = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert done["epoch"] == 2 and done["global_step"] == 6
    assert done["lr_schedulers"][0]["base_values"] and resumed.keys() == whole.keys()
    # The last epoch's order of images is drawn anew after a restart, so weights are close, not equal.
    truth = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    rates = [[g["lr"] for g in state["optimizer_states"][0]["param_groups"]] for state in (truth, done)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(("batch_size", "epochs"), [(16, 4), (8, 4), (32, 4), (16, 6)])
def test_a_resumed_run_follows_its_own_schedule(tmp_path, batch_size, epochs):
    """With other batches an epoch (so it is with other processes), and over another number of epochs."""
    schedule, rates = dict(sched="cosine", min_lr=0.0), []
    run(config(trainer=dict(TRAINER, max_epochs=2), schedule=schedule), tmp_path)

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append({g["lr_scale"]: g["lr"] for g in optimizer.param_groups})

    resumed = config(
        trainer=dict(TRAINER, max_epochs=epochs), schedule=schedule, data=dict(DATA, batch_size=batch_size)
    )
    trainer, subject, data = build(resumed, tmp_path)
    trainer.callbacks.append(Watch())
    trainer.fit(subject, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    per_epoch = 32 // batch_size
    total = epochs * per_epoch
    assert len(rates) == total - 2 * per_epoch
    for update, seen in enumerate(rates, 2 * per_epoch):
        truth = 0.5e-3 * (1 + math.cos(math.pi * update / total))
        assert seen[1.0] == pytest.approx(truth) and seen[0.1] == pytest.approx(0.1 * truth)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda stop: stop.name)
def test_script_survives_a_signal_and_resumes(tmp_path, stop, script):
    trainer = dict(TRAINER, max_epochs=200, check_val_every_n_epoch=1)
    path = write_config(tmp_path / "long.py", **config(trainer=trainer))
    work_dir = tmp_path / "work"
    # What a shell runs in the background ignores Ctrl+C, and hands that on to its children.
    listen = functools.partial(signal.signal, stop, signal.SIG_DFL)
    process = launch(ROOT / "scripts/finetune.py", str(path), "--work-dir", str(work_dir), preexec_fn=listen)
    deadline = time.time() + 120
    while not (work_dir / "last.ckpt").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume" in output, output
    saved = torch.load(work_dir / "last.ckpt", weights_only=True)
    assert 0 <= saved["epoch"] < 199
    epochs = saved["epoch"] + 2
    options = ["--resume", "--cfg-options", f"trainer.max_epochs={epochs}"]
    status, output = script("finetune.py", path, "--work-dir", work_dir, *options)
    assert status == 0, status
    assert torch.load(work_dir / "last.ckpt", weights_only=True)["epoch"] == epochs - 1
    assert "test_top1" in output and "export" in output


def test_two_processes_with_gloo_agree_and_see_each_image_once(tmp_path):
    trainer = dict(TRAINER, devices=2, strategy="ddp", max_epochs=1)
    path = write_config(tmp_path / "ddp.py", **config(trainer=trainer, data=dict(DATA, batch_size=8)))
    process = launch(ROOT / "scripts" / "finetune.py", str(path), "--work-dir", str(tmp_path / "work"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.count("test_top5") == 1, output
    saved = torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # 32 images, 2 processes, 8 each
    # What both processes validated together is what one process finds on the whole split.
    alone = run(config(), tmp_path / "alone", "validate", tmp_path / "work" / "last.ckpt")
    found = saved["callbacks"]
    score = next(float(v["best_model_score"]) for k, v in found.items() if "val_top1" in k)
    assert score == pytest.approx(alone["val_top1"], abs=1e-6)


def test_validate_test_and_predict_tasks(tmp_path):
    fitted = run(config(), tmp_path)
    best = fitted["checkpoint"]
    assert run(config(), tmp_path, "validate", best)["val_top1"] == pytest.approx(fitted["val_top1"])
    assert run(config(), tmp_path, "test", best)["test_top1"] == pytest.approx(fitted["test_top1"])
    path = run(config(), tmp_path, "predict", best)["predictions"]
    with open(path) as file:
        rows = list(csv.DictReader(file))
    digits = Digits("test", **DATA["dataset"])
    assert len(rows) == 32 and rows[0]["file"] == "digits/test/0"
    right = sum(int(row["label"]) == digits[i][1] for i, row in enumerate(rows))
    assert right / 32 == pytest.approx(fitted["test_top1"])
    assert all(row["class"] == row["label"] and 0 < float(row["score"]) <= 1 for row in rows)


def test_prediction_of_a_folder_without_labels(tmp_path):
    digits, folder = Digits("test", **DATA["dataset"]), tmp_path / "scans"
    folder.mkdir()
    for i in range(5):
        digits[i][0].save(folder / f"scan{i}.png")
    best = run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path)["checkpoint"]
    keys = ("input_size", "mean", "std", "crop_pct")
    data = dict(name="", root=str(folder), predict_split="", **{key: DATA[key] for key in keys})
    path = run(config(data=data, num_classes=10), tmp_path, "predict", best)["predictions"]
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"scan{i}.png" for i in range(5)]
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"scan{i}.png")))[None] for i in range(5)])
    truth = FinetuneModule.restore(best).eval().predict_step((images / 127.5 - 1, None), 0)
    assert [int(row["label"]) for row in rows] == truth["label"].tolist()
    assert [row["class"] for row in rows] == [Digits.classes[i] for i in truth["label"]]


# -- offset monitor ---------------------------------------------------------------------------------------------------


def monitored(subject, **options):
    monitor = OffsetMonitor(every_n_steps=1, **options)
    trainer = pl.Trainer(
        **dict(TRAINER, max_epochs=1, limit_val_batches=0), logger=False, enable_checkpointing=False,
        callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(subject, ImageDataModule(**DATA))
    return trainer.callback_metrics, monitor


def set_offsets(subject, value):
    for layer in subject.modules():
        if isinstance(layer, OffsetConv):
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            with torch.no_grad():
                layer.conv_offset.bias[: 2 * taps : 2] = value


def test_monitor_reports_what_the_layers_do():
    subject = module(optimizer=dict(opt="sgd", lr=0.0, weight_decay=0.0))
    set_offsets(subject, 0.75)  # every point 0.75 pixels down: no change of distances between points
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "OffsetMonitor")
        metrics, monitor = monitored(subject)
    for name in ("layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"):
        assert metrics[f"offset/{name}/mean"] == pytest.approx(0.75)
        assert metrics[f"offset/{name}/max"] == pytest.approx(0.75)
        assert metrics[f"offset/{name}/dilation"] == pytest.approx(1.0)
        assert metrics[f"offset/{name}/mask_mean"] == pytest.approx(1.0)
        assert metrics[f"offset/{name}/mask_std"] == pytest.approx(0.0, abs=1e-6)
    assert not any(getattr(layer, "_sampling_hooks", None) for layer in subject.modules())


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (50.0, {}, r"layer2.0.conv2 samples up to 50.0 pixels away \(limit 4.0\)"),
        (1.5, dict(max_pixels=1.0), r"samples up to 1.5 pixels away \(limit 1.0\)"),
        (float("nan"), {}, "layer2.0.conv2 has offsets that are not finite"),
    ],
)
def test_monitor_warns_once_per_layer_when_offsets_run_away(value, options, message):
    subject = module(optimizer=dict(opt="sgd", lr=0.0, weight_decay=0.0))
    set_offsets(subject, value)
    with pytest.warns(UserWarning, match=message) as caught:
        monitored(subject, **options)
    said = [str(w.message) for w in caught if "OffsetMonitor" in str(w.message)]
    assert len(said) == 3 and len(set(said)) == 3


def test_monitor_refuses_nonsense():
    with pytest.raises(ValueError, match="every_n_steps.*0"):
        OffsetMonitor(every_n_steps=0)


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(name="resnet18_dcn", num_classes=7),
        dict(name="resnet18_dcnv1", num_classes=3, in_chans=1, dcn_stages=(4, 5), offset_groups=2),
        dict(name="resnet50_dcn", num_classes=2, dcn_layer=dict(type="DCNv2", offset_bound=4.0), output_stride=16),
    ],
    ids=lambda kwargs: kwargs["name"],
)
def test_export_is_a_timm_folder_with_identical_outputs(tmp_path, kwargs):
    kwargs = dict(kwargs)
    model = timm.create_model(kwargs.pop("name"), **kwargs).eval()
    randomise(model)
    channels = model.conv1.in_channels
    data_config = dict(input_size=[channels, 64, 64], mean=[0.1] * channels, crop_pct=1.0)
    export_model(model, tmp_path, class_names=[f"c{i}" for i in range(model.num_classes)], data_config=data_config)
    image = torch.randn(2, channels, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(image), model(image)) and torch.equal(load_exported(tmp_path)(image), model(image))
    assert tuple(again.pretrained_cfg["input_size"]) == (channels, 64, 64)
    assert again.pretrained_cfg["mean"][0] == 0.1
    assert json.loads((tmp_path / "config.json").read_text())["label_names"][1] == "c1"
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pth"))


def randomise(model):
    for layer in model.modules():
        if isinstance(layer, OffsetConv):
            torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)


def test_export_of_a_converted_model_keeps_its_rules(tmp_path):
    rules = [dict(match="s[3-4].b*.conv2.conv", layer=dict(type="DCNv2"))]
    model = timm.create_model("regnety_002", num_classes=5).eval()
    assert len(list(dcn_plugin.convert(model, rules)))
    randomise(model)
    export_model(model, tmp_path, rules=rules)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_exported(tmp_path)(image), model(image))
    with pytest.raises(RuntimeError, match="conv_offset"):  # timm alone does not know the rules, and says so
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_export_of_an_mmengine_model(tmp_path):
    spec = dict(type="dcn_plugin.DCNv2", in_channels=3, out_channels=4, kernel_size=3)
    subject = FinetuneModule(spec, num_classes=4)
    randomise(subject)
    export_model(subject.model, tmp_path, spec=spec)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(load_exported(tmp_path)(image), subject(image))
    with pytest.raises(ValueError, match="spec.*DCNv2.*None"):
        export_model(subject.model, tmp_path)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(rules=[dict(match="layer9.*", layer=dict(type="DCNv2"))]), ValueError, "rules.*layer9"),
        (dict(model=dict(MODEL, offset_groups=3)), ValueError, "offset_groups.*and 3"),
        (dict(checkpoint="nowhere.pth"), FileNotFoundError, "nowhere.pth: expected a checkpoint file"),
        (dict(data=dict(DATA, dataset=dict(limit=0))), ValueError, "limit: .*got 0"),
    ],
)
def test_bad_configs_are_named(tmp_path, changes, error, message):
    """What the parts say of their arguments is not lost on the way (what a config says: errors/table_finetune.py)."""
    with pytest.raises(error, match=message):
        run(config(**changes), tmp_path)


def test_script_names_an_unknown_key_in_one_line(tmp_path, script):
    path = tmp_path / "bad.py"
    path.write_text("modell = 'resnet18_dcn'\n")
    said, _ = script("finetune.py", path)
    assert "unknown key 'modell' (did you mean 'model'?)" in said and "\n" not in said


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['torchmetrics'] = None; import dcn_plugin.finetune"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "needs torchmetrics" in done.stderr and "pip install '.[finetune]'" in done.stderr


# -- the study --------------------------------------------------------------------------------------------------------


def test_study_runs_reuses_and_resumes(tmp_path, capsys):
    from studies.digits import run_study

    options = {
        "data.dataset.limit": 16, "data.batch_size": 16, "data.dataset.copies": 1, "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": False,
        "data.dataset.size": 32,
        "data.dataset.digit_size": 20,
        "data.input_size": [1, 32, 32],
    }  # fmt: skip
    configs = ROOT / "configs" / "classification"
    study = run_study(configs, tmp_path, seeds=[0, 1], upright_arms=True, options=options)
    rows = {row["arm"]: row for row in study["rows"]}
    assert list(rows) == ["base", "plain", "dcn", "plain-upright", "dcn-upright"]
    assert rows["base"]["parameters"] == rows["plain"]["parameters"] < rows["dcn"]["parameters"]
    assert rows["plain"]["multiply_adds"] < rows["dcn"]["multiply_adds"]
    for row in rows.values():
        assert len(row["warped"]["values"]) == 2 and row["warped"]["spread"] is not None
        assert 0 <= row["upright"]["mean"] <= 1 and row["train_seconds"]["mean"] > 0
    assert "±" in study["table"] and (tmp_path / "results.md").read_text() == study["table"]
    assert all(Path(path).exists() for path in study["files"].values())
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0, 1]
    capsys.readouterr()
    again = run_study(configs, tmp_path, seeds=[0, 1], upright_arms=True, options=options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 10 and "started" not in printed
    assert again["rows"] == study["rows"]
    # As if the power had gone between the last epoch and the evaluation of one stage.
    state = tmp_path / "seed1" / "dcn" / "result.json"
    saved = json.loads(state.read_text())
    state.write_text(json.dumps({**saved, "finished": False}))
    run_study(configs, tmp_path, seeds=[0, 1], upright_arms=True, options=options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 9 and printed.count("resumed") == 1 and "started" not in printed
    resumed = json.loads(state.read_text())
    assert resumed["warped"] == saved["warped"] and resumed["train_seconds"] > saved["train_seconds"]
    # Another budget is another study: nothing is reused, what was there is replaced.
    run_study(configs, tmp_path, seeds=[0], options={**options, "trainer.max_epochs": 2})
    printed = capsys.readouterr().out
    assert printed.count("started") == 3 and "reused" not in printed


def test_multiply_adds_of_a_convolution_by_hand():
    from studies.digits import multiply_adds

    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert multiply_adds(torch.nn.Sequential(conv), (3, 10, 10)) == 100 * 8 * 27
    layer = dcn_plugin.DCNv2.from_conv(conv)
    assert multiply_adds(torch.nn.Sequential(layer), (3, 10, 10)) >= 100 * (8 + 27) * 27
