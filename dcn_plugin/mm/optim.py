"""MMEngine's parameter-wise rates for layers that predict where they sample.

MMEngine imports this module when a config names its constructor; `registry` does when another one meets a
`paramwise_cfg`, because importing MMEngine's optimizers takes seconds.
"""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from ..layers import offset_rates, sampling_layers
from .scope import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["OptimWrapperConstructor"]

# What MMEngine's constructor does with keys of paramwise_cfg where it does not know a layer.
_UNAPPLIED = "is not applied to it"
_REACHES = "reaches its bias, which it leaves out in mmcv's layers"
_DIFFERS = {
    "dcn_offset_lr_mult": _UNAPPLIED,
    "bias_lr_mult": _REACHES,
    "bias_decay_mult": _REACHES,
    "flat_decay_mult": _REACHES,
}


class OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor of optimizers, which knows this package's layers as it does mmcv's.

    `lr = base_lr * dcn_offset_lr_mult` for every `conv_offset` (and R-FCN's fields of offsets; times what a layer of
    another kind declares as usual), whose biases `bias_lr_mult`, `bias_decay_mult` and `flat_decay_mult` leave out, as
    they do in mmcv's layers.
    `lr = base_lr * roi_offset_lr_mult` for the fully connected branches of RoI pooling; without that key they are
    trained like other layers, as mmcv's are. `dcn_plugin.layers.offset_parameters` lists both kinds. Everything else is
    MMEngine's, `custom_keys` before all other rules.

    Args:
        optim_wrapper_cfg: as in MMEngine's `DefaultOptimWrapperConstructor`.
        paramwise_cfg: likewise; one key more, `roi_offset_lr_mult`.

    Raises:
        TypeError: a multiplier for offsets is no number.
        ValueError: it is negative, or there is no `lr` to multiply.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor="dcn_plugin.OptimWrapperConstructor",
        ...     optimizer=dict(type="SGD", lr=0.02, weight_decay=1e-4),
        ...     paramwise_cfg=dict(dcn_offset_lr_mult=0.1, bias_decay_mult=0.0, roi_offset_lr_mult=0.01),
        ... )
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        for key in ("dcn_offset_lr_mult", "roi_offset_lr_mult"):
            value = self.paramwise_cfg.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{key}: expected a number, got {value!r}")
            if not value >= 0:
                raise ValueError(f"{key}: expected a number of at least 0, got {value!r}")
            if self.base_lr is None:
                raise ValueError(f"{key}: expected an optimizer with a learning rate to multiply, got one without lr")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of `model`."""
        parameters = dict(model.named_parameters())
        self._rates = {id(parameters[name]): rate for name, rate in offset_rates(model).items()}
        return super().__call__(model)

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: int | float | None = None
    ) -> None:
        """Add the parameters of `module` and of all inside it to the groups `params`, as MMEngine's method does."""
        own = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
        # MMEngine asks only whether this is true: it keeps biases out of the rules for biases.
        exempt = any(key in self._rates and self._rates[key].option == "offset_lr_mult" for key in own)
        start = len(params)
        super().add_params(params, module, prefix, is_dcn_module or exempt)
        for group in params[start:]:
            key = id(group["params"][0])
            if key not in own or key not in self._rates:
                continue  # those of a module inside, which have been here, and those that predict no offsets
            name = f"{prefix}.{own[key]}"
            given = (self.paramwise_cfg.get(f"{kind}_offset_lr_mult") for kind in ("dcn", "roi"))
            factor = self._rates[key].factor(*given)
            if factor is None or _custom(self.paramwise_cfg, name):
                continue
            if group.get("lr") != self.base_lr * factor:  # MMEngine does so itself for convolutions of that name
                group["lr"] = self.base_lr * factor
                print_log(f"paramwise_options -- {name}:lr={group['lr']}", logger="current")


def _custom(paramwise: dict[str, Any], name: str) -> bool:
    return any(key in name for key in paramwise.get("custom_keys", {}))


def warn_of_other_rates(constructor: Any, model: nn.Module) -> None:
    """Log what a constructor that does not know this package's layers does to their offsets, if it matters."""
    paramwise = constructor.paramwise_cfg
    # Layer by layer, because mmcv's own have a conv_offset, too.
    names = {
        name: rate.option
        for prefix, layer in sampling_layers(model).items()
        for key, rate in offset_rates(layer).items()
        if not _custom(paramwise, name := f"{prefix}.{key}" if prefix else f".{key}")
    }
    convolutions = [name for name, option in names.items() if option == "offset_lr_mult"]
    regions = [name for name, option in names.items() if option == "roi_offset_lr_mult"]
    said = {key: (words, convolutions) for key, words in _DIFFERS.items()}
    said["roi_offset_lr_mult"] = _UNAPPLIED, regions
    for key, (words, affected) in said.items():
        # One with rules of its own, such as layer decay, treats biases alike everywhere.
        own_rules = type(constructor).add_params is not DefaultOptimWrapperConstructor.add_params
        if paramwise.get(key) is None or not affected or (words == _REACHES and own_rules):
            continue
        print_log(
            f"{type(constructor).__name__} does not know the layers of dcn_plugin: paramwise_cfg's {key} {words} "
            f"({affected[0]} and {len(affected) - 1} more). Use "
            'optim_wrapper=dict(constructor="dcn_plugin.OptimWrapperConstructor", ...), or custom_keys',
            logger="current",
            level=logging.WARNING,
        )


OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=OptimWrapperConstructor)
