"""torchvision's own operators on our kernels, for code that cannot be edited: `accelerate()`.

Graphs go on holding torchvision's operators, and which kernels these run is looked up in each call. So what was
imported, built, compiled, exported or saved before is served too, and what is made meanwhile runs anywhere.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torchvision
import torchvision.extension
from torch import Tensor

from .. import reference
from .._version import __version__
from ..ops._check import MOST_OF_REGION
from ..ops._operator import ORDERED, WANTED
from ..ops._transforms import need_plain_torch
from ..ops.deform_conv2d import _out_shape as _conv_shape
from ..ops.roi_pool import _check_values as _check_regions
from ..ops.roi_pool import _shape_of_deform_roi_pool as _roi_shape

__all__ = ["OPERATORS", "Accelerated", "accelerate", "installed", "uninstall"]

logger = logging.getLogger("dcn_plugin")

# What the dispatcher calls: its keys, then the arguments.
Kernel = Callable[..., Any]
# Makes our kernel from the one that was there, which goes on doing whatever ours does not take, errors included.
Replacement = Callable[[Kernel], Kernel]


# deform_conv2d. torchvision's arguments: input, weight, offset, mask, bias, then numbers (stride, padding and dilation,
# each y and x, groups, offset groups), then whether the mask is one.


def _as_conv(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *options: Any
) -> dict[str, Any] | None:
    """Return the arguments by our names; None where they are no call of ours, and torchvision says what is wrong."""
    *pairs, groups, offset_groups, use_mask = options
    stride, padding, dilation = (list(pairs[i : i + 2]) for i in (0, 2, 4))
    given = dict(
        input=input, offset=offset, weight=weight, bias=bias, mask=mask if use_mask else None,
        stride=stride, padding=padding * 2, dilation=dilation,
    )  # fmt: skip
    try:
        _conv_shape(**given)
    except (TypeError, ValueError):
        return None
    _, group_channels, kh, kw = weight.shape
    fits = group_channels * groups == input.shape[1] and 2 * offset_groups * kh * kw == offset.shape[1]
    return given if fits and mask.shape[:1] == input.shape[:1] else None


def _conv(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        if (given := _as_conv(*args)) is None:
            return theirs(keys, *args)
        # Compiled graphs expect torchvision's layout, which is contiguous whatever the input's.
        return torch.ops.dcn_plugin.deform_conv2d(**given).contiguous()

    return kernel


def _conv_gradients(grad: Tensor, mask: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the gradients in torchvision's order: of input, weight, offset, mask, bias."""
    names = ("input", "offset", "weight", "mask")
    wanted = sum(WANTED[n] for n in names if given[n] is not None)
    if torch.are_deterministic_algorithms_enabled():
        wanted |= ORDERED
    options = [given[n] for n in ("stride", "padding", "dilation")]
    found = torch.ops.dcn_plugin.deform_conv2d_backward(grad, *(given[n] for n in names), *options, wanted)
    input, offset, weight, of_mask = (t.contiguous() for t in found)
    return input, weight, offset, torch.zeros_like(mask) if given["mask"] is None else of_mask, grad.sum((0, 2, 3))


