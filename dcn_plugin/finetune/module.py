"""What the Lightning modules share: weights to start from, timm's optimizers and schedules, checkpoints, export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import pytorch_lightning as pl
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .._config import arguments, check_keys, check_kinds, plain
from ..checkpoint import LoadReport, load_checkpoint, match_wrappers, read_file
from ..convert import convert
from ..export import export_model
from ..layers import offset_rates
from ..models.build import check_saved_model, without_weights
from .classes import names_in
from .freezing import split_added_groups
from .guard import RunGuard, require_batches

__all__ = ["TunedModule", "param_groups"]

Module = TypeVar("Module", bound="TunedModule")

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    offset_lr_mult: float = 1.0,
    no_weight_decay: Sequence[str] = (),
    roi_offset_lr_mult: float = 0.01,
) -> list[dict]:
    """Split the trainable parameters into timm's groups and give the offset predictors learning rates of their own.

    Every group carries `lr_scale`, which timm's schedulers multiply the learning rate with:
    `lr_scale = layer_decay^(layers above) * factor`. The factor is `offset_lr_mult` times what is usual (1 for a
    `conv_offset`, see `dcn_plugin.layers.offset_parameters`), `roi_offset_lr_mult` for the fully connected branches of
    RoI pooling, 1 for the rest. Biases and norms have no weight decay, as in timm.
    """
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_weight_decay)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=no_weight_decay, layer_decay=layer_decay
        )
    named = dict(model.named_parameters())
    factors: dict[int, Any] = {
        id(named[name]): rate.factor(offset_lr_mult, roi_offset_lr_mult) for name, rate in offset_rates(model).items()
    }
    result = []
    for group in groups:
        scale = group.pop("lr_scale", 1.0)
        params = group.pop("params")
        for factor in (None, *sorted(set(factors.values()), reverse=True)):  # None: all the rest
            chosen = [p for p in params if factors.get(id(p)) == factor]
            if chosen:
                result.append({**group, "params": chosen, "lr_scale": scale * (1.0 if factor is None else factor)})
    return result


class TunedModule(pl.LightningModule):
    """What the Lightning modules share: weights to start from, optimizer and schedule, and what checkpoints remember.

    A subclass builds `self.model`, calls `_configure` with its arguments and `_adapt` with the model's.
    """

    model: nn.Module
    # Attributes that come from the data and go into checkpoints.
    remembered: ClassVar[tuple[str, ...]] = ("data_config", "class_names")

    def _configure(self, optimizer: Mapping[str, Any] | None, schedule: Mapping[str, Any] | None) -> None:
        self.optimizer_args = dict(opt="adamw", lr=1e-3, weight_decay=0.05) | plain(optimizer or {})
        self.lr_mults = dict(offset_lr_mult=1.0, roi_offset_lr_mult=0.01)
        for key in self.lr_mults:
            self.lr_mults[key] = self.optimizer_args.pop(key, self.lr_mults[key])
            if self.lr_mults[key] < 0:
                raise ValueError(f"optimizer.{key}: expected a non-negative factor, got {self.lr_mults[key]}")
        self.layer_decay = self.optimizer_args.pop("layer_decay", None)
        try:  # on a stand-in, so that a bad name or argument shows before any data is read
            create_optimizer_v2([nn.Parameter(torch.zeros(1))], **self.optimizer_args)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"optimizer: {self.optimizer_args!r} does not fit: {error}") from error
        self.schedule_args = dict(sched="cosine") | plain(schedule or {})
        known = arguments(create_scheduler_v2, "optimizer", "num_epochs", "step_on_epochs", "updates_per_epoch")
        check_keys("schedule", self.schedule_args, known)
        if self.schedule_args["sched"] not in SCHEDULES:
            got = self.schedule_args["sched"]
            raise ValueError(f"schedule.sched: expected one of {', '.join(SCHEDULES)}, got {got!r}")
        self._updates_before: int | None = None
        self._rate_is_new = False
        self.data_config: dict[str, Any] | None = None
        self.class_names: list[str] | None = None
        # Class names of the weights to start from, and where they come from.
        self.started_from: tuple[list[str] | None, str] = (None, "")

    def _adapt(self, rules: Sequence[Mapping] | None, checkpoint: str | Mapping[str, Any] | None) -> None:
        """Replace layers of the model by rules, then load the weights to start from."""
        self.conversion = convert(self.model, plain(rules)) if rules else None
        self.load_report: LoadReport | None = None
        if checkpoint is not None:
            options = dict(path=checkpoint) if isinstance(checkpoint, (str, Path)) else plain(checkpoint)
            if "path" not in options:
                raise ValueError(f"checkpoint: expected a path or dict(path=..., ...), got {checkpoint!r}")
            path = options.pop("path")
            self.load_report = load_checkpoint(self.model, path, **options)
            self.started_from = (names_in(path), str(path))

    @classmethod
    def restore(cls: type[Module], path: str | Path, **overrides: Any) -> Module:
        """Rebuild the module of a Lightning checkpoint without fetching the weights it once started from."""
        saved = read_file(path)
        if not isinstance(saved, Mapping) or "hyper_parameters" not in saved:
            raise ValueError(f"path: expected a Lightning checkpoint of a {cls.__name__}, got {path}")
        cls.check_saved({key: value for key, value in saved["hyper_parameters"].items() if key not in overrides})
        module = cls(**(cls.without_initial_weights(saved["hyper_parameters"]) | overrides))
        module.load_saved(dict(saved))
        return module

    def load_saved(self, saved: dict[str, Any]) -> None:
        """Take weights, and what the module remembers, from what a Lightning checkpoint holds."""
        self.on_load_checkpoint(saved)
        self.load_state_dict(saved["state_dict"])

    @classmethod
    def without_initial_weights(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return module arguments that build the same architecture without reading any weights."""
        result: dict[str, Any] = plain(values)
        return result | dict(checkpoint=None, model=cls.bare(result["model"]))

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> None:
        """Raise TypeError for a value of a wrong kind among a config's top-level keys."""
        check_kinds("", values, cls)
        check_kinds("schedule.", values.get("schedule") or {}, create_scheduler_v2)

    @classmethod
    def check_saved(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError for arguments out of a checkpoint that would run code which only the file names."""
        check_saved_model(values.get("model"), "restore(path, model=...)")

    @classmethod
    def bare(cls, model: Any) -> Any:
        """Return the argument `model` without the weights that it names."""
        return without_weights(model)

    @classmethod
    def names_weights(cls, values: Mapping[str, Any]) -> bool:
        """Whether these arguments name weights for the whole model, so that it needs no checkpoint to be evaluated."""
        model = values["model"]  # of a detector the backbone alone may be pretrained, which stands deeper
        return values.get("checkpoint") is not None or (isinstance(model, Mapping) and bool(model.get("pretrained")))

    def described(self) -> dict[str, Any]:
        """Return what `export_model` is told of this kind of model: `spec`, and what else is the task's own."""
        return dict(spec=self.hparams["model"])

    def write_folder(self, directory: str | Path) -> Path:
        """Export the model with what the module knows about its data (see `export_model`)."""
        known: dict[str, Any] = dict(rules=self.hparams.get("rules"), data_config=self.data_config)
        return export_model(self.model, directory, class_names=self.class_names, **known, **self.described())

    # -- optimisation -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        args = self.optimizer_args
        model = cast(Any, self.model)
        never = tuple(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else ()

        def groups(model: nn.Module) -> list[dict]:
            return param_groups(model, args["weight_decay"], self.layer_decay, no_weight_decay=never, **self.lr_mults)

        optimizer = create_optimizer_v2(self.model, **args, param_group_fn=groups)
        split_added_groups(optimizer, groups, self.model)
        if self.trainer.limit_train_batches == 0:  # nothing will be done
            return optimizer
        scheduler = self._scheduler(optimizer)
        if scheduler is None:
            self._scale_rates(optimizer)
            return optimizer
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=scheduler, interval="step"))

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build timm's scheduler over the trainer's whole run, or None where the rate is constant."""
        self.trainer.fit_loop.setup_data()  # else the number of batches is not known yet
        require_batches(self.trainer, "train", self.trainer.num_training_batches)
        epochs, limit = self.trainer.max_epochs, self.trainer.max_steps
        whole = math.inf if epochs is None or epochs < 0 else self._updates_until(epochs)
        steps = whole if limit == -1 else min(whole, limit)
        if not math.isfinite(steps):
            raise ValueError("schedule: expected an end, trainer.max_epochs or trainer.max_steps, got none")
        # Whether the run ends with an epoch, not within one (max_steps).
        self._ends_with_epoch = steps == whole
        per_epoch = min(self._updates_until(1), max(steps, 1))
        try:  # in optimizer steps, so that a run that ends within an epoch ends its schedule there
            scheduler, _ = create_scheduler_v2(
                optimizer,
                **self.schedule_args,
                num_epochs=max(steps, 1) / per_epoch,
                step_on_epochs=False,
                updates_per_epoch=per_epoch,
            )
            if scheduler is not None:
                scheduler.step_update(num_updates=0)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            said = f"{self.schedule_args!r} does not fit: {type(error).__name__}: {error}"
            raise ValueError(f"schedule: {said}") from error
        return scheduler

    def _accumulation(self, epoch: int) -> int:
        """Return of how many batches an optimizer step is made in an epoch."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, pl.callbacks.GradientAccumulationScheduler):
                return callback.get_accumulate_grad_batches(epoch)
        return self.trainer.accumulate_grad_batches

    def _updates_until(self, epoch: int) -> float:
        """Return the number of optimizer steps before an epoch, in a run with as many batches as this one."""
        batches = self.trainer.num_training_batches
        if not math.isfinite(batches):
            return math.inf if epoch else 0
        return sum(math.ceil(batches / self._accumulation(e)) for e in range(epoch))

    def _scale_rates(self, optimizer: Any, rates: Sequence[float] | None = None) -> None:
        """Give every group its factor of the learning rate where no scheduler of timm's does so."""
        groups = optimizer.param_groups
        for group, rate in zip(groups, rates or [self.lr] * len(groups), strict=True):
            group["lr"] = rate * group["lr_scale"]

    @property
    def lr(self) -> float:
        """The learning rate before factors and schedule, `optimizer['lr']`, where Lightning's tools look for it.

        Setting it changes the hyper-parameters, and an optimizer and schedule that exist already: so Lightning's
        `Tuner(trainer).lr_find(...)` and `LearningRateFinder` work. The groups' factors hold in their search, too.
        """
        return self.optimizer_args["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"lr: expected a positive number, got {value!r}")
        self.optimizer_args["lr"] = float(value)
        # A dict of its own: Lightning hands the first one to its loggers.
        self.hparams["optimizer"] = {**(self.hparams.get("optimizer") or {}), "lr": float(value)}
        trainer = self._trainer
        if trainer is None or not trainer.optimizers or not trainer.training:
            return
        (optimizer,) = trainer.optimizers
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = float(value)
        for config in trainer.lr_scheduler_configs:
            config.scheduler = self._scheduler(optimizer)
        # Whoever set the rate may set that of the groups, too, without their factors: the next batch mends it.
        self._updates_before, self._rate_is_new = None, True

    def on_train_start(self) -> None:
        self._updates_before = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.find_place_in_schedule(batch_idx)

    def find_place_in_schedule(self, batch_idx: int) -> None:
        """Find, with the first batch of a run, new or resumed, where in its schedule it is."""
        scheduler = self.lr_schedulers()
        if _searches(scheduler):
            self._scale_rates(self.trainer.optimizers[0], cast(Any, scheduler).lr)
            return
        if scheduler is None and self._rate_is_new:
            self._scale_rates(self.trainer.optimizers[0])
        self._rate_is_new = False
        if self._updates_before is not None or not isinstance(scheduler, Scheduler):
            return
        updates = self.global_step
        if self._ends_with_epoch:  # an epoch may have had more or fewer before, with other processes
            epoch = self.current_epoch
            updates = int(self._updates_until(epoch)) + batch_idx // self._accumulation(epoch)
        self._updates_before = updates - self.global_step
        scheduler.step_update(num_updates=updates)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(num_updates=(self._updates_before or 0) + self.global_step)
        else:  # Lightning's search for a rate, or a callback's such as that of StochasticWeightAveraging
            super().lr_scheduler_step(scheduler, metric)

    def configure_callbacks(self) -> list[pl.Callback]:
        callbacks = self.trainer.callbacks
        if not any(isinstance(callback, RunGuard) for callback in callbacks):
            callbacks.insert(0, RunGuard())  # first, so that a run without data stops before others look at it
        return []

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dcn_plugin"] = {name: getattr(self, name) for name in self.remembered}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The schedule is a function of the update alone, and its length is that of the run that goes on.
        checkpoint["lr_schedulers"] = []
        # The model may have been compiled when it was saved, or be compiled now.
        checkpoint["state_dict"] = match_wrappers(self, checkpoint["state_dict"])
        saved = checkpoint.get("dcn_plugin", {})
        for name in self.remembered:
            setattr(self, name, getattr(self, name) or saved.get(name))


def _searches(scheduler: Any) -> bool:
    """Whether Lightning's search for a learning rate has put a schedule of its own in place of the module's."""
    return type(scheduler).__module__ == "pytorch_lightning.tuner.lr_finder"
