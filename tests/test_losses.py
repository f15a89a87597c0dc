"""Losses by name, with weights and of one's own; several labels an image; targets that do not belong to the loss."""

import csv
import functools
import math

import pytest
import torch
import torch.nn.functional as F

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
import timm.loss  # noqa: E402
from sklearn.metrics import average_precision_score, f1_score  # noqa: E402
from tiny import classifier, image_loader, trainer  # noqa: E402
from torch import nn  # noqa: E402

from dcn_plugin.finetune import FinetuneModule, export_model, load_exported  # noqa: E402
from dcn_plugin.finetune.classification.losses import NAMED  # noqa: E402
from dcn_plugin.finetune.classification.writer import PredictionWriter  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

MULTI = dict(type="binary_cross_entropy", pos_weight=[1.0, 2.0, 4.0])
MULTI_HOT = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])


def focal(logits, target, gamma=2.0):
    """A function of a user's own, with an import path."""
    chosen = logits.log_softmax(1).gather(1, target[:, None])
    return -((1 - chosen.exp()) ** gamma * chosen).mean()


class Wide(nn.Module):
    """A class of a user's own with an option and a buffer."""

    def __init__(self, margin=1.0):
        super().__init__()
        self.register_buffer("margin", torch.tensor(margin))

    def forward(self, logits, target):
        return F.multi_margin_loss(logits, target, margin=float(self.margin))


def step(module, batch):
    module.log = lambda *args, **kwargs: None
    return module.training_step(batch, 0)


def batch(target):
    return torch.rand(len(target), 1, 32, 32, generator=torch.Generator().manual_seed(1)), target


# -- values against torch's and timm's --------------------------------------------------------------------------------

