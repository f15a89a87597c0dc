"""Function transforms that a compiled operator cannot follow, and values that Python may look at in spite of them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode


def need_plain_torch() -> bool:
    """Whether forward-mode differentiation or ``torch.func.grad`` and its kin are at work.

    The operators then run as their reference, which every transform differentiates: right, at the reference's speed.
    The compiled operator would drop tangents silently.
    """
    # torch.compile follows the level while it traces torch.func.jvp; the stack it only knows as a constant.
    return forward_ad._current_level >= 0 or _differentiates()


@torch.compiler.assume_constant_result
def _differentiates() -> bool:
    """Whether ``torch.func`` takes derivatives here; traced once, which holds: torch.compile guards the transforms."""
    transforms = get_interpreter_stack()
    return transforms is not None and any(t.key() in (TransformType.Grad, TransformType.Jvp) for t in transforms)


def look_at(t: Tensor, look: Callable[[Tensor], None]) -> None:
    """Call ``look`` with the values of ``t``, unless they are not there to be seen, or looking would leave a trace.

    That is while a graph is made, and for subclasses of a tensor. Beneath ``torch.func`` transforms the samples of
    ``vmap`` come as leading dimensions.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return
    transforms = get_interpreter_stack() or ()  # None without any
    if not transforms and _get_current_dispatch_mode() is None:
        if type(t) in _PLAIN:
            look(t)
        return
    if any(transform.key() == TransformType.Functionalize for transform in transforms):
        return
    while _functorch.is_functorch_wrapped_tensor(t):
        samples = _functorch.maybe_get_bdim(t) if _functorch.is_batchedtensor(t) else None
        t = _functorch.get_unwrapped(t)
        t = t if samples is None else t.movedim(samples, 0)
    if type(t) in _PLAIN:
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            look(t)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
