"""RF-DETR on our `ms_deform_attn`: `accelerate()`.

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
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
    value_spatial_shapes_hw: Any = None,
) -> Tensor:  # fmt: skip
    """Pixels come last there, `[N, M, D, S]`; sizes in Python are beside the tensor of them in newer versions."""
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    locations, weights = sampling_locations.flatten(3, -2), attention_weights.flatten(3)
    return ms_deform_attn(value.permute(0, 3, 1, 2), shapes, locations, weights)


def _examples() -> Iterator[tuple[Any, ...]]:
    shapes = torch.tensor([[3, 4], [2, 1]], device="cpu")
    numbers = torch.linspace(-1, 2, 96, dtype=torch.float32, device="cpu")
    value, locations, weights = numbers[:84].sin().view(1, 2, 3, 14), numbers.view(1, 3, 2, 2, 4, 2), numbers[:48].cos()
    yield value, shapes, locations, weights.view(1, 3, 2, 8)


_function = ServedFunction(
    "rfdetr", "models.ops.functions", "ms_deform_attn_core_pytorch",
    ["models.ops.functions.ms_deform_attn_func", "models.ops.modules.ms_deform_attn"], _attention, _examples,
)  # fmt: skip


def accelerate() -> Accelerated:
    """Serve `ms_deform_attn_core_pytorch` of rfdetr with our operator, until it is undone.

    Models built before are served, too: the function is looked up in each call. On the CPU and CUDA. `torch.jit.trace`
    and exporters that trace go on recording rfdetr's own function, so their files run without dcn_plugin;
    `torch.compile` and `torch.export` record ours.

    Numbers agree to rounding. A NaN position gives NaN in what it touches; half values are summed up in float32, in
    their own function not. Wrong shapes are a ValueError that names the argument.

    Returns:
        What was put in place; `undo()` or leaving a `with` block withdraws it. The function is served until each call
        that asked for it was withdrawn, or `uninstall()` was called. A process that is started afresh has to ask again.

    Raises:
        RuntimeError: this version of rfdetr has no such function, or one that computes something else.

    Example:
        >>> from dcn_plugin.integrations.rfdetr import accelerate  # doctest: +SKIP
        >>> with accelerate():  # doctest: +SKIP
        ...     detections = rfdetr.RFDETRNano().predict("image.jpg")
    """
    return _function.accelerate()


def installed() -> tuple[str, ...]:
    """Return the names of the modules that hold ours now.

    Example:
        >>> from dcn_plugin.integrations.rfdetr import installed
        >>> installed()
        ()
    """
    return _function.installed()


def uninstall() -> None:
    """Give the function back to rfdetr, whoever asked for ours.

    Example:
        >>> from dcn_plugin.integrations.rfdetr import uninstall
        >>> uninstall()
    """
    _function.uninstall()
