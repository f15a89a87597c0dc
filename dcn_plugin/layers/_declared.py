"""What a module declares to predict its offsets with: found by name, also where it is pruned or parametrised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ._start import StartsAtZero

Branch = nn.Module | nn.Parameter

# What pruning and spectral norm, then weight norm, keep beside a tensor that they compute in every call.
_ORIGINALS = ("_orig", "_g", "_v")


def declared(module: nn.Module, otherwise: Mapping[str, float]) -> Mapping[str, float]:
    """Return `offset_branches` of the class of `module`, or `otherwise` where it declares none."""
    names: Any = getattr(type(module), "offset_branches", otherwise)
    if not isinstance(names, Mapping) or not all(
        isinstance(name, str) and isinstance(rate, (int, float)) for name, rate in names.items()
    ):
        raise TypeError(
            f"offset_branches: expected a mapping of names to learning rates in the class {type(module).__name__}, "
            f"got {names!r}"
        )
    return names


def branches(module: nn.Module, names: Mapping[str, float], sure: bool = True) -> Iterator[tuple[str, Branch]]:
    """Yield name and value of each of `names` that `module` has; one that is None is left out.

    A parameter that something computes comes as what it is computed from. Where the class of `module` is `sure` of its
    names, one that it has not got at all is an error.
    """
    for name in names:
        found = _found(module, name)
        yield from ((name, value) for value in found)
        if not found and sure and not hasattr(module, name):
            here = [key for key, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
            raise ValueError(
                f"offset_branches: expected names of submodules or parameters of {type(module).__name__} (None where "
                f"there is none) out of {', '.join(here)}, got {name!r}"
            )


def _found(module: nn.Module, name: str) -> list[Branch]:
    # Not by getattr: a wrapper may answer for what is inside it.
    for held in (module._modules, module._parameters):
        value = held.get(name)
        if value is not None:
            return [value]
    parametrised = module._modules.get("parametrizations")
    if parametrised is not None and name in parametrised._modules:
        return [parametrised.get_submodule(name)]
    if isinstance(vars(module).get(name), Tensor):
        originals = (module._parameters.get(f"{name}{end}") for end in _ORIGINALS)
        return [parameter for parameter in originals if parameter is not None]
    return []


def belongs(tensor: str, names: Mapping[str, float]) -> bool:
    """Tell whether the tensor of this name in a layer's state dict belongs to one of the layer's branches."""
    head = tensor.removeprefix("parametrizations.").partition(".")[0]
    return head in names or any(head.endswith(end) and head.removesuffix(end) in names for end in _ORIGINALS)


def restart(branch: Branch) -> None:
    """Let a branch predict that nothing moves."""
    if isinstance(branch, nn.Parameter):
        zeros = [branch]
    elif isinstance(branch, ParametrizationList):
        zeros = list(branch.parameters(recurse=False))[:1]  # of several, as of weight norm, the first is the length
    else:
        for module in branch.modules():
            if isinstance(module, StartsAtZero):
                module.reset_parameters()
        return
    with torch.no_grad():
        for tensor in zeros:
            tensor.zero_()
