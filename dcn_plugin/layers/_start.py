"""How parameters of ours start, and what keeps frameworks that initialise whatever they find from changing it.

transformers hands every module of a model to the model's `_init_weights`, which draws an `nn.Conv2d` from
N(0, 0.02) whatever it is for. It asks a module for `_is_hf_initialized` before, and sets that attribute afterwards;
tensors that came from a file carry an attribute of the same name. `from_pretrained` builds on the meta device and
gives what the file lacks uninitialised memory, so skipping would not do: something has to write.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._transforms import values_are_known


class OwnStart(nn.Module):
    """A module whose parameters are for itself to initialise."""

    # Of the class, so that modules that were pickled before have them.
    _without_memory = False  # built on the meta device, and nothing written since
    _initialized = False
    _before: dict[str, Tensor] | None = None

    def _note_memory(self) -> None:
        """To be called when all parameters have got their values, or would have if they had memory."""
        self._without_memory = any(parameter.is_meta for parameter in self.parameters(recurse=False))

    def _open(self) -> dict[str, Tensor]:
        """Parameters of its own that did not come from a file and have memory."""
        return {
            name: parameter
            for name, parameter in self.named_parameters(recurse=False)
            if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        }

    @property
    def _is_hf_initialized(self) -> bool:
        if not self._initialized:
            self._before = {name: parameter.detach().clone() for name, parameter in self._open().items()}
        return self._initialized

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        before, self._before = self._before, None
        self._initialized = value
        if not value or before is None:
            return
        changed = {name for name, parameter in self._open().items() if not _equal(parameter, before.get(name))}
        with torch.no_grad():
            self._start_again(before, changed)
        self._note_memory()

    def _start_again(self, before: dict[str, Tensor], changed: set[str]) -> None:
        """Put right what an initialiser of a whole model has left; `before` is what it found, but for files'."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters(recurse=False)):
            self._note_memory()


def _equal(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    # Uninitialised memory may hold NaN.
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


class StartsAtZero(OwnStart):
    """Zero at first and after every reset, but for a bias of its own."""

    bias: Any

    def first_bias(self) -> Tensor | None:
        """Return what the bias starts with; None: zeros."""
        return None

    def reset_parameters(self) -> None:
        with torch.no_grad():
            # Not by torch.nn.init, whose functions frameworks replace while they load.
            for parameter in self.parameters():
                parameter.zero_()
            if (bias := self.first_bias()) is not None:
                self.bias.copy_(bias)
        self._note_memory()

    def _start_again(self, before: dict[str, Tensor], changed: set[str]) -> None:
        bias = self.first_bias()
        for name, parameter in self._open().items():
            if self._without_memory:
                parameter.zero_()
                if name == "bias" and bias is not None:
                    parameter.copy_(bias)
            elif name in changed:
                parameter.copy_(before[name])


class _ZeroConv2d(StartsAtZero, nn.Conv2d):
    pass


class _ZeroLinear(StartsAtZero, nn.Linear):
    pass


# Not directly an nn.Conv2d: MMEngine's initialisers for layer="Conv2d" go by the names of a class and its bases.
class OffsetPredictor(_ZeroConv2d):
    """The convolution that predicts offsets (and masks): an `nn.Conv2d` that is zero at first."""


class ZeroLinear(_ZeroLinear):
    """The last layer of an offset or mask branch: an `nn.Linear` that is zero at first."""


def warn_if_redrawn(layer: nn.Module) -> None:
    """Warn, at the first call of `layer`, where an initialiser has drawn a weight in it that should start at zero.

    Those leave the bias as it was, or put it at zero. Training moves both.
    """
    if torch.compiler.is_compiling() or getattr(layer, "_looked_at_start", False) or hasattr(layer, "_is_replica"):
        return
    # Not what pruning or a parametrisation computes, whose bias may be zero for other reasons.
    found: list[tuple[str, Any]] = [
        (name, module)
        for name, module in layer.named_modules()
        if isinstance(module, StartsAtZero) and isinstance(module.weight, nn.Parameter)
    ]
    if not all(values_are_known(m.weight) and not m.weight.is_meta and not _captures(m.weight) for _, m in found):
        return
    layer._looked_at_start = True  # type: ignore[assignment]
    for name, module in found:
        if isinstance(module.bias, nn.Parameter) and module.weight.any() and _not_moved(module):
            remedy = f"{name}.reset_parameters() after initialising"
            if name.partition(".")[0] in getattr(type(layer), "offset_branches", ()):
                remedy += ", or dcn_plugin.layers.reset_offsets(model) for the offsets of all layers"
            warnings.warn(
                f"{type(layer).__name__}: the weight of {name} is expected to start at zero, but it has been drawn "
                "while the bias has its first value or is zero: initialisers of whole models do so, and the layer then "
                f"does not sample where a fresh one does. If nobody meant to, call {remedy}",
                stacklevel=2,
            )


def _not_moved(module: StartsAtZero) -> bool:
    """Tell whether the bias is zero or what the module starts with."""
    if not module.bias.any():
        return True
    first = module.first_bias()
    return first is not None and torch.equal(module.bias, first.to(module.bias))


def _captures(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
