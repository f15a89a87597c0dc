"""The Lightning module for semantic segmentation: cross entropy for each pixel, mean IoU and pixel accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ..._config import are_numbers, arguments, plain, storable
from ...detection.spec import layer_order, without_pretrained_backbone
from ...segmentation import build_segmenter
from ...segmentation.spec import segmenter_spec
from ..classes import compare
from ..module import TunedModule
from ..seeded import seed_step

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class SegmentationModule(TunedModule):
    """Train a segmenter: cross entropy over labelled pixels, timm optimizer and schedule, mean IoU.

    `loss = CE(out) + aux_weight * CE(aux)`, each the mean over the batch's labelled pixels; without any it is 0.

    Args:
        model: `dict(name='deeplab' | 'deeplabv3' | 'fcn', backbone=..., ...)`, as `build_segmenter` of
            `dcn_plugin.segmentation` takes it.
        num_classes: number of classes, the background among them where there is one; None takes
            `model['num_classes']`.
        rules: replacement rules for `dcn_plugin.convert`, applied after the model is built.
        checkpoint: path of weights to start from, or `dict(path=..., **options of dcn_plugin.load_checkpoint)`; loaded
            after the replacement.
        class_weights: factor of each class in the loss; None weighs all alike.
        aux_weight: factor of the auxiliary head's loss, 0.5 in torchvision's training and 0.4 in mmsegmentation's.
        ignore_index: what masks have where no class is right; None takes the data's, or 255.
        optimizer: as in `FinetuneModule`: arguments of `timm.optim.create_optimizer_v2`, `offset_lr_mult`
            (`conv_offset`) and `layer_decay`, whose layers are the backbone's stages; the heads have the full rate.
        schedule: arguments of `timm.scheduler.create_scheduler_v2`, as in `FinetuneModule`.

    Batches are a list of images [C, H, W] in 0..1 and a list of `dict(mask=[H, W])`, as `SegmentationDataModule` gives
    them; those of training have one size. Logged are `train_loss`, and for validation and test (`val_`, `test_`)
    `loss`, `miou` (intersection over union, mean over the classes that occur in masks or predictions) and
    `pixel_accuracy`, over all labelled pixels of a split.

    The random numbers of a training step (dropout) depend on the seed (`seed_everything`), the epoch and the number of
    the batch alone, so that a resumed run draws what it would have drawn.

    Raises:
        ValueError, TypeError: an unknown model, key or schedule, or a value that makes no sense; an epoch without a
            labelled pixel; images of several sizes in a training batch.

    Example:
        >>> import torch
        >>> backbone = dict(name='resnet18_dcn', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> module = SegmentationModule(dict(name='fcn', backbone=backbone), num_classes=3)
        >>> module.eval()(torch.rand(1, 3, 64, 64))['out'].shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        num_classes: int | None = None,
        *,
        rules: Sequence[Mapping] | None = None,
        checkpoint: str | Mapping[str, Any] | None = None,
        class_weights: Sequence[float] | None = None,
        aux_weight: float = 0.5,
        ignore_index: int | None = None,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain types only: Lightning stores these in the checkpoint and reads it with weights_only=True.
        self.save_hyperparameters(storable({k: v for k, v in locals().items() if k in arguments(type(self))}))
        self._configure(optimizer, schedule)
        self.spec = segmenter_spec(model, num_classes)
        self.model = build_segmenter(self.spec)
        self.num_classes: int = self.spec["num_classes"]
        if self.layer_decay is not None:
            # timm asks the model for its layers.
            cast(Any, self.model).group_matcher = layer_order(self.backbone, "backbone.")
        self._adapt(rules, checkpoint)
        aux_weight, ignore_index, class_weights = map(plain, (aux_weight, ignore_index, class_weights))
        if not are_numbers([aux_weight]) or aux_weight < 0:
            raise ValueError(f"aux_weight: expected a number from 0 on, got {aux_weight!r}")
        if ignore_index is not None and type(ignore_index) is not int:
            raise ValueError(f"ignore_index: expected an integer or None, got {ignore_index!r}")
        self.aux_weight, self.ignore_index = aux_weight, 255 if ignore_index is None else ignore_index
        if class_weights is not None and (
            not are_numbers(class_weights)
            or len(class_weights) != self.num_classes
            or min(class_weights) < 0
            or not any(class_weights)
        ):
            raise ValueError(
                f"class_weights: expected {self.num_classes} numbers from 0 on, not all 0, got {class_weights!r}"
            )
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self._make_metrics()
        self._labelled: dict[str, Tensor] = {}  # pixels of the epoch

    def _make_metrics(self) -> None:
        # What masks hold has been checked where they are read.
        options = dict(num_classes=self.num_classes, ignore_index=self.ignore_index, validate_args=False)
        made = MetricCollection(
            dict(
                miou=MulticlassJaccardIndex(average="macro", **options),
                pixel_accuracy=MulticlassAccuracy(average="micro", **options),
            )
        )
        self.metrics = nn.ModuleDict({stage: made.clone(f"{stage}_") for stage in ("val", "test")})
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    @classmethod
    def bare(cls, model: Any) -> Any:
        return without_pretrained_backbone(model)

    def described(self) -> dict[str, Any]:
        return dict(spec=self.spec)

    @property
    def backbone(self) -> nn.Module:
        """The segmenter's backbone, as `BackboneFinetuning` wants it."""
        return cast(Any, self.model).backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits by the heads' names, [N, num_classes, H, W] each, of images [N, C, H, W]."""
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
        channels = cast(Any, self.model).in_chans
        given = getattr(data, "in_chans", channels)
        if given != channels:
            raise ValueError(f"in_chans: expected the model's {channels} channels, got {given} of the data")
        found = getattr(data, "num_classes", self.num_classes)
        if found != self.num_classes:
            raise ValueError(f"num_classes: expected the model's {self.num_classes} classes, got {found} of the data")
        ignored = getattr(data, "ignore_index", self.ignore_index)
        if ignored != self.ignore_index:
            if self.hparams["ignore_index"] is not None:
                raise ValueError(f"ignore_index: expected the module's {self.ignore_index}, got {ignored} of the data")
            self.ignore_index = ignored
            self._make_metrics()
        names = getattr(data, "class_names", None)
        compare(self.class_names, "in what the model was trained on", names, "in the data")
        start, where = self.started_from
        kept = [] if self.load_report is None else self.load_report.allowed
        if self.class_names is None and not any(name.startswith("classifier.") for name in kept):
            compare(start, f"in {where}", names, "in the data", warn=stage == "fit")
        self.class_names = self.class_names if names is None else list(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dcn_plugin", {}).get("class_names")
        compare(saved, "in the checkpoint", self.class_names, "in the data")
        super().on_load_checkpoint(checkpoint)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        seed_step(self, batch_idx)

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over the labelled pixels, 0 where there are none, and their number."""
        labelled, weights = masks != self.ignore_index, cast(Any, self.class_weights)
        total = F.cross_entropy(logits.float(), masks, weights, ignore_index=self.ignore_index, reduction="sum")
        shares = labelled if weights is None else weights[masks.where(labelled, 0)] * labelled
        # torch's own mean is no number where nothing is labelled.
        return total / shares.sum().clamp(min=1e-12), labelled.sum()

    def _count(self, stage: str, labelled: Tensor) -> None:
        self._labelled[stage] = self._labelled.get(stage, torch.zeros_like(labelled)) + labelled

    def _require_labelled(self, stage: str) -> None:
        """Raise ValueError where an epoch had no labelled pixel in any process."""
        seen = self._labelled.pop(stage, torch.zeros((), dtype=torch.int64, device=self.device))
        if not self.trainer.sanity_checking and not int(self.trainer.strategy.reduce(seen, reduce_op="sum")):
            raise ValueError(
                f"{stage}: expected labelled pixels, got none: no mask could be read, or all are {self.ignore_index}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        sizes = {tuple(image.shape[-2:]) for image in images} | {tuple(target["mask"].shape) for target in targets}
        if len(sizes) > 1:
            raise ValueError(
                f"images: expected one size in a batch to train on, got {' and '.join(map(str, sorted(sizes)))} "
                "(transforms in data.augment bring them to one: RandomCrop, RandomResizedCrop, Resize)"
            )
        masks = torch.stack([target["mask"] for target in targets]).long()
        found = self(torch.stack(images))
        loss, labelled = self._cross_entropy(found["out"], masks)
        if "aux" in found:
            loss = loss + self.aux_weight * self._cross_entropy(found["aux"], masks)[0]
        self._count("train", labelled)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        self._require_labelled("train")

    def _scores(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return logits [num_classes, H, W] of images of any sizes, those of one size computed together."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(tuple(image.shape), []).append(place)
        found: dict[int, Tensor] = {}
        for own in places.values():
            found |= dict(zip(own, self(torch.stack([images[place] for place in own]))["out"], strict=True))
        return [found[place] for place in range(len(images))]

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, targets = batch
        metrics, losses = cast(Any, self.metrics)[stage], cast(Any, self.losses)[stage]
        for scores, target in zip(self._scores(images), targets, strict=True):
            logits, mask = scores[None], target["mask"][None].long()
            metrics.update(logits, mask)
            loss, labelled = self._cross_entropy(logits, mask)
            losses.update(loss, labelled)
            self._count(stage, labelled)
        self.log(f"{stage}_loss", losses, batch_size=max(len(images), 1))
        self.log_dict(metrics, prog_bar=True, batch_size=max(len(images), 1))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._require_labelled("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._require_labelled("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each image `image_id` and `mask` [H, W], the class of each pixel (uint8 for up to 256 classes)."""
        images, targets = batch
        kind = torch.uint8 if self.num_classes <= 256 else torch.int32
        return [
            dict(image_id=target["image_id"], mask=scores.argmax(0).to(kind))
            for scores, target in zip(self._scores(images), targets, strict=True)
        ]
