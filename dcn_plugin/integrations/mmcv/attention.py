"""Multi-scale deformable attention under the names and arguments of `mmcv._ext`, in plain PyTorch.

mmcv's module asks for these on CUDA alone; on the CPU it calls its own `multi_scale_deformable_attn_pytorch`, which is
called here, too. An operator of ours would be called in its place, in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _attend(value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    # As a list: the sizes are read once, not once for each level and use.
    return multi_scale_deformable_attn_pytorch(value, sizes.tolist(), locations, weights)


def ms_deform_attn_forward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, im2col_step: int,
) -> Tensor:  # fmt: skip
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor, grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    with torch.enable_grad():
        given = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        output = _attend(given[0], value_spatial_shapes, *given[1:])
        found = torch.autograd.grad(output, given, grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True):
        target.copy_(gradient)


FUNCTIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (ms_deform_attn_forward, ms_deform_attn_backward)}
