"""The peers of multi-scale deformable attention, each where it is installed, and how it is called.

Each function takes value, the (height, width) of the levels, locations and weights as our operator does.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

Levels = Sequence[tuple[int, int]]
Operator = Callable[[Tensor, Levels, Tensor, Tensor], Tensor]

# What transformers, mmcv and ultralytics compute without compiled operators; a compiled one of CPU and CUDA; one whose
# kernels are CUDA's and Triton's, with plain PyTorch beside them.
FALLBACK, COMPILED, EAGER = "fallback", "torch-ms-deform-attn", "deformops"
PACKAGES = {FALLBACK: "transformers", COMPILED: "torch_ms_deform_attn", EAGER: "deformops"}


def missing() -> list[str]:
    """The packages that are not installed."""
    return [package for package in PACKAGES.values() if not find_spec(package)]


@cache
def tables(levels: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and first rows of the levels, as tensors."""
    shapes = torch.tensor(levels, device=device)
    rows = shapes.prod(1)
    return shapes, rows.cumsum(0) - rows


def _fallback() -> Operator:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module = MultiScaleDeformableAttention()

    def call(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
        # It asks for a table on the device as well, and does not read it.
        return module(value, *tables(tuple(levels), value.device)[:1], list(levels), None, locations, weights, 64)

    return call


def _compiled() -> Operator:
    from torch_ms_deform_attn import ms_deform_attn

    def call(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, *tables(tuple(levels), value.device), locations, weights)

    return call


def _eager() -> Operator:
    from deformops.registry import msda

    def call(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
        return msda(value, *tables(tuple(levels), value.device), locations, weights)

    return call


@cache
def operator(name: str) -> Operator | None:
    """The function of a peer; None where it is not installed."""
    return {FALLBACK: _fallback, COMPILED: _compiled, EAGER: _eager}[name]() if find_spec(PACKAGES[name]) else None
