"""What watches over every run of the modules: that it sees data, and that a resumed one trains what it trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .freezing import BackboneFinetuning
from .streams import describe_split

_KEY = "dcn_plugin.frozen"


class RunGuard(pl.Callback):
    """Stop a run that sees no data, and let a resumed one train the parameters that it trained before.

    The modules bring it along (`TunedModule`). An epoch of training, validation, test or prediction in which
    no batch comes is an error that names the data, and for shards what is in them. Checkpoints say which parameters
    are frozen, whoever froze them: a callback freezes before the first epoch of every run, a resumed one too, and sets
    free in an epoch that may have passed.

    Raises:
        ValueError: no batch, with the data set and what was found there; a callback that cannot be right here.
    """

    def __init__(self) -> None:
        self._frozen: Mapping[str, Any] | None = None
        self._epoch: int | None = None
        self._begun = False
        self._shared: list[str] = []

    # -- data ---------------------------------------------------------------------------------------------------------

    def _check_validation(self, trainer: pl.Trainer) -> None:
        # Lightning passes over an empty set that knows its length.
        asked = trainer.limit_val_batches and trainer.val_dataloaders not in (None, [])
        if asked and not sum(trainer.num_val_batches):
            require_batches(trainer, "val", 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_batches(trainer, "train", trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
        require_batches(trainer, "val", loop.batch_progress.current.ready)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_batches(trainer, "test", trainer.test_loop.batch_progress.current.ready)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_batches(trainer, "predict", trainer.predict_loop.batch_progress.current.ready)

    # -- what is trained ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._frozen, self._epoch, self._begun = None, None, False  # a checkpoint is read after this
        if stage == "fit":
            refuse_callbacks(trainer)
            refuse_monitors(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = dict(
            parameters=[name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad],
            norms=[name for name, norm in _norms(pl_module).items() if not norm.track_running_stats],
            epoch=self._epoch,
        )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._frozen = checkpoint.get(_KEY)
        self._epoch = None if self._frozen is None else self._frozen["epoch"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shared = _trainable(pl_module)
        if self._frozen is None:
            return
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name not in self._frozen["parameters"])
        for name, norm in _norms(pl_module).items():
            norm.track_running_stats = name not in self._frozen["norms"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_validation(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch
        for callback in trainer.callbacks:
            if isinstance(callback, pl.callbacks.StochasticWeightAveraging) and isinstance(callback._swa_lrs, float):
                # One rate for all, which Lightning would give the groups without their factors.
                groups = trainer.optimizers[0].param_groups
                callback._swa_lrs = [callback._swa_lrs * group.get("lr_scale", 1.0) for group in groups]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._enter_epoch(trainer, pl_module)
        self._share_gradients(trainer, pl_module)

    def _enter_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._begun:
            self._begun = True
            # A run that goes on within an epoch does not come to where this one sets its factor.
            for callback in trainer.callbacks:
                if isinstance(callback, pl.callbacks.GradientAccumulationScheduler):
                    trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
        if self._epoch == trainer.current_epoch:
            return
        # From a checkpoint of an epoch's last step Lightning goes on with the next epoch and leaves out its start.
        self._epoch = trainer.current_epoch
        for callback in trainer.callbacks:
            callback.on_train_epoch_start(trainer, pl_module)
        pl_module.on_train_epoch_start()

    def _share_gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # DistributedDataParallel averages the gradients of what was trained when it was made, and of nothing else.
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
            now = _trainable(pl_module)
            if now != self._shared:
                self._shared, strategy.model = now, strategy._setup_model(pl_module)


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _norms(module: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def require_batches(trainer: pl.Trainer, stage: str, number: float) -> None:
    """Raise ValueError if the split of `stage` ('train', 'val', 'test' or 'predict') gave no batch, naming the data."""
    if not number:
        found = describe_split(getattr(trainer, "datamodule", None), stage)
        raise ValueError(f"{stage}: expected at least one batch, got none from {found}")


def refuse_callbacks(trainer: pl.Trainer) -> None:
    """Raise ValueError for callbacks of Lightning's that would run to the end and be wrong, or stop in the middle."""
    thaw, swa_start = -1, math.inf
    for callback in trainer.callbacks:
        if isinstance(callback, BackboneFinetuning):
            thaw = callback.unfreeze_backbone_at_epoch
        elif isinstance(callback, pl.callbacks.BackboneFinetuning):
            raise ValueError(
                f"callbacks: expected dcn_plugin.finetune.BackboneFinetuning, which takes the same arguments, got "
                f"Lightning's {type(callback).__name__}: it sets one rate for all that it unfreezes"
            )
        elif isinstance(callback, pl.callbacks.StochasticWeightAveraging):
            start = callback._swa_epoch_start
            swa_start = start if isinstance(start, int) else int((trainer.max_epochs or 0) * start)
    if thaw >= max(swa_start - 1, 0):
        raise ValueError(
            "callbacks: expected the backbone to be trained before StochasticWeightAveraging begins, got "
            f"unfreeze_backbone_at_epoch={thaw} with averaging from epoch {max(swa_start - 1, 0)} on"
        )


def refuse_monitors(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise ValueError for a callback that waits for a value that is never logged, after an epoch as Lightning would.

    Only where all that logs is known: modules and callbacks of this package's and Lightning's own.
    """
    ours = (__name__.partition(".")[0], pl.__name__)
    sources = [pl_module, *trainer.callbacks]
    if not all(type(source).__module__.partition(".")[0] in ours for source in sources):
        return
    known = getattr(pl_module, "logged", None)
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        stage = str(monitor).partition("_")[0]
        if known is None or monitor is None or not getattr(callback, "strict", True) or stage not in known:
            continue
        if monitor not in known[stage]:
            raise ValueError(
                f"callbacks: expected a monitor out of {', '.join(known[stage])}, which this module logs, got "
                f"monitor={monitor!r} of {type(callback).__name__}"
            )
