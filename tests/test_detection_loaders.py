"""Lightning's flags that replace samplers and loaders, with the samplers of detection data."""

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from detector_runs import config, scenes_in  # noqa: E402
from pytorch_lightning.tuner import Tuner  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import CocoDataModule, run  # noqa: E402
from dcn_plugin.finetune.run import build  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words", "one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("loaders") / "scenes", batch_size=2)


class Seen(pl.Callback):
    """Which images were trained on and validated, batch by batch."""

    def __init__(self):
        self.trained, self.pixels, self.validated = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.trained.append([target["image_id"] for target in batch[1]])
        self.pixels.append(torch.stack(batch[0]))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append([target["image_id"] for target in batch[1]])


def fit(folder, data, flags=None, callbacks=()):
    settings = config(data, trainer=dict(TRAINER, **{"limit_val_batches": 0, **(flags or {})}), callbacks={})
    trainer, module, data = build(settings, folder)
    seen = Seen()
    trainer.callbacks.extend([seen, *callbacks])
    trainer.fit(module, data)
    return seen, data


def test_overfit_batches_trains_on_the_first_batches_to_the_end_of_a_run(tmp_path, scenes):
    seen, _ = fit(tmp_path, scenes, dict(overfit_batches=1, limit_val_batches=1.0))
    assert seen.trained == [[1, 2]] * 2 and [1, 2] in seen.validated
    seen, _ = fit(tmp_path, scenes, dict(overfit_batches=0.5))
    assert seen.trained == [[1, 2], [3, 4]] * 2
    settings = config(scenes, trainer=dict(TRAINER, max_epochs=1, overfit_batches=2))
    results = run(settings, tmp_path / "run")
    assert "test_map" in results and "export" in results


@pytest.mark.parametrize("workers", [0, 1])
def test_overfit_batches_augments(tmp_path, scenes, workers):
    augment = [dict(type="RandomHorizontalFlip", p=1.0)]
    data = dict(scenes, augment=augment, num_workers=workers)
    seen, _ = fit(tmp_path, data, dict(overfit_batches=1, max_epochs=1))
    truth = CocoDataModule(**dict(scenes, batch_size=1))._dataset("train")
    assert torch.equal(seen.pixels[0], torch.stack([truth[0][0].flip(-1), truth[1][0].flip(-1)]))


@pytest.mark.parametrize(
    "flags",
    [dict(reload_dataloaders_every_n_epochs=1), dict(use_distributed_sampler=False), dict(limit_train_batches=0.5)],
    ids=lambda flags: next(iter(flags)),
)
def test_order_and_augmentation_stay_those_of_seed_and_epoch(tmp_path, scenes, flags):
    data = dict(scenes, augment=[dict(type="RandomPhotometricDistort", p=1.0)])
    (truth, _), (seen, _) = (fit(tmp_path, data, chosen) for chosen in (None, flags))
    assert truth.trained[:4] != truth.trained[4:] and len(truth.trained) == 8
    share = len(seen.trained) // 2
    kept = [*range(share), *range(4, 4 + share)]
    assert seen.trained == [truth.trained[i] for i in kept]
    assert all(torch.equal(pixels, truth.pixels[i]) for pixels, i in zip(seen.pixels, kept, strict=True))


@pytest.mark.parametrize(("mode", "first", "size"), [("power", 2, 8), ("power", 3, 8), ("binsearch", 2, 7)])
def test_lightning_finds_a_batch_size(tmp_path, scenes, mode, first, size):
    """Until the 8 images run out."""
    finder = pl.callbacks.BatchSizeFinder(mode, steps_per_trial=1, init_val=first)
    seen, data = fit(tmp_path, scenes, dict(max_epochs=1, limit_val_batches=1.0), [finder])
    assert data.batch_size == data.eval_batch_size == size and len(seen.trained) == 1
    assert len(seen.trained[0]) == size and max(map(len, seen.validated)) == 4  # there are 4 to validate


def test_batch_size_outside_training_follows_unless_it_is_given(scenes):
    data, other = CocoDataModule(**scenes), CocoDataModule(**scenes, eval_batch_size=3)
    data.batch_size = other.batch_size = 4
    assert data.eval_batch_size == data.val_dataloader().batch_size == 4
    assert other.eval_batch_size == other.val_dataloader().batch_size == 3
    other.eval_batch_size = 5
    assert other.val_dataloader().batch_size == 5


def test_tuner_finds_a_batch_size_for_validation(tmp_path, scenes):
    trainer, module, data = build(config(scenes, callbacks={}), tmp_path)
    found = Tuner(trainer).scale_batch_size(module, datamodule=data, method="validate", steps_per_trial=1)
    assert found == data.eval_batch_size == 4
