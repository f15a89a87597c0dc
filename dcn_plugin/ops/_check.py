"""Argument checks that operators share: an exception names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def integers(value: object, name: str, lengths: tuple[int, ...], least: int) -> list[int]:
    """Return ``value`` (an int, or a sequence of one of ``lengths`` ints) as a list; an int is repeated."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        value = [value] * lengths[0]
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 and 1 not in lengths:
        value = [value[0]] * lengths[0]
    wanted = "an int or " + " or ".join(f"{n} ints" for n in lengths)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in lengths:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected {wanted}, got {value!r}")
        if item < least:
            raise ValueError(f"{name}: expected values >= {least}, got {value!r}")
    return list(value)


def tensor(value: object, name: str, dim: int, shape: str) -> None:
    """Check that ``value`` is a floating-point tensor of ``dim`` dimensions; ``shape`` is how to say it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dim() != dim:
        raise ValueError(f"{name}: expected a {dim}-D tensor {shape}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {value.dtype}")


def same_device(value: Tensor, name: str, input: Tensor) -> None:
    if value.device != input.device:
        raise ValueError(f"{name}: expected to be on {input.device} like input, got {value.device}")


def same_dtype(value: Tensor, name: str, input: Tensor, or_float32: bool = False) -> None:
    """Check the type of ``value`` against the input's; under autocast types are brought together later."""
    if value.dtype == input.dtype or (or_float32 and value.dtype == torch.float32 and input.dtype != torch.float64):
        return
    if input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type):
        return
    also = " or torch.float32" if or_float32 and input.dtype not in (torch.float32, torch.float64) else ""
    raise TypeError(f"{name}: expected {input.dtype}{also} beside an input of {input.dtype}, got {value.dtype}")
