"""transformers' detectors and segmenters on our `ms_deform_attn`: `accelerate(model)`, or `accelerate()` for all.

Each of their attention modules adds `reference + offset / size` and samples in plain torch. The whole `forward` is
replaced, so that positions are made inside the operator: in float32, and without a pass over memory for each step.

A text of theirs that ours was written from is known by its digest. A version that changes one is said by name and keeps
its own code; nothing of it is guessed.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import transformers
from torch import nn

from ..._version import __version__
from ._modules import MultiScaleDeformableAttention
from ._places import Place, Served, everywhere, found_in, places_in

__all__ = ["Accelerated", "MultiScaleDeformableAttention", "accelerate", "hub_kernels", "installed", "uninstall"]

logger = logging.getLogger("dcn_plugin")


class Accelerated:
    """What a call of `accelerate` put in place, and the way back: `undo()`, or the end of a `with` block.

    Printed, it says in one line what runs on what.

    Args:
        places: what was set.
        replaced: its names, and how many of each: of the model's modules, or of the classes of each family.
        unknown: names of classes that sample several maps by code that is not known, and go on doing so.
    """

    def __init__(self, places: Sequence[Place], replaced: Mapping[str, int], unknown: Sequence[str]) -> None:
        self._places = list(places)
        self.replaced = dict(replaced)
        self.unknown = tuple(unknown)

    def undo(self) -> None:
        """Give back what this call replaced. Twice is once. What was set over it since stays, with a warning."""
        while self._places:
            place = self._places.pop()
            if place.now() is place.after:
                setattr(place.owner, place.name, place.before)
            elif place.now() is not place.before:
                kind = place.owner if isinstance(place.owner, type) else place.before
                warnings.warn(
                    f"undo: expected {kind.__name__} as `accelerate` left it, got one that was changed since; it stays",
                    stacklevel=2,
                )
        if self in _everywhere:
            _everywhere.remove(self)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.replaced.items()) or "nothing that was not yet"
        unknown = f"; not known: {', '.join(self.unknown)}" if self.unknown else ""
        return (
            f"transformers {transformers.__version__}: {counts} on ms_deform_attn of dcn_plugin {__version__}{unknown}"
        )


_everywhere: list[Accelerated] = []


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def accelerate(model: nn.Module | None = None) -> Accelerated:
    """Put `ms_deform_attn` into the deformable attention of a model of transformers, or of all, until it is undone.

    With a model, its modules alone are served; other models are not touched. Without, all models are that this process
    has or makes, for as long as it is not undone. Files imported by others need no change either way.

    Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, Grounding DINO, MM Grounding DINO, OmDet-Turbo, LW-DETR,
    RF-DETR, PP-DocLayout v2 to v4, Mask2Former and OneFormer. State dicts, `save_pretrained`, copies, pickles,
    `torch.compile` and names and types of modules stay as they were; copies and pickles of a model served are served.

    Numbers agree to rounding, the attention weights that models return included, but for

    - half precision: positions are float32, where transformers adds offsets to references in half precision. In the
      encoders of Deformable DETR, Grounding DINO, Mask2Former and OneFormer the references are float32, too. Boxes that
      a half-precision decoder predicts are half as they come;
    - NaN positions, which give NaN.

    A class that samples several maps by a code that is not known, of a user or of another version of transformers,
    keeps it: a warning names it. `use_kernels=True` has no effect on modules that are served.

    Args:
        model: a model or part of it; wrapped ones are looked into. None: everywhere.

    Returns:
        What was put in place; `undo()` or leaving a `with` block withdraws it. What was served already is not replaced
        again, and stays until the call that replaced it is undone. A process that is started afresh has to ask again.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in it samples several maps, or nothing that is known.

    Example:
        >>> from dcn_plugin.integrations.transformers import accelerate
        >>> from transformers import RTDetrV2Config, RTDetrV2Model
        >>> with accelerate() as served:
        ...     served.replaced["rt_detr_v2"]
        1
    """
    if model is None:
        found, unknown = everywhere()
        places = [place for own in found.values() for place in own]
        asked = Accelerated(places, {family: len(own) for family, own in found.items()}, unknown)
        _everywhere.append(asked)
    else:
        serve, unknown = found_in(_module(model))
        if not serve and not installed(model):
            has = f", whose {', '.join(unknown)} is not known" if unknown else " without it"
            raise ValueError(
                f"model: expected multi-scale deformable attention of transformers, got {type(model).__name__}{has}"
            )
        places = list(places_in(model, serve))
        asked = Accelerated(places, Counter(type(module).__name__ for module in serve), unknown)
    for place in places:
        setattr(place.owner, place.name, place.after)
    if unknown:
        warnings.warn(
            f"accelerate: expected the deformable attention of transformers, got {', '.join(unknown)}, which keeps "
            f"its own code (transformers {transformers.__version__}; 5.23 is known)",
            stacklevel=2,
        )
    logger.info(asked)
    return asked


def installed(model: nn.Module | None = None) -> dict[str, int]:
    """Return the names of the classes that are served in a model, or everywhere, and how many there are.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> from dcn_plugin.integrations.transformers import installed
        >>> installed()
        {}
    """
    if model is None:
        return dict(Counter(place.owner.__name__ for asked in _everywhere for place in asked._places))
    return dict(Counter(type(module).__name__ for module in _module(model).modules() if isinstance(module, Served)))


def uninstall(model: nn.Module | None = None) -> None:
    """Give a model back to transformers, be it a copy of one that was served; or withdraw all calls without a model.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> from dcn_plugin.integrations.transformers import uninstall
        >>> uninstall()
    """
    if model is None:
        for asked in reversed(_everywhere.copy()):
            asked.undo()
    else:
        for module in _module(model).modules():
            kind: Any = type(module)
            if kind.__bases__[0] is Served:
                module.__class__ = kind._made_of[0]


# Layers for the `kernels` package.


class _Repository(NamedTuple):
    """Ours among the repositories of `kernels`; nothing is fetched."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __str__(self) -> str:
        return f"`dcn_plugin` (layer `{self.layer_name}`)"


def hub_kernels() -> dict[str, dict[str, Any]]:
    """Return the mapping that `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping` take.

    It serves the sampler alone, where a model is asked for kernels; `accelerate` serves more, without `kernels`. On the
    CPU, transformers has no kernel of its own, and `use_kernels=True` takes this one once it is registered. On CUDA
    transformers registers its own anew in each such call: there, call `kernels.kernelize` with this mapping in use.

    Example:
        >>> from dcn_plugin.integrations.transformers import hub_kernels
        >>> sorted(hub_kernels()["MultiScaleDeformableAttention"])
        ['cpu', 'cuda']
    """
    name = MultiScaleDeformableAttention.__name__
    return {name: {device: _Repository(name) for device in ("cpu", "cuda")}}
