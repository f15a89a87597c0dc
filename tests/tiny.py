"""Models, data, trainers and runs of the smallest sizes, for tests that train for a step or two."""

import os
import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dcn_plugin.finetune import DetectionModule, FinetuneModule

ROOT = Path(__file__).resolve().parents[1]
# Of a config that `run` takes.
TRAINER = dict(
    max_epochs=2, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
    log_every_n_steps=1,
)  # fmt: skip
CLASSIFIER = dict(name="resnet18_dcn", in_chans=1, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
DETECTOR = dict(
    name="faster_rcnn", backbone=dict(CLASSIFIER, out_indices=[1, 2, 3]), fpn_channels=8,
    roi_pool=dict(type="MultiScaleDeformRoIPool", deform_fc_channels=8, output_size=3),
    box_head=dict(type="TwoMLPHead", representation_size=8), rpn_anchor_generator=dict(sizes=[[16], [24], [32], [48]]),
    min_size=64, max_size=64, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10, box_batch_size_per_image=8,
    box_detections_per_img=5,
)  # fmt: skip


def checkpoints(monitor):
    """The callbacks that save `best.ckpt`, by the largest value of `monitor`, and `last.ckpt`."""
    common = dict(type="ModelCheckpoint", enable_version_counter=False)
    return dict(best=dict(common, filename="best", monitor=monitor, mode="max"), last=dict(common, filename="last"))


def write_config(path, **values):
    """Write a config file in text style."""
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return path


def launch(script, *arguments, **options):
    """Start a script on one thread of the CPU, with what it prints and says of errors in one stream."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen(
        [sys.executable, *map(str, (script, *arguments))], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def classifier(model=None, num_classes=3, **changes):
    return FinetuneModule(model or CLASSIFIER, num_classes=num_classes, **changes)


def detector(model=None, num_classes=2, **changes):
    return DetectionModule(model or DETECTOR, num_classes=num_classes, **changes)


def image_loader(target=None, count=4, batch_size=2, size=32):
    """Images [1, size, size] and their targets, one row of `target` each; class indices by default."""
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    target = torch.arange(count) % 3 if target is None else target
    return DataLoader([(image, row) for image, row in zip(images, target, strict=True)], batch_size=batch_size)


def box_loader(count=4, batch_size=2, size=64):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        target = dict(
            boxes=torch.tensor([[4.0, 8.0, 40.0, 60.0]]), labels=torch.tensor([1 + i % 2]), image_id=i,
            area=torch.tensor([36.0 * 52]), iscrowd=torch.tensor([0]),
        )  # fmt: skip
        samples.append((torch.rand(1, size, size, generator=generator), target))
    return DataLoader(
        samples, batch_size=batch_size, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True)))
    )


def trainer(folder=None, **options):
    base = dict(TRAINER, max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=folder)
    return pl.Trainer(**(base | options))
