"""How the layers look at their arguments: an exception names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._check import integers, require_dense
from ..ops._transforms import unrecorded

Size = int | tuple[int, int]

MASK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "2*sigmoid": lambda raw: 2 * raw.sigmoid(),
    "sigmoid": torch.sigmoid,
}


def activation(value: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that `mask_activation` names."""
    if not isinstance(value, str) or value not in MASK_ACTIVATIONS:
        raise ValueError(f"mask_activation: expected {' or '.join(map(repr, MASK_ACTIVATIONS))}, got {value!r}")
    return MASK_ACTIVATIONS[value]


def mask_note(mask_activation: str) -> str:
    """Say what a layer's masks have to be for weights of earlier implementations, where they are something else."""
    if mask_activation != "2*sigmoid":
        return ""
    return (
        "weights in this layout were trained with mask_activation='sigmoid', but this model has '2*sigmoid': "
        "build it with mask_activation='sigmoid' to get the outputs they were trained for"
    )


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return an integer (repeated) or two as a pair."""
    first, second = integers(name, value, least)
    return first, second


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {divisor_name}, got {value} and {divisor}")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def floating(name: str, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or None, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a real floating-point dtype, got {dtype}")


def factory_arguments(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return what torch's constructors of parameters take."""
    floating("dtype", dtype)
    return dict(device=device, dtype=dtype)


@unrecorded
def check_input(x: Tensor, channels: int, parameter: Tensor | None = None) -> Tensor:
    """Return `x` if it is an image with so many channels, where `parameter` is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a tensor [N, {channels}, H, W], got {type(x).__name__}")
    require_dense("input", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"input: expected [N, {channels}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"input: expected a real floating-point tensor, got {x.dtype}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"input: expected to be on {parameter.device} like the layer's parameters, got {x.device}")
    return x


def describe(module: nn.Module, names: Sequence[str]) -> str:
    """Return attributes as `extra_repr` shows them."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
