"""The Lightning module for detection: torchvision-like detectors, their losses, COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from ..._config import arguments, plain, storable
from ...detection import build_detector
from ...detection.spec import detector_spec, layer_order, without_pretrained_backbone
from ..classes import Id, first_difference
from ..module import TunedModule
from ..seeded import seed_step

Target = dict[str, Any]
# What is logged of the metric: mean average precision over IoU 0.50:0.95, at 0.50, at 0.75, by size of the objects, and
# the mean recall with 100 detections an image. A size of which there is no object has -1, as in COCO's evaluation.
SCORES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


class DetectionModule(TunedModule):
    """Train a detector: the sum of its losses, timm optimizer and schedule, COCO's mean average precision.

    Args:
        model: `dict(name='faster_rcnn' | 'rfcn', backbone=..., ...)`, as `build_detector` of
            `dcn_plugin.detection.faster_rcnn` takes it, without `num_classes`.
        num_classes: number of classes of objects, at least 1. (torchvision's detectors count the background too; this
            does not.) None takes one less than `model['num_classes']`.
        rules: replacement rules for `dcn_plugin.convert`, applied after the model is built.
        checkpoint: path of weights to start from, or `dict(path=..., **options of dcn_plugin.load_checkpoint)`; loaded
            after the replacement.
        optimizer: as in `FinetuneModule`: arguments of `timm.optim.create_optimizer_v2`, `offset_lr_mult`
            (`conv_offset`), `roi_offset_lr_mult` (offset and mask branches of RoI pooling) and `layer_decay`, whose
            layers are the backbone's stages; what stands on the backbone has the full rate.
        schedule: arguments of `timm.scheduler.create_scheduler_v2`, as in `FinetuneModule`.

    Batches are a list of images [C, H, W] in 0..1 and a list of targets, as `CocoDataModule` gives them. Logged are
    `train_loss` and each loss as `train_<name>`, and for validation and test (`val_`, `test_`) `map`, `map_50`,
    `map_75`, `map_small`, `map_medium`, `map_large` and `mar_100`.

    The random numbers of a training step (which proposals are sampled, dropout) depend on the seed (`seed_everything`),
    the epoch and the number of the batch alone, so that a resumed run draws what it would have drawn.

    Raises:
        ValueError, TypeError: an unknown model, key or schedule, or a value that makes no sense.
        ModuleNotFoundError: pycocotools, which the metric needs, is not installed.

    Example:
        >>> import torch
        >>> backbone = dict(name='resnet18_dcn', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> module = DetectionModule(dict(name='faster_rcnn', backbone=backbone, min_size=64), num_classes=3)
        >>> sorted(module.eval()([torch.rand(3, 64, 64)])[0])
        ['boxes', 'labels', 'scores']
    """

    remembered: ClassVar[tuple[str, ...]] = (*TunedModule.remembered, "category_ids")

    def __init__(
        self,
        model: Mapping[str, Any],
        num_classes: int | None = None,
        *,
        rules: Sequence[Mapping] | None = None,
        checkpoint: str | Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain types only: Lightning stores these in the checkpoint and reads it with weights_only=True.
        self.save_hyperparameters(storable({k: v for k, v in locals().items() if k in arguments(type(self))}))
        self._configure(optimizer, schedule)
        _metric()  # so that what it needs is missed now, not after the first epoch
        self.spec = detector_spec(model, num_classes)
        self.num_classes = self.spec["num_classes"] - 1
        self.model = build_detector(self.spec)
        if self.layer_decay is not None:
            # timm asks the model for its layers; torchvision's detectors know of none.
            cast(Any, self.model).group_matcher = layer_order(cast(Any, self.model).backbone.body)
        self._adapt(rules, checkpoint)
        self.category_ids: list[Id] | None = None
        self._seen: list[tuple[Target, Target]] = []

    @classmethod
    def bare(cls, model: Any) -> Any:
        return without_pretrained_backbone(model)

    def described(self) -> dict[str, Any]:
        return dict(spec=self.spec, category_ids=self.category_ids)

    @property
    def backbone(self) -> nn.Module:
        """The detector's backbone, as `BackboneFinetuning` wants it."""
        return cast(Any, self.model).backbone

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """Return losses by name in training mode, else for each image `boxes` [L, 4], `labels` and `scores` [L]."""
        return self.model(list(images), None if targets is None else list(targets))

    @property
    def logged(self) -> dict[str, list[str]]:
        """What validation logs, by the first word of the names, for callbacks that monitor one of them."""
        return dict(val=[f"val_{name}" for name in SCORES])

    # -- steps --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is None:
            return
        self.data_config = plain(getattr(data, "data_config", None))
        channels = next((m.in_channels for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        given = getattr(data, "in_chans", channels)
        if channels is not None and given != channels:
            raise ValueError(f"in_chans: expected the model's {channels} channels, got {given} of the data")
        if stage == "predict" and getattr(data, "predict_folder", None) is not None:
            return
        found = getattr(data, "num_classes", self.num_classes)
        if found != self.num_classes:
            raise ValueError(f"num_classes: expected the model's {self.num_classes} classes, got {found} of the data")
        ids, names = getattr(data, "category_ids", None), getattr(data, "class_names", None)
        self._check_categories(self.category_ids, self.class_names, ids, names)
        if self.class_names is None and names is not None:
            self._check_start(names, stage)
        self.category_ids, self.class_names = ids, names

    def _check_start(self, names: Sequence[str], stage: str) -> None:
        """Compare with the names that came with the weights of `checkpoint`; training may turn to other classes."""
        start, where = getattr(self, "started_from", (None, ""))
        heads = ("roi_heads.box_predictor.", "roi_heads.box_roi_pool.scores.")
        kept = [] if self.load_report is None else self.load_report.allowed
        if start is None or any(name.startswith(heads) for name in kept):
            return
        said = first_difference(dict(enumerate(start, 1)), f"in {where}", dict(enumerate(names, 1)), "in the data")
        if said is None:
            return
        if stage != "fit":
            raise ValueError(f"checkpoint: counted by label, {said}")
        rank_zero_warn(f"checkpoint: counted by label, {said}; training goes on from weights for the former")

    def _check_categories(self, ids: Any, names: Any, found_ids: Any, found_names: Any) -> None:
        """Raise ValueError where a label of the model means something else in the data."""
        if ids is None or found_ids is None:
            return
        if names is None or found_names is None:  # unknown, as in checkpoints of other programs
            names, found_names = [""] * len(ids), [""] * len(found_ids)
        trained, found = (dict(zip(*pair, strict=True)) for pair in ((ids, names), (found_ids, found_names)))
        said = first_difference(trained, "in the model's training", found, "in the data")
        if said is not None:
            raise ValueError(f"category_ids: {said}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dcn_plugin", {})
        self._check_categories(saved.get("category_ids"), saved.get("class_names"), self.category_ids, self.class_names)
        super().on_load_checkpoint(checkpoint)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        seed_step(self, batch_idx)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict({f"train_{name}": value for name, value in losses.items()}, batch_size=len(images))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def _evaluate(self, batch: tuple[list[Tensor], list[Target]]) -> None:
        images, targets = batch
        if not images:  # none of them could be read, and the data says 'skip'
            return
        for found, target in zip(self(images), targets, strict=True):
            truth: Target = {key: target[key].cpu() for key in ("boxes", "labels", "iscrowd", "area") if key in target}
            self._seen.append(({key: value.float().cpu() for key, value in found.items()}, truth))

    def _score(self, stage: str) -> None:
        seen, self._seen = self._seen, []
        if self.trainer.world_size > 1:
            # torchmetrics gathers the states tensor by tensor and would wait for ever where processes have different
            # numbers of images.
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, seen)
            seen = [item for part in parts for item in part]
        if not seen:
            if not self.trainer.sanity_checking:  # which may meet a few bad ones first
                raise ValueError(f"{stage}: expected images to evaluate, could read none of them")
            return
        metric = _metric()
        metric.update([dict(found, labels=found["labels"].long()) for found, _ in seen], [truth for _, truth in seen])
        values = metric.compute()
        for name in SCORES:
            # All processes have the same value; with sync_dist Lightning need not warn that they may not.
            self.log(f"{stage}_{name}", values[name], prog_bar=name in ("map", "map_50"), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._score("val")

    def on_test_epoch_start(self) -> None:
        self._seen = []

    def test_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._score("test")

    def predict_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> list[Target]:
        """Return for each image `image_id`, `boxes` [L, 4] (x1, y1, x2, y2), `labels` [L] in 1..K and `scores` [L]."""
        images, targets = batch
        if not images:
            return []
        return [dict(found, image_id=target["image_id"]) for found, target in zip(self(images), targets, strict=True)]


def _metric() -> MeanAveragePrecision:
    try:
        # The thresholds in double precision, as COCO's evaluation has them: a recall may lie on one of them.
        metric = MeanAveragePrecision(
            backend="pycocotools",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            sync_on_compute=False,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DetectionModule needs pycocotools, which is not installed: pip install '.[detection]' in a clone",
            name="pycocotools",
        ) from error
    metric.warn_on_many_detections = False
    return metric
