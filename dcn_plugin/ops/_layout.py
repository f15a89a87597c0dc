"""Memory layout of results, for tracing: the same rules as `csrc/runtime/tensor.h`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._transforms import unrecorded


@unrecorded
def is_channels_last(t: Tensor) -> bool:
    """Whether a result computed from `t` is channels_last: torch's own rule (`suggest_memory_format`)."""
    if t.dim() != 4 or t.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if t.size(d) == 0 or t.stride(d) < least:
            return False
        if d == 0 and least == t.stride(1):
            return False
        least = t.stride(d) * (t.size(d) if t.size(d) > 1 else 1)
    return True


def new_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of type, device and layout of `like`."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def new_contiguous(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised, contiguous tensor of type and device of `like`, which is no image."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
