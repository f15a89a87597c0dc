"""Function transforms that a compiled operator cannot follow."""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def need_plain_torch() -> bool:
    """Whether forward-mode differentiation or ``torch.func.grad`` and its kin are at work.

    The operators then run as their reference, which every transform differentiates: right, at the reference's speed.
    The compiled operator would drop tangents silently.
    """
    if forward_ad._current_level >= 0:  # also while torch.compile traces torch.func.jvp
        return True
    if torch.compiler.is_compiling():
        return False
    transforms = get_interpreter_stack()
    return transforms is not None and any(t.key() in (TransformType.Grad, TransformType.Jvp) for t in transforms)


def values_are_known(t: torch.Tensor) -> bool:
    """Whether Python may look at the values of ``t``: not while tracing, nor inside ``torch.func`` transforms."""
    if torch.compiler.is_compiling() or get_interpreter_stack() is not None:
        return False
    return (
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
    )
