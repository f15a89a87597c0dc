"""Which precision torch's switches grant convolutions of float32 on CUDA: what the kernels ask in every call."""

import torch

_lib = torch.library.Library("dcn_plugin", "FRAGMENT")
_lib.define("_convolutions_use_tf32() -> bool")


@torch.library.impl(_lib, "_convolutions_use_tf32", "CompositeExplicitAutograd")
def convolutions_use_tf32() -> bool:
    """Whether `conv2d` may multiply float32 in TF32: cuDNN is on, and its switch for convolutions allows it.

    `torch.backends.cudnn.conv.fp32_precision` is what that switch comes to, whichever was set: itself,
    `torch.backends.cudnn.fp32_precision`, `torch.backends.fp32_precision` or `torch.backends.cudnn.allow_tf32`.
    """
    return torch.backends.cudnn.enabled and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