INDICES = torch.tensor([0, 2, 1, 2])
SOFT = torch.tensor([[0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5], [1, 0, 0]])
WEIGHT = torch.tensor([1.0, 2.0, 0.5])
# name -> argument `loss`, targets, what it is
VALUES = {
    "default": ("cross_entropy", INDICES, lambda x, y: F.cross_entropy(x, y)),
    "probabilities": ("cross_entropy", SOFT, lambda x, y: timm.loss.SoftTargetCrossEntropy()(x, y)),
    "small integers": ("cross_entropy", INDICES.to(torch.uint8), lambda x, y: F.cross_entropy(x, y.long())),
    "class weights": (
        dict(type="cross_entropy", weight=[1, 2.0, 0.5]), INDICES, lambda x, y: F.cross_entropy(x, y, weight=WEIGHT)
    ),
    "binary": ("binary_cross_entropy", MULTI_HOT, lambda x, y: nn.BCEWithLogitsLoss()(x, y)),
    "binary of booleans": (
        "binary_cross_entropy", MULTI_HOT.bool(), lambda x, y: nn.BCEWithLogitsLoss()(x, y.float())
    ),
    "pos_weight": (
        MULTI, MULTI_HOT.long(), lambda x, y: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 4]))(x, y.float())
    ),
    "one pos_weight, weight": (
        dict(type="binary_cross_entropy", pos_weight=3, weight=[1, 2, 0.5]), MULTI_HOT,
        lambda x, y: nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=torch.tensor(3.0))(x, y),
    ),
    "timm, by name": (
        dict(type="AsymmetricLossMultiLabel", gamma_neg=2), MULTI_HOT,
        lambda x, y: timm.loss.AsymmetricLossMultiLabel(gamma_neg=2)(x, y),
    ),
    "timm's, of indices": (
        dict(type="BinaryCrossEntropy", smoothing=0.2), INDICES,
        lambda x, y: timm.loss.BinaryCrossEntropy(smoothing=0.2)(x, y),
    ),
    "torch, by path": (
        dict(type="torch.nn.BCEWithLogitsLoss", pos_weight=[1, 2, 0.5]), MULTI_HOT,
        lambda x, y: nn.BCEWithLogitsLoss(pos_weight=WEIGHT)(x, y),
    ),
    "class": (nn.CrossEntropyLoss, INDICES, lambda x, y: F.cross_entropy(x, y)),
    "function": (focal, INDICES, focal),
    "function with an option": (
        dict(type="test_losses.focal", gamma=0.0), INDICES, lambda x, y: F.cross_entropy(x, y)
    ),
    "class of one's own": (
        dict(type="test_losses.Wide", margin=0.5), INDICES, lambda x, y: F.multi_margin_loss(x, y, margin=0.5)
    ),
    "object": (nn.CrossEntropyLoss(weight=WEIGHT), INDICES, lambda x, y: F.cross_entropy(x, y, weight=WEIGHT)),
    "lambda": (lambda x, y: (x.softmax(1)[:, 0] - 1).square().sum(), INDICES,
               lambda x, y: (x.softmax(1)[:, 0] - 1).square().sum()),
    "partial": (functools.partial(focal, gamma=1.0), INDICES, lambda x, y: focal(x, y, gamma=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_loss_is_what_torch_and_timm_compute(name):
    loss, target, truth = VALUES[name]
    module = classifier(loss=loss)
    images, _ = batch(target)
    torch.testing.assert_close(step(module, (images, target)), truth(module(images), target))
    assert module.multi_label == (target.ndim == 2 and name != "probabilities")
    if module.criterion.name in NAMED:  # weights stay out of the state dict: others may score the same checkpoint
        assert all(key.startswith("model.") for key in module.state_dict())


def test_a_loss_of_ones_own_for_several_labels():
    def squares(logits, target):
        return (logits.sigmoid() - target).square().mean()

    module = classifier(loss=squares, multi_label=True)
    images, target = batch(MULTI_HOT)
    truth = (module(images).sigmoid() - target).square().mean()
    torch.testing.assert_close(step(module, (images, target)), truth)
    assert set(module.metrics["val"].keys()) == {"val_map", "val_f1"}


def test_mixup_gives_a_loss_rows_in_training_and_in_validation():
    module = classifier(loss=dict(type="SoftTargetCrossEntropy"), mixup=dict(mixup_alpha=1.0))
    images, target = batch(INDICES)
    assert math.isfinite(step(module, (images, target)))
    found = module.criterion(module(images), target, training=False)
    torch.testing.assert_close(found, F.cross_entropy(module(images), target))


# -- several labels an image, from training to predictions ------------------------------------------------------------


def test_metrics_of_several_labels_are_scikit_learns():
    module = classifier(loss=MULTI)
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    target = (torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    found = module.metrics["test"](logits, module.criterion.labels(module.criterion.check(target, 40)))
    truth, scores = target.numpy(), logits.sigmoid().numpy()
    assert set(found) == {"test_map", "test_f1"}
    assert float(found["test_map"]) == pytest.approx(average_precision_score(truth, scores, average="macro"), abs=1e-5)
    assert float(found["test_f1"]) == pytest.approx(f1_score(truth, scores >= 0.5, average="macro"), abs=1e-5)


class Tagged(pl.LightningDataModule):
    """Images with tags, as a user's own data module gives them."""

    class_names, num_classes, batch_size = ["sea", "sun", "tree"], 3, 2

    def loader(self):
        return image_loader(MULTI_HOT)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def filenames(self, stage):
        return [f"{i}.png" for i in range(4)]


def test_several_labels_from_training_to_predictions_and_export(tmp_path):
    module = classifier(loss=MULTI, optimizer=dict(opt="adamw", lr=1e-2))
    runner = trainer(tmp_path, max_epochs=12, callbacks=[PredictionWriter(tmp_path)])
    runner.fit(module, Tagged())
    assert {"train_loss", "val_loss", "val_map", "val_f1"} <= set(runner.callback_metrics)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    assert set(runner.test(module, Tagged(), verbose=False)[0]) == {"test_loss", "test_map", "test_f1"}
    batches = runner.predict(module, Tagged())
    images = torch.cat([images for images, _ in Tagged().loader()])
    scores = module.eval()(images).sigmoid()
    torch.testing.assert_close(torch.cat([found["scores"] for found in batches]), scores)
    assert torch.equal(torch.cat([found["labels"] for found in batches]), scores >= 0.5)
    with open(tmp_path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    expected = []
    for i, row in enumerate(scores.tolist()):
        several = sorted(((score, k) for k, score in enumerate(row) if score >= 0.5), reverse=True)
        expected += [(f"{i}.png", str(k), Tagged.class_names[k], f"{score:.6f}") for score, k in several]
        if not several:
            expected.append((f"{i}.png", "", "", f"{max(row):.6f}"))
    assert [tuple(row.values()) for row in rows] == expected and len(rows) >= 4
    export_model(module.model, tmp_path / "export", class_names=module.class_names)
    torch.testing.assert_close(load_exported(tmp_path / "export")(images).sigmoid(), scores)
    again = FinetuneModule.restore(tmp_path / "last.ckpt").eval()
    assert again.multi_label and torch.equal(again.criterion.function.pos_weight, torch.tensor([1.0, 2, 4]))
    torch.testing.assert_close(again(images).sigmoid(), scores)


def test_writer_takes_a_threshold(tmp_path):
    writer = PredictionWriter(tmp_path, threshold=0.2)
    scores = torch.tensor([[0.1, 0.3, 0.9], [0.1, 0.15, 0.0]])
    assert [[label for label, _ in row] for row in writer._rows(dict(scores=scores))] == [[2, 1], [None]]


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("object", "lambda", "partial")])
def test_checkpoints_hold_the_loss_as_plain_types(name, tmp_path):
    loss, target, _ = VALUES[name]
    module = classifier(loss=loss)
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, image_loader(target))
    runner.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["loss"]
    mine = isinstance(saved, dict) and saved["type"].startswith("test_losses.")
    if mine:  # importing what a file names would run code
        with pytest.raises(ValueError, match=r"loss: expected it as restore\(path, loss=...\), got 'test_losses"):
            FinetuneModule.restore(tmp_path / "last.ckpt")
    again = FinetuneModule.restore(tmp_path / "last.ckpt", **(dict(loss=loss) if mine else {}))
    images, _ = batch(target)
    torch.testing.assert_close(step(again.eval(), (images, target)), step(module.eval(), (images, target)))


@pytest.mark.parametrize("name", ["object", "lambda", "partial"])
def test_a_checkpoint_says_that_it_cannot_hold_an_object(name, tmp_path):
    loss, target, _ = VALUES[name]
    runner = trainer(tmp_path, max_steps=1)
    module = classifier(loss=loss)
    runner.fit(module, image_loader(target))
    runner.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="loss: expected the callable that was trained with.*pass it again as loss="):
        FinetuneModule.restore(tmp_path / "last.ckpt")
    again = FinetuneModule.restore(tmp_path / "last.ckpt", loss=loss)
    assert torch.equal(again.model.fc.weight, module.model.fc.weight)
    trainer(tmp_path, max_steps=2).fit(classifier(loss=loss), image_loader(target), ckpt_path=tmp_path / "last.ckpt")
