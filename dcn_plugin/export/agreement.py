"""Whether what another runtime computes is what the model does: how exports are compared before there is a file."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["largest_difference", "require_agreement"]


def largest_difference(found: Any, wanted: Any) -> float:
    """Return the largest difference of a nest of tensors from another, in parts of the largest value of each tensor.

    `max_i max|found_i - wanted_i| / max|wanted_i|`, NaN where a difference is none, 0 for tensors without numbers.

    Args:
        found: a tensor, or tensors in any containers.
        wanted: as many, of the same shapes and in the same order; integers and booleans are compared as numbers.

    Raises:
        ArithmeticError: another number of tensors, or another shape.

    Example:
        >>> import torch
        >>> from dcn_plugin.export.agreement import largest_difference
        >>> largest_difference([torch.tensor([1.0, 4.5])], (torch.tensor([1.0, 4.0]),))
        0.125
    """
    ours, theirs = tree_leaves(found), tree_leaves(wanted)
    if len(ours) != len(theirs):
        raise ArithmeticError(f"outputs: expected {len(theirs)}, got {len(ours)}")
    worst = 0.0
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            raise ArithmeticError(f"outputs: expected shape {list(other.shape)} of output {i}, got {list(one.shape)}")
        differs = _difference(one, other)
        if not differs <= worst:  # NaN stays
            worst = differs
            if worst != worst:
                break
    return worst


def _difference(one: Tensor, other: Tensor) -> float:
    if not other.numel():
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def require_agreement(found: Any, wanted: Any, tolerance: float) -> None:
    """Raise unless `largest_difference(found, wanted)` is a number of at most `tolerance`.

    Args:
        found: as `largest_difference` takes it.
        wanted: as `largest_difference` takes it.
        tolerance: in parts of the largest value of an output.

    Raises:
        ArithmeticError: they differ by more, or a difference is NaN.

    Example:
        >>> import torch
        >>> from dcn_plugin.export.agreement import require_agreement
        >>> require_agreement(torch.ones(3), torch.ones(3), 1e-4)
    """
    worst = largest_difference(found, wanted)
    if not worst <= tolerance:  # NaN is no agreement
        raise ArithmeticError(f"outputs: expected to agree within {tolerance:g} of the largest, got {worst:.2g}")
