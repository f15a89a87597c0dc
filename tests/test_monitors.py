"""A callback that waits for a value that is never logged is refused before any epoch; a batch size is searched for."""

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "pycocotools"):
    pytest.importorskip(_name)
import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
from PIL import Image  # noqa: E402
from pytorch_lightning.callbacks import BatchSizeFinder, EarlyStopping, ModelCheckpoint  # noqa: E402
from tiny import CLASSIFIER, box_loader, classifier, detector, image_loader, trainer  # noqa: E402

from dcn_plugin.finetune import FinetuneModule, ImageDataModule  # noqa: E402

SEVERAL = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]])


def fit(module, loader, *callbacks, **options):
    runner = trainer(None, max_epochs=1, callbacks=list(callbacks), **options)
    runner.fit(module, loader, loader)
    return runner


def save(tmp_path, monitor):
    return ModelCheckpoint(tmp_path, monitor=monitor)


@pytest.mark.parametrize(
    ("make", "loader", "monitor", "known"),
    [
        (
            lambda: classifier(loss="binary_cross_entropy"),
            lambda: image_loader(SEVERAL),
            "val_top1",
            "val_loss, val_f1, val_map",
        ),
        (classifier, image_loader, "val_map", "val_loss, val_top1, val_top3"),
        (classifier, image_loader, "val_acc", "val_loss, val_top1, val_top3"),
        (detector, box_loader, "val_loss", "val_map, val_map_50"),
    ],
)
@pytest.mark.parametrize("kind", ["checkpoint", "stopping"])
def test_what_is_never_logged_is_refused_at_the_start(tmp_path, make, loader, monitor, known, kind):
    module, callback = make(), save(tmp_path, monitor) if kind == "checkpoint" else EarlyStopping(monitor)
    steps = []
    module.on_train_batch_start = lambda *args: steps.append(1)
    with pytest.raises(ValueError, match=f"callbacks: expected a monitor out of .*{known}.*got monitor='{monitor}'"):
        fit(module, loader(), callback, enable_checkpointing=True)
    assert not steps


@pytest.mark.parametrize("monitor", ["val_loss", "val_top1", "train_loss", "step", None])
def test_what_is_logged_is_waited_for(tmp_path, monitor):
    runner = fit(classifier(), image_loader(), save(tmp_path, monitor), enable_checkpointing=True)
    assert runner.checkpoint_callback.best_model_path or runner.checkpoint_callback.last_model_path


class Mine(FinetuneModule):
    def on_validation_epoch_end(self):
        self.log("val_mine", 1.0)


class Others(pl.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val_others", 1.0)


def test_what_somebody_else_logs_is_his_affair(tmp_path):
    module = Mine(CLASSIFIER, num_classes=3)
    assert fit(module, image_loader(), save(tmp_path, "val_mine"), enable_checkpointing=True).global_step == 2
    callbacks = [Others(), save(tmp_path / "others", "val_others")]
    assert fit(classifier(), image_loader(), *callbacks, enable_checkpointing=True).global_step == 2
    lenient = EarlyStopping("val_mine", strict=False)
    assert fit(classifier(), image_loader(), lenient).global_step == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for split, count in dict(train=4, val=2).items():
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count - (name == "c")):
                Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(root / split / name / f"{i}.png")
    return dict(root=str(root), val_split="val", input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), batch_size=2)


@pytest.mark.parametrize(("mode", "first", "size"), [("power", 2, 11), ("power", 3, 11), ("binsearch", 2, 11)])
def test_lightning_finds_a_batch_size_until_the_images_run_out(tmp_path, folders, mode, first, size):
    data = ImageDataModule(**folders)
    seen = []
    module = classifier()
    finder = BatchSizeFinder(mode, steps_per_trial=1, init_val=first)
    runner = trainer(tmp_path, max_epochs=1, callbacks=[finder])
    module.on_train_batch_start = lambda batch, index: seen.append(len(batch[0]))
    runner.fit(module, data)
    assert data.batch_size == data.eval_batch_size == size and seen[-1] == size


def test_a_batch_size_that_was_given_is_still_checked(folders):
    with pytest.raises(ValueError, match="batch_size: expected at most the 11 images to train on, got 12"):
        trainer(None).fit(classifier(), ImageDataModule(**dict(folders, batch_size=12)))
    data = ImageDataModule(**folders, eval_batch_size=3)
    data.batch_size = 4
    assert data.eval_batch_size == 3
