"""What tensors the operators compute with: dense ones."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def require_dense(name: str, value: object) -> None:
    """Raise unless `value` is dense; what is no tensor is left to other checks.

    Raises:
        TypeError: it is nested, sparse or in oneDNN's layout; the message names it.
    """
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested):
        kind = "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got a {kind}")


def dense_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` refuse tensors that are not dense, by the names of its arguments."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            require_dense(name, value)
        return function(*args, **kwargs)

    return checked
