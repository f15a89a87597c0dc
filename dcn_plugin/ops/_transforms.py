"""What looks at a call instead of running it: function transforms, which a compiled operator cannot follow, tracing."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` records this call."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]  # public, but not in its list of names


def unrecorded(function: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.jit.trace` see sizes and values as plain numbers in `function`, and none of what it computes.

    For checks. The tracer would warn of each that it does not become part of the graph, which is what is wanted.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not is_tracing():
            return function(*args, **kwargs)
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return run


@unrecorded
def plain_size(x: Tensor) -> tuple[int, int]:
    """Return height and width, as plain numbers also where `torch.jit.trace` records."""
    return x.shape[2], x.shape[3]


def held(x: Tensor) -> Tensor:
    """Return `x`; in a trace, no other height and width than these pass here, but those of a single pixel.

    For what gives sizes to an operator as plain numbers: of another map, the trace would compute something else.
    """
    return x.expand(-1, -1, *plain_size(x)) if is_tracing() else x


def need_plain_torch() -> bool:
    """Whether forward-mode differentiation or `torch.func.grad` and its kin are at work.

    The operators then run as their reference, which every transform differentiates: right, at the reference's speed.
    The compiled operator would drop tangents silently.
    """
    # torch.compile follows the level while it traces torch.func.jvp; the stack it only knows as a constant.
    return forward_ad._current_level >= 0 or _differentiates()


def _differentiates() -> bool:
    """Whether `torch.func` takes derivatives here; traced once, which holds: torch.compile guards the transforms."""
    transforms = get_interpreter_stack()
    return transforms is not None and any(t.key() in (TransformType.Grad, TransformType.Jvp) for t in transforms)


# What torch.compiler.assume_constant_result does; that itself imports the whole compiler, a second of every start.
_differentiates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def values_are_known(t: Tensor) -> bool:
    """Whether Python may look at the values of `t`: not in a graph, nor inside `torch.func` transforms."""
    if torch.compiler.is_compiling() or is_tracing() or get_interpreter_stack() is not None:
        return False
    return type(t) in _PLAIN and _get_current_dispatch_mode() is None


def has_values(t: Tensor) -> bool:
    """Whether `t` has the same values for all that a transform or a graph stands for; torch.compile may break off."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return False
        t = _functorch.get_unwrapped(t)
    return type(t) in _PLAIN


def look_at(t: Tensor, look: Callable[[Tensor], None]) -> None:
    """Call `look` with the values of `t`, unless they are not there to be seen, or looking would leave a trace.

    That is while a graph is made, and for subclasses of a tensor. Beneath `torch.func` transforms the samples of
    `vmap` come as leading dimensions.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return
    if values_are_known(t):
        look(t)
        return
    if any(transform.key() == TransformType.Functionalize for transform in get_interpreter_stack() or ()):
        return
    while _functorch.is_functorch_wrapped_tensor(t):
        samples = _functorch.maybe_get_bdim(t) if _functorch.is_batchedtensor(t) else None
        t = _functorch.get_unwrapped(t)
        t = t if samples is None else t.movedim(samples, 0)
    if type(t) in _PLAIN:
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            look(t)
