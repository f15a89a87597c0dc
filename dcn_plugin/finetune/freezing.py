"""Training the head first: Lightning's `BackboneFinetuning` with the rates of this package's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.finetuning import multiplicative
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


class BackboneFinetuning(pl.callbacks.BackboneFinetuning):
    """Freeze the module's `backbone` until an epoch, then train it at a rate that rises to that of the head.

    With r the scheduled rate at the start of an epoch, the backbone's is `b = r * backbone_initial_ratio_lr` (or
    `backbone_initial_lr`) in epoch `unfreeze_backbone_at_epoch`, then each epoch `min(r, b * lambda_func(epoch + 1))`.
    A parameter's own rate is b times its `lr_scale`: factors of offsets, layer decay and exemptions from weight decay
    are those of a run that freezes nothing. (Lightning's callback of this name gives all of them one rate and one
    weight decay.) What was frozen before, such as the stem of a pretrained detector, stays so. A resumed run goes on as
    the interrupted one would have.

    Args:
        unfreeze_backbone_at_epoch: epoch from which the backbone is trained, counted from 0.
        lambda_func: factor on the backbone's rate for each epoch after that, given the number of the epoch + 1;
            2 unless given.
        backbone_initial_ratio_lr: the backbone's first rate in parts of the scheduled one.
        backbone_initial_lr: the backbone's first rate itself, in place of that.
        should_align: let the backbone's rate rise to the scheduled one and no further.
        initial_denom_lr: Lightning's; not used.
        train_bn: train the backbone's batch norms, from the first epoch on as Lightning does. False leaves their
            weights as they are, and their statistics until the backbone is trained.
        verbose, rounding: log the rates with so many digits.

    Raises:
        ValueError: an epoch below 0, a rate or ratio that is not positive.

    Example:
        >>> freeze = BackboneFinetuning(unfreeze_backbone_at_epoch=5, backbone_initial_ratio_lr=0.1)
        >>> freeze.unfreeze_backbone_at_epoch
        5
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable = multiplicative,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        if unfreeze_backbone_at_epoch < 0:
            raise ValueError(f"unfreeze_backbone_at_epoch: expected 0 or more, got {unfreeze_backbone_at_epoch}")
        for name, value in dict(ratio_lr=backbone_initial_ratio_lr, lr=backbone_initial_lr).items():
            if value is not None and not value > 0:
                raise ValueError(f"backbone_initial_{name}: expected a positive number, got {value}")
        super().__init__(
            unfreeze_backbone_at_epoch=unfreeze_backbone_at_epoch,
            lambda_func=lambda_func,
            backbone_initial_ratio_lr=backbone_initial_ratio_lr,
            backbone_initial_lr=backbone_initial_lr,
            should_align=should_align,
            initial_denom_lr=initial_denom_lr,
            train_bn=train_bn,
            verbose=verbose,
            rounding=rounding,
        )
        self._restarting: bool
        self._held: list[str] = []
        self._first_group: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":  # the weights are only used
            return
        # A second fit of the same objects is a run of its own; a checkpoint is read after this.
        self._first_group, self.previous_backbone_lr = None, None
        self._internal_optimizer_metadata = dict[int, list[dict[str, Any]]]()
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restarting, self._restarting = self._restarting, False
        super().on_fit_start(trainer, pl_module)
        if not restarting or self._first_group is None:
            return
        # The groups that were added; their state comes with the optimizer's, from the same checkpoint.
        parameters = dict(pl_module.named_parameters())
        for index, groups in self._internal_optimizer_metadata.items():
            for group in groups[self._first_group :]:
                params = [parameters[name] for name in group["params"]]
                trainer.optimizers[index].add_param_group({**group, "params": params})

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for module in pl_module.backbone.modules():
            is_norm = isinstance(module, _BatchNorm)
            if is_norm and self.train_bn:
                continue
            if is_norm:
                module.track_running_stats = False
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    if not is_norm and names[id(parameter)] not in self._held:
                        self._held.append(names[id(parameter)])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        find_place = getattr(pl_module, "find_place_in_schedule", None)
        if find_place is not None:  # before the first batch of a resumed run the rate is the checkpoint's
            find_place(0)
        rate = _scheduled(optimizer)
        if self._first_group is None:
            self._first_group = len(optimizer.param_groups)
            given = self.backbone_initial_lr
            own = rate * self.backbone_initial_ratio_lr if given is None else given
            self._thaw(pl_module, optimizer, own)
        else:
            own = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            own = min(own, rate) if self.should_align else own
        self.previous_backbone_lr = own
        for group in optimizer.param_groups[self._first_group :]:
            group["lr"] = own * group.get("lr_scale", 1.0)
        if self.verbose:
            digits = self.rounding
            pl_module.print(f"epoch {epoch}: rate {round(rate, digits)}, of the backbone {round(own, digits)}")

    def _thaw(self, pl_module: pl.LightningModule, optimizer: Optimizer, rate: float) -> None:
        for module in pl_module.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = True
        parameters = dict(pl_module.named_parameters())
        held = [parameters[name].requires_grad_(True) for name in self._held]
        if held:
            optimizer.add_param_group(dict(params=held, lr=rate))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | dict(first_group=self._first_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_group = state_dict.get("first_group")
        super().load_state_dict(state_dict)


def _scheduled(optimizer: Optimizer) -> float:
    """Return the rate that the schedule has for a parameter without a factor."""
    for group in optimizer.param_groups:
        if group.get("lr_scale", 1.0):
            return float(group["lr"] / group.get("lr_scale", 1.0))
    return float(optimizer.param_groups[0]["lr"])


def split_added_groups(optimizer: Optimizer, groups: Callable[[nn.Module], list[dict]], model: nn.Module) -> None:
    """Let parameters that are added to an optimizer later have the factors and weight decay that `groups` gives them.

    A callback that unfreezes adds what it freed as one group with one rate. That group is split as the others are,
    with its rate times the `lr_scale` of each part.
    """
    add = optimizer.add_param_group

    def add_param_group(group: dict[str, Any]) -> None:
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        added = {id(parameter) for parameter in params}
        common = {key: value for key, value in group.items() if key != "params"}
        rate = group.get("lr", optimizer.defaults.get("lr"))
        for part in groups(model):
            chosen = [parameter for parameter in part["params"] if id(parameter) in added]
            if chosen:
                own = {**part, **common, "params": chosen, "lr_scale": part["lr_scale"]}
                add(own if rate is None else {**own, "lr": rate * part["lr_scale"]})
                added -= {id(parameter) for parameter in chosen}
        rest = [parameter for parameter in params if id(parameter) in added]  # not the model's
        if rest:
            add({**common, "params": rest})

    setattr(optimizer, "add_param_group", add_param_group)  # noqa: B010  (of this optimizer alone)
