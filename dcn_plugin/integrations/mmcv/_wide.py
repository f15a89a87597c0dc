"""In which type to compute: mmcv's kernels sum half precision in half, which nobody has to repeat."""

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def wide(value: Tensor) -> Tensor:
    """Return `value`, in float32 if it is float16 or bfloat16."""
    return value.float() if value.dtype in HALVES else value


def plain(device: torch.device) -> torch.amp.autocast:
    """Without autocast: mmcv has brought the types together already, and allocated the result in them."""
    return torch.amp.autocast(device.type, enabled=False)