def _conv_backward(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        given = _as_conv(*args)
        if given is None or grad.dtype != args[0].dtype or list(grad.shape) != _conv_shape(**given):
            return theirs(keys, grad, *args)
        return _conv_gradients(grad, args[3], given)

    return kernel


def _conv_autograd(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        # torchvision's formula for reverse mode calls its backward operator, which is ours; it has none for forward
        # mode and for torch.func, where the definition is differentiated instead.
        if need_plain_torch() and (given := _as_conv(*args)) is not None:
            return reference.deform_conv2d(**given)
        return theirs(keys, *args)

    return kernel


def _conv_backward_autograd(theirs: Kernel) -> Kernel:
    own = _conv_backward(theirs)

    def kernel(keys: Any, *args: Any) -> tuple[Tensor, ...]:
        # With create_graph=True, our backward operator's own gradients are recorded.
        return own(keys, *args) if torch.is_grad_enabled() else theirs(keys, *args)

    return kernel


def _conv_autocast(_: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        half = torch.get_autocast_dtype("cpu")
        # Positions stay float32: half precision rounds them to whole pixels.
        types = (half, half, torch.float32, torch.float32, half)
        cast = (t if t.dtype == torch.float64 else t.to(to) for t, to in zip(args, types, strict=False))
        with torch.amp.autocast("cpu", enabled=False):
            return torch.ops.torchvision.deform_conv2d(*cast, *args[len(types) :])

    return kernel


# roi_align. torchvision's arguments: input, rois, scale, bins (y, x), samples, aligned; those of its backward: grad,
# rois, scale, bins (y, x), sizes of the input (N, C, H, W), samples, aligned.


def _as_pooling(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int, aligned: bool
) -> dict[str, Any] | None:
    """Return the arguments by our names; None where they are no call of ours, and torchvision says what is wrong."""
    given: dict[str, Any] = dict(
        input=input, rois=rois, offset=None, mask=None, output_size=[height, width], spatial_scale=scale,
        sampling_ratio=max(samples, 0), gamma=0.0, aligned=aligned,
    )  # fmt: skip
    try:
        _roi_shape(**given)
    except (TypeError, ValueError):
        return None
    fits = input.dtype == rois.dtype and scale > 0 and math.isfinite(scale)
    return given if fits and min(height, width) > 0 and max(height, width, samples) <= MOST_OF_REGION else None


def _pool(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        if (given := _as_pooling(*args)) is None:
            return theirs(keys, *args)
        _check_regions(given["rois"], given["input"])
        return torch.ops.dcn_plugin.deform_roi_pool(**given).contiguous()

    return kernel


def _pool_backward(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, grad: Tensor, rois: Tensor, *options: Any) -> Tensor:
        scale, height, width, *sizes, samples, aligned = options
        # Only sizes and type of the input matter to its gradient.
        given = _as_pooling(grad.new_empty(sizes), rois, scale, height, width, samples, aligned)
        if given is None or list(grad.shape) != _roi_shape(**given):
            return theirs(keys, grad, rois, *options)
        ordered = ORDERED * torch.are_deterministic_algorithms_enabled()
        found = torch.ops.dcn_plugin.deform_roi_pool_backward(grad, *given.values(), WANTED["input"] | ordered)
        return found[0].contiguous()

    return kernel


def _pool_autograd(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        if need_plain_torch() and (given := _as_pooling(*args)) is not None:
            return reference.deform_roi_pool(**given)
        return theirs(keys, *args)

    return kernel


class _PoolGradient(torch.autograd.Function):
    """The gradient of pooling, which is linear: its own gradient is pooling again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, rois: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.options = options
        return torch.ops.torchvision._roi_align_backward(grad, rois, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, height, width, *_, samples, aligned = ctx.options
        (rois,) = ctx.saved_tensors
        again = torch.ops.torchvision.roi_align(grads[0], rois, scale, height, width, samples, aligned)
        return again, None, *(None for _ in ctx.options)


def _pool_backward_autograd(theirs: Kernel) -> Kernel:
    def kernel(keys: Any, *args: Any) -> Tensor:
        # Inside of the function, gradients are off.
        return _PoolGradient.apply(*args) if torch.is_grad_enabled() else theirs(keys, *args)

    return kernel


_REPLACEMENTS: dict[str, dict[tuple[str, str], Replacement]] = {
    "deform_conv2d": {
        ("deform_conv2d", "CPU"): _conv,
        ("deform_conv2d", "AutogradCPU"): _conv_autograd,
        ("deform_conv2d", "AutocastCPU"): _conv_autocast,
        ("_deform_conv2d_backward", "CPU"): _conv_backward,
        ("_deform_conv2d_backward", "AutogradCPU"): _conv_backward_autograd,
    },
    "roi_align": {
        ("roi_align", "CPU"): _pool,
        ("roi_align", "AutogradCPU"): _pool_autograd,
        ("_roi_align_backward", "CPU"): _pool_backward,
        ("_roi_align_backward", "AutogradCPU"): _pool_backward_autograd,
    },
}
OPERATORS = tuple(_REPLACEMENTS)
"""Names of torchvision's operators that can be served."""

_lock = threading.RLock()
# Operator -> our kernels in the dispatcher, and who asked for them.
_libraries: dict[str, torch.library.Library] = {}
_askers: dict[str, list[Accelerated]] = {name: [] for name in OPERATORS}


class Accelerated:
    """What a call of `accelerate` put in place, and the way back: `undo()`, or the end of a `with` block.

    Printed, it says in one line what runs on what.

    Args:
        operators: names from `OPERATORS`.
    """

    def __init__(self, operators: Sequence[str]) -> None:
        self.operators = tuple(operators)

    def undo(self) -> None:
        """Withdraw this request. An operator that nobody asks for any more is torchvision's again. Twice is once."""
        with _lock:
            for name in self.operators:
                if self in _askers[name]:
                    _askers[name].remove(self)
                    if not _askers[name]:
                        _libraries.pop(name)._destroy()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = " and ".join(self.operators)
        return f"torchvision {torchvision.__version__}: {names} on the CPU by the kernels of dcn_plugin {__version__}"


def accelerate(operators: Sequence[str] = OPERATORS) -> Accelerated:
    """Serve torchvision's own operators with our kernels, wherever they are called from, until it is undone.

    They are served through torch's dispatcher: functions imported and modules built before, `torch.compile`,
    `torch.export` and AOTInductor's packages, traced and scripted modules. On the CPU; elsewhere nothing changes.

    What becomes ours: the kernels of forward and backward; second gradients, forward mode and `torch.func`; for
    `deform_conv2d` also bfloat16, autocast (the result has its type, positions stay float32) and float32 offsets and
    masks beside half-precision values. What stays torchvision's: its Python functions, modules and checks, the
    operators in graphs, shapes and types while tracing, the contiguous layout of results, autocast of `roi_align`,
    `torch.vmap` (sample by sample). A call that ours does not take goes to torchvision's kernel, with its errors.

    Numbers agree to rounding, but for

    - the derivative at exactly y = -1 or x = -1, where a sample is 0: it is 0, in torchvision that of the piece inside;
    - infinite offsets, whose gradients are 0, in torchvision NaN; NaN offsets, which give NaN in all they touch;
    - NaN or infinite pixels that a sample touches with weight 0: not read, in torchvision NaN;
    - float16: positions and sums are float32 within a call, in torchvision float16;
    - regions of `roi_align` that are not finite or name no image: ValueError; torchvision reads outside of the map.

    Args:
        operators: names from `OPERATORS`.

    Returns:
        What was put in place; `undo()` or leaving a `with` block withdraws it. An operator is served until each call
        that asked for it was withdrawn, in any order, or `uninstall()` was called. Switch while no other thread is
        inside of an operator: torch does not lock its tables against calls. A process that is started afresh has to
        ask again; one that is forked need not.

    Raises:
        TypeError: `operators` are not names.
        ValueError: no name, or an unknown one.
        RuntimeError: torchvision has not loaded its compiled operators.

    Example:
        >>> import torch, torchvision
        >>> from dcn_plugin.integrations.torchvision import accelerate
        >>> layer, image = torchvision.ops.DeformConv2d(4, 8, 3, padding=1), torch.randn(1, 4, 8, 8)
        >>> with accelerate():
        ...     out = layer(image, torch.zeros(1, 18, 8, 8))
    """
    if not isinstance(operators, (list, tuple)) or not all(isinstance(name, str) for name in operators):
        raise TypeError(f"operators: expected a sequence of names, got {operators!r}")
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown or not operators:
        raise ValueError(f"operators: expected names among {', '.join(OPERATORS)}, got {list(operators)}")
    if not torchvision.extension._has_ops():
        raise RuntimeError(
            f"torchvision: expected its compiled operators, got torchvision {torchvision.__version__} that could not "
            f"load them beside torch {torch.__version__}"
        )
    asked = Accelerated(list(dict.fromkeys(operators)))
    with _lock, ExitStack() as undone:
        undone.callback(asked.undo)
        for name in asked.operators:
            if name not in _libraries:
                _libraries[name] = _put_in_place(_REPLACEMENTS[name])
            _askers[name].append(asked)
        undone.pop_all()
    logger.info(asked)
    return asked


def _put_in_place(replacements: dict[tuple[str, str], Replacement]) -> torch.library.Library:
    library = torch.library.Library("torchvision", "IMPL")
    with ExitStack() as undone, warnings.catch_warnings():
        undone.callback(library._destroy)
        before = {place: torch.library.get_kernel(f"torchvision::{place[0]}", place[1]) for place in replacements}
        # Older torch says once for all operators that one is overridden, which is what was asked for.
        warnings.filterwarnings("ignore", r"\s*Warning only once for all operators")
        for (name, key), replacement in replacements.items():
            library.impl(name, replacement(before[name, key].call_boxed), key, with_keyset=True)
        undone.pop_all()
    return library


def installed() -> tuple[str, ...]:
    """Return the names of the operators that are served now.

    Example:
        >>> from dcn_plugin.integrations.torchvision import installed
        >>> installed()
        ()
    """
    return tuple(_libraries)


def uninstall() -> None:
    """Give every operator back to torchvision, whoever asked for ours.

    Example:
        >>> from dcn_plugin.integrations.torchvision import uninstall
        >>> uninstall()
    """
    with _lock:
        for askers in _askers.values():
            for asked in list(askers):
                asked.undo()
