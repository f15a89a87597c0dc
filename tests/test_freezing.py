"""A backbone that is frozen at first and trained later: rates, decay, and runs that are resumed at any point."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from dcn_plugin.finetune import BackboneFinetuning, DetectionModule, FinetuneModule  # noqa: E402
from dcn_plugin.finetune.module import param_groups  # noqa: E402
from dcn_plugin.finetune.run import build_callbacks  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

BACKBONE = dict(name="resnet18_dcn", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
OPTIMIZER = dict(opt="adamw", lr=1e-2, weight_decay=0.1, layer_decay=0.7, offset_lr_mult=0.5, roi_offset_lr_mult=0.1)
THAW, EPOCHS, BATCHES = 2, 4, 2


def subject(kind, **changes):
    pl.seed_everything(0, verbose=False)
    options = dict(optimizer=OPTIMIZER, schedule=dict(sched="cosine", min_lr=1e-4)) | changes
    if kind == "classifier":
        return FinetuneModule(BACKBONE, num_classes=2, **options)
    detector = dict(name="faster_rcnn", backbone=BACKBONE, fpn_channels=8, box_head=dict(representation_size=8))
    detector |= dict(min_size=32, roi_pool=dict(type="MultiScaleDeformRoIPool"))
    return DetectionModule(detector, num_classes=2, **options)


def data(kind):
    """The same images in every batch, so that it does not matter where in an epoch a run goes on."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    target = dict(boxes=torch.tensor([[4.0, 4.0, 24.0, 28.0]]), labels=torch.tensor([1]), image_id=0)
    batch = (images, torch.tensor([0, 1])) if kind == "classifier" else (list(images), [dict(target) for _ in images])
    return DataLoader([batch] * BATCHES, batch_size=None)


def trainer(*callbacks, epochs=EPOCHS):
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    )  # fmt: skip


class Watch(pl.Callback):
    """Note the rate, decay and factor of every parameter at every step."""

    def __init__(self):
        self.steps = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.steps[trainer.global_step] = {
            names[id(p)]: (group["lr"], group["weight_decay"], group["lr_scale"])
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }


def saver(folder):
    return pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(("kind", "train_bn"), [("classifier", True), ("classifier", False), ("detector", True)])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(tmp_path, kind, train_bn):
    def fit(*callbacks, **options):
        module, watch = subject(kind), Watch()
        freeze = BackboneFinetuning(unfreeze_backbone_at_epoch=THAW, train_bn=train_bn)
        trainer(freeze, watch, *callbacks).fit(module, data(kind), **options)
        return module.state_dict(), watch.steps

    at_epoch_end = pl.callbacks.ModelCheckpoint(tmp_path, "end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, rates = fit(saver(tmp_path), at_epoch_end)
    assert list(rates) == list(range(EPOCHS * BATCHES))
    paths = [*tmp_path.glob("step=*.ckpt"), *tmp_path.glob("end-*.ckpt")]
    assert len(paths) == EPOCHS * BATCHES + EPOCHS
    if kind == "detector":  # slower: before the backbone is set free, at that point, and after it
        paths = [path for path in paths if path.stem in ("step=3", "step=4", "step=5", "end-epoch=1", "end-epoch=2")]
        assert len(paths) == 5
    for path in paths:
        resumed, again = fit(ckpt_path=path, weights_only=True)
        assert again == {step: rate for step, rate in rates.items() if step in again}, path.name
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=f"{path.name}: {name}")
    before = subject(kind).state_dict()
    name = next(name for name in before if name.endswith("layer4.0.conv1.weight"))
    assert not torch.equal(whole[name], before[name])


