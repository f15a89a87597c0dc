"""ultralytics' RT-DETR on our `ms_deform_attn`: `accelerate()`.

Its decoder samples by one function of plain PyTorch, in which every `MSDeformAttn` of it ends. Ours takes its place
wherever modules hold it. Nothing of theirs is copied, models and weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops import ms_deform_attn
from ._functions import Accelerated, ServedFunction

__all__ = ["Accelerated", "accelerate", "installed", "uninstall"]


def _attention(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    locations, weights = sampling_locations.flatten(3, -2), attention_weights.flatten(3)
    return ms_deform_attn(value, value_spatial_shapes, locations, weights)


def _examples() -> Iterator[tuple[Any, ...]]:
    """With the points of all levels side by side, as newer versions have them, and with an axis for the levels."""
    shapes, numbers = [[3, 4], [2, 1]], torch.linspace(-1, 2, 96, dtype=torch.float32, device="cpu")
    value, locations, weights = numbers[:84].sin().view(1, 14, 2, 3), numbers.view(1, 3, 2, 8, 2), numbers[:48].cos()
    yield value, shapes, locations, weights.view(1, 3, 2, 8)
    yield value, shapes, locations.unflatten(3, (2, 4)), weights.view(1, 3, 2, 2, 4)


_function = ServedFunction(
    "ultralytics", "nn.modules.utils", "multi_scale_deformable_attn_pytorch", ["nn.modules.transformer"], _attention,
    _examples,
)  # fmt: skip


def accelerate() -> Accelerated:
    """Serve `multi_scale_deformable_attn_pytorch` of ultralytics with our operator, until it is undone.

    Models built before are served, too: the function is looked up in each call. On the CPU and CUDA. `torch.jit.trace`
    and exporters that trace go on recording ultralytics' own function, so their files run without dcn_plugin;
    `torch.compile` and `torch.export` record ours.

    Numbers agree to rounding. A NaN position gives NaN in what it touches; half values are summed up in float32, in
    their own function not. Wrong shapes are a ValueError that names the argument.

    Returns:
        What was put in place; `undo()` or leaving a `with` block withdraws it. The function is served until each call
        that asked for it was withdrawn, or `uninstall()` was called. A process that is started afresh has to ask again.

    Raises:
        RuntimeError: this version of ultralytics has no such function, or one that computes something else.

    Example:
        >>> from dcn_plugin.integrations.ultralytics import accelerate  # doctest: +SKIP
        >>> with accelerate():  # doctest: +SKIP
        ...     results = ultralytics.RTDETR("rtdetr-l.pt")("image.jpg")
    """
    return _function.accelerate()


def installed() -> tuple[str, ...]:
    """Return the names of the modules that hold ours now.

    Example:
        >>> from dcn_plugin.integrations.ultralytics import installed
        >>> installed()
        ()
    """
    return _function.installed()


def uninstall() -> None:
    """Give the function back to ultralytics, whoever asked for ours.

    Example:
        >>> from dcn_plugin.integrations.ultralytics import uninstall
        >>> uninstall()
    """
    _function.uninstall()
