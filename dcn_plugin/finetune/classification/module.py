"""The Lightning module of classifiers: any of timm's or MMEngine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.data import Mixup
from torch import Tensor, nn

from ..._config import arguments, check_keys, check_kinds, plain, storable
from ...models.build import build_model
from ..classes import compare, head_was_loaded, names_of_pretrained
from ..module import TunedModule
from .losses import Criterion, check_saved_loss, stored


class FinetuneModule(TunedModule):
    """Train a classifier: its loss, Mixup/CutMix, timm optimizer and schedule, and metrics that fit the loss.

    Args:
        model: timm model name, `dict(name=<timm name>, pretrained=..., ...)`, or an MMEngine config `dict(type=...)` of
            a module whose output is the logits [N, num_classes].
        num_classes: number of classes, at least 2; None takes `model['num_classes']` or the model's own.
        rules: replacement rules for `dcn_plugin.convert`, applied after the model is built (and its pretrained weights
            are loaded).
        checkpoint: path of weights to start from, or `dict(path=..., **options of dcn_plugin.load_checkpoint)`; loaded
            after the replacement.
        loss: `'cross_entropy'`, or `dict(type='cross_entropy', weight=[one number a class])`; for images with any
            number of labels `'binary_cross_entropy'`, or `dict(type='binary_cross_entropy', pos_weight=...,
            weight=...)` (one number a class; in `pos_weight` also one for all); any other as `dict(type=<name in
            timm.loss, or import path>, **arguments)`, or a callable of logits [N, K] and targets that returns one
            number. It has no parameters of its own.
        multi_label: targets are multi-hot [N, K], each label for itself; None follows the loss (False for one that
            is neither torch's nor timm's). Targets are otherwise class indices [N] or probabilities [N, K].
        label_smoothing: smoothing of the targets in [0, 1), for `'cross_entropy'`.
        mixup: arguments of `timm.data.Mixup`, such as `dict(mixup_alpha=0.2, cutmix_alpha=1.0)`; needs even batches,
            and a loss that takes probabilities [N, K]; not for several labels an image.
        optimizer: arguments of `timm.optim.create_optimizer_v2` (`opt`, `lr`, `weight_decay`, ...) plus `layer_decay`
            and factors on the learning rate: `offset_lr_mult` of every `conv_offset` (0.1 is usual) and
            `roi_offset_lr_mult` of the branches of RoI pooling (default 0.01).
        schedule: arguments of `timm.scheduler.create_scheduler_v2` (`sched`, `warmup_epochs`, `min_lr`, ...); stepped
            after every optimizer step, over the trainer's whole run.
        channels_last: keep model and images in channels-last memory format.

    Logged are `train_loss`, and for validation and test (`val_`, `test_`) `loss` (of the targets as they are, without
    smoothing or Mixup) and `top1`, `top5` (of K classes at most), or for several labels an image `map` (mean over the
    labels of the average precision) and `f1` (mean over the labels, scores from 0.5 on).

    Raises:
        ValueError, TypeError: an unknown model, key, loss or schedule, or a value that makes no sense; in training, a
            target that is not of the loss's kind.

    Example:
        >>> import torch
        >>> module = FinetuneModule(dict(name='resnet18_dcn', num_classes=3), optimizer=dict(offset_lr_mult=0.1))
        >>> module(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3])

    `lr_scale` and the schedules are timm's; the offset factors are those of Dai et al., 2017, section 2.3.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        num_classes: int | None = None,
        *,
        rules: Sequence[Mapping] | None = None,
        checkpoint: str | Mapping[str, Any] | None = None,
        loss: str | Mapping[str, Any] | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        multi_label: bool | None = None,
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        given = {key: value for key, value in locals().items() if key in arguments(type(self))}
        if "loss" in given:
            given["loss"] = stored(loss)
        self.save_hyperparameters(storable(given))
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= label_smoothing < 1, got {label_smoothing}")
        self._configure(optimizer, schedule)
        self.model = build_model(model, num_classes)
        self._adapt(rules, checkpoint)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.channels_last = channels_last

        classes = num_classes or (model.get("num_classes") if isinstance(model, Mapping) else None)
        self.num_classes = classes or getattr(self.model, "num_classes", None)
        if self.num_classes is None or self.num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2 classes, got {self.num_classes}")
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup:
            check_keys("mixup", mixup, arguments(Mixup, "label_smoothing", "num_classes"))
            # Smoothing is left to the loss, which treats hard and mixed targets alike.
            self.mixup = Mixup(**plain(mixup), label_smoothing=0.0, num_classes=self.num_classes)
        if self.started_from[0] is None:
            self.started_from = names_of_pretrained(self.model, model, self.num_classes)
            if self.started_from[1].startswith("local-dir:"):
                self.class_names = self.started_from[0]
        self.criterion = Criterion(loss, self.num_classes, label_smoothing, self.mixup is not None, multi_label)
        self.multi_label = self.criterion.multi_label
        self.metrics = nn.ModuleDict({stage: self.criterion.metrics(f"{stage}_") for stage in ("val", "test")})

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> None:
        super().check_config(values)
        check_kinds("mixup.", values.get("mixup") or {}, Mixup)

    @classmethod
    def check_saved(cls, values: Mapping[str, Any]) -> None:
        check_saved_loss(values.get("loss"))
        super().check_saved(values)

    @classmethod
    def bare(cls, model: Any) -> Any:
        bare = super().bare(model)
        return bare | dict(pretrained=False) if isinstance(model, Mapping) and "name" in model else bare

    @property
    def backbone(self) -> nn.Module:
        """Everything but the classifier, as `BackboneFinetuning` wants it."""
        model = cast(Any, self.model)
        head = model.get_classifier() if hasattr(model, "get_classifier") else None
        return nn.ModuleList(child for child in self.model.children() if child is not head)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    @property
    def logged(self) -> dict[str, list[str]]:
        """What validation logs, by the first word of the names, for callbacks that monitor one of them."""
        return dict(val=["val_loss", *cast(Any, self.metrics)["val"].keys()])

    # -- steps --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is None:
            return
        self.data_config = plain(getattr(data, "data_config", None))
        if stage == "predict":
            names = getattr(data, "known_class_names" if hasattr(data, "known_class_names") else "class_names", None)
        else:
            found = getattr(data, "num_classes", self.num_classes)
            if found != self.num_classes:
                raise ValueError(
                    f"num_classes: expected the model's {self.num_classes} classes, got {found} of the data"
                )
            names = getattr(data, "class_names", None)
        compare(self.class_names, "in what the model was trained on", names, "in the data")
        start, where = self.started_from
        if self.class_names is None and start is not None and head_was_loaded(self.model, self.load_report, start):
            compare(start, f"in {where}", names, "in the data", warn=stage == "fit")
            self.class_names = None if stage == "fit" else start
        self.class_names = self.class_names if names is None else [str(name) for name in names]
        if self.mixup is not None and getattr(data, "batch_size", 2) % 2:
            raise ValueError(f"batch_size: expected an even one for Mixup and CutMix, got {data.batch_size}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dcn_plugin", {}).get("class_names")
        compare(saved, "in the checkpoint", self.class_names, "in the data")
        super().on_load_checkpoint(checkpoint)

    def on_train_epoch_start(self) -> None:
        if hasattr(self.trainer.datamodule, "set_epoch"):
            self.trainer.datamodule.set_epoch(self.current_epoch)

    def _logits(self, images: Tensor) -> Tensor:
        logits = self(images)
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.num_classes):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: expected logits [{len(images)}, {self.num_classes}] from it, got {got}")
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        target = self.criterion.check(target, len(images))
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        loss = self.criterion(self._logits(images), target, training=True)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(images))
        return loss

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        target, logits = self.criterion.check(target, len(images)), self._logits(images)
        metrics: Any = cast(Any, self.metrics)[stage]
        metrics.update(logits, self.criterion.labels(target))
        loss = self.criterion(logits, target, training=False)
        self.log(f"{stage}_loss", loss, batch_size=len(images), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(images))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return label [N], its score [N] and all scores [N, K] (softmax) of a batch.

        For several labels an image: labels [N, K] (bool, scores from 0.5 on) and scores [N, K] (sigmoid).
        """
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        scores = self.criterion.scores(self._logits(images))
        if self.multi_label:
            return dict(labels=scores >= 0.5, scores=scores)
        score, label = scores.max(dim=-1)
        return dict(label=label, score=score, scores=scores)