@pytest.mark.parametrize("kind", ["classifier", "detector"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_what_is_set_free_has_the_factors_and_decay_of_a_run_that_froze_nothing(kind, layer_decay):
    options = dict(optimizer=dict(OPTIMIZER, layer_decay=layer_decay), schedule=dict(sched="none"))
    module = subject(kind, **options)
    options = {key: OPTIMIZER[key] for key in ("offset_lr_mult", "roi_offset_lr_mult")}
    names = {id(p): name for name, p in module.named_parameters()}
    truth = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(module.model, 0.1, layer_decay, **options)
        for p in group["params"]
    }
    watch = Watch()
    trainer(BackboneFinetuning(THAW, backbone_initial_ratio_lr=0.3), watch, epochs=THAW + 3).fit(module, data(kind))
    frozen, free = watch.steps[0], watch.steps[THAW * BATCHES]
    norms = {
        f"{name}.{part}"
        for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for part, _ in m.named_parameters()
    }  # fmt: skip
    backbone = {names[id(p)] for p in module.backbone.parameters()}
    assert set(frozen) == set(truth) - (backbone - norms) and set(free) == set(truth)
    assert any("conv_offset" in name for name in set(free) - set(frozen))
    for epoch, part in ((THAW, 0.3), (THAW + 1, 0.6), (THAW + 2, 1.0)):  # doubled, but not beyond the others
        for name, (rate, decay, scale) in watch.steps[epoch * BATCHES].items():
            late = part if name in set(free) - set(frozen) else 1.0
            assert (scale, decay) == (pytest.approx(truth[name][0]), truth[name][1]), name
            assert rate == pytest.approx(1e-2 * late * scale), name


def test_what_was_frozen_before_stays_frozen():
    module = subject("classifier")
    module.model.conv1.requires_grad_(False)
    trainer(BackboneFinetuning(1), epochs=2).fit(module, data("classifier"))
    assert not module.model.conv1.weight.requires_grad and module.model.layer1[0].conv1.weight.requires_grad


def test_the_rate_of_the_backbone_can_be_given_and_pass_that_of_the_head():
    watch = Watch()
    freeze = BackboneFinetuning(0, lambda epoch: 3.0, backbone_initial_lr=5e-3, should_align=False)
    module = subject("classifier", schedule=dict(sched="none"))
    trainer(freeze, watch, epochs=3).fit(module, data("classifier"))
    rates = [watch.steps[epoch * BATCHES]["model.layer4.0.conv1.weight"] for epoch in range(3)]
    assert [rate / scale for rate, _, scale in rates] == pytest.approx([5e-3, 15e-3, 45e-3])


class Gradual(pl.callbacks.BaseFinetuning):
    """A callback of the user's own: the last stage from epoch 1 on, the one before from epoch 2 on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        for start, stage in ((1, "layer4"), (2, "layer3")):
            if epoch == start:
                self.unfreeze_and_add_param_group(getattr(pl_module.model, stage), optimizer, lr=1e-3)


def test_a_callback_of_ones_own_is_resumed_and_has_the_factors(tmp_path):
    def fit(*callbacks, **options):
        module, watch = subject("classifier"), Watch()
        trainer(Gradual(), watch, *callbacks).fit(module, data("classifier"), **options)
        return module.state_dict(), watch.steps

    whole, rates = fit(saver(tmp_path))
    last = rates[EPOCHS * BATCHES - 1]
    for name in ("model.layer4.0.conv2.conv_offset.weight", "model.layer3.0.conv2.conv_offset.weight"):
        rate, decay, scale = last[name]
        above = 0 if "layer4" in name else 1
        assert decay == 0.1 and rate == pytest.approx(1e-3 * scale)
        assert scale == pytest.approx(0.5 * last["model.layer4.0.conv1.weight"][2] * (0.7**above))
    assert "model.layer2.0.conv1.weight" not in last
    for path in tmp_path.glob("*.ckpt"):
        resumed, _ = fit(ckpt_path=path, weights_only=True)
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=f"{path.name}: {name}")


def test_a_second_fit_of_the_same_objects_freezes_again():
    module, freeze, watch = subject("classifier"), BackboneFinetuning(1), Watch()
    for _ in range(2):
        trainer(freeze, watch, epochs=2).fit(module, data("classifier"))
        assert "model.layer4.0.conv1.weight" not in watch.steps[0]
        assert "model.layer4.0.conv1.weight" in watch.steps[2 * BATCHES - 1]


def test_wrapped_optimizers_get_what_is_set_free(tmp_path):
    options = dict(optimizer=dict(OPTIMIZER, opt="lookahead_adamw"))
    module = subject("classifier", **options)
    trainer(BackboneFinetuning(1), saver(tmp_path), epochs=3).fit(module, data("classifier"))
    again = subject("classifier", **options)
    trainer(BackboneFinetuning(1), epochs=3).fit(
        again, data("classifier"), ckpt_path=next(tmp_path.glob("step=4*.ckpt")), weights_only=True
    )
    name = "layer4.0.conv1.weight"
    assert not torch.equal(again.model.get_parameter(name), subject("classifier").model.get_parameter(name))
    torch.testing.assert_close(again.model.get_parameter(name), module.model.get_parameter(name))


def test_configs_name_our_callback_and_lightnings_is_refused():
    freeze = build_callbacks(dict(freeze=dict(type="BackboneFinetuning", unfreeze_backbone_at_epoch=3)), None)[0]
    assert type(freeze) is BackboneFinetuning and freeze.unfreeze_backbone_at_epoch == 3
    theirs = pl.callbacks.BackboneFinetuning(1)
    with pytest.raises(ValueError, match="expected dcn_plugin.finetune.BackboneFinetuning.*got Lightning's"):
        trainer(theirs).fit(subject("classifier"), data("classifier"))


def test_the_optimizer_can_still_be_copied():
    module = subject("classifier")
    run = trainer(epochs=1)
    run.fit(module, data("classifier"))
    again = copy.deepcopy(run.optimizers[0])
    assert len(again.param_groups) == len(run.optimizers[0].param_groups)


DDP = """
import sys
import torch
from test_freezing import BackboneFinetuning, data, pl, subject

class Look(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        rank = trainer.global_rank
        torch.save({k: v for k, v in pl_module.named_parameters()}, f"{sys.argv[1]}/{rank}.pt")

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        batch[0].add_(trainer.global_rank * (index + 1) * 0.1)  # other images in every process

module = subject("classifier")
pl.Trainer(
    max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    callbacks=[BackboneFinetuning(1), Look()],
).fit(module, data("classifier"))
"""


@pytest.mark.slow
def test_processes_share_the_gradients_of_what_was_set_free(tmp_path):
    (tmp_path / "ddp.py").write_text(DDP)
    tests = Path(__file__).parent
    environment = dict(os.environ, PYTHONPATH=f"{tests.parent}:{tests}", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(tmp_path / "ddp.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here, there = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=0, msg=name)
