"""How the layers look at their arguments: an exception names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._check import integers, number, require_dense, same_dtype
from ..ops._transforms import unrecorded
from .samples import Window

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


def mask_note(trained: str, mask_activation: str) -> str:
    """Say with which masks weights of a former layout were trained, where a layer has others."""
    if mask_activation == trained:
        return ""
    return (
        f"weights in this layout were trained with mask_activation={trained!r}, but this model has "
        f"{mask_activation!r}: build it with mask_activation={trained!r} to get the outputs they were trained for"
    )


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return an integer (repeated) or two as a pair."""
    first, second = integers(name, value, least)
    return first, second


def one_name(name: str, value: int, default: int, **others: int | None) -> int:
    """Return the argument `name`, or what was given for it under one of the `others` that implementations call it."""
    given = {other: number for other, number in others.items() if number is not None}
    if not given:
        return value
    if len(given) > 1 or value != default:
        got = ", ".join(f"{key}={number}" for key, number in {name: value, **given}.items())
        raise TypeError(f"{name}: expected it under one of its names, got {got}")
    return next(iter(given.values()))


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {divisor_name}, got {value} and {divisor}")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def rate(name: str, value: Any) -> float:
    """Return a share of a whole, such as a rate of dropout."""
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name}: expected a part from 0 to 1, got {value}")
    return float(value)


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
def check_input(x: Tensor, channels: int, parameter: Tensor | None = None, name: str = "input") -> Tensor:
    """Return `x` if it is an image with so many channels, where `parameter` is; `name` is the argument's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, {channels}, H, W], got {type(x).__name__}")
    require_dense(name, x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name}: expected [N, {channels}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {x.dtype}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"{name}: expected to be on {parameter.device} like the layer's parameters, got {x.device}")
    return x


@unrecorded
def check_sides(x: Tensor, axis: int, least: int, name: str = "input") -> Tensor:
    """Return `x` if it has so many pixels at least along this axis and the next, its height and width."""
    height, width = x.shape[axis], x.shape[axis + 1]
    if height < least or width < least:
        raise ValueError(f"{name}: expected at least {least} x {least} pixels, got {height} x {width}")
    return x


@unrecorded
def check_feature(feature: Any, channels: int, parameter: Tensor | None, x: Tensor, name: str = "feature") -> Tensor:
    """Return `feature` if it is a map of so many channels, of the input's type, that offsets can be predicted from."""
    if feature is None:
        raise ValueError(f"{name}: expected a map [N, {channels}, H, W] that offsets are predicted from, got None")
    check_input(feature, channels, parameter, name)
    same_dtype(feature, name, x)
    return feature


@unrecorded
def check_predicted(
    raw: Any, channels: int, x: Tensor, window: Window, feature: Tensor | None, name: str = "feature"
) -> Tensor:
    """Return what `conv_offset` predicted, if it has so many channels, for each position of the layer's output."""
    if not isinstance(raw, Tensor):
        raise TypeError(f"conv_offset: expected a module that returns a tensor, got {type(raw).__name__} from it")
    if raw.dim() != 4 or raw.shape[1] != channels:
        raise ValueError(
            f"conv_offset: expected a module that returns [N, {channels}, H', W'], got {list(raw.shape)} from it"
        )
    size = window.output_size(x.shape[2], x.shape[3])
    if (raw.shape[0], *raw.shape[2:]) == (x.shape[0], *size):
        return raw
    wanted, given = [x.shape[0], channels, *size], list(raw.shape)
    if feature is None:
        raise ValueError(f"conv_offset: expected a module that returns {wanted} for this input, got {given} from it")
    raise ValueError(
        f"{name}: expected a map that offsets {wanted} follow from, as the input is {list(x.shape)}, got "
        f"{list(feature.shape)}, which {given} follow from"
    )


def describe(module: nn.Module, names: Sequence[str]) -> str:
    """Return attributes as `extra_repr` shows them."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
