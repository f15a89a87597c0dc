"""Checkpoints of MMEngine's Runner with today's `torch.load`, which refuses log histories and NumPy's numbers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

_allowed: list[Any] = []


def _statistic(owner: Any, name: str) -> Any:
    """`getattr` for a checkpoint, and for nothing but this: a log history is pickled with its four methods."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise ValueError(f"name: expected a statistic of MMEngine's HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(owner, name)


def _types() -> list[Any]:
    """What such files hold beside tensors, by the names that NumPy 1 and 2 pickle it under. None of it runs code."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    multiarray = import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
    makers = [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core")
              for f in (multiarray._reconstruct, multiarray.scalar)]  # fmt: skip
    dtypes = {type(np.dtype(letter)) for letter in "?bBhHiIlLqQefdFDSU"}  # `numpy.dtypes.Float64DType` and so on
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *makers, (_statistic, "builtins.getattr")]


def begin() -> None:
    """Let `torch.load(..., weights_only=True)`, its default, take them; it goes on refusing all else."""
    before = torch.serialization.get_safe_globals()
    _allowed.extend(kind for kind in _types() if kind not in before)
    torch.serialization.add_safe_globals(_allowed)


def end() -> None:
    """Undo `begin`; what others have allowed stays allowed."""
    kept = [kind for kind in torch.serialization.get_safe_globals() if kind not in _allowed]
    _allowed.clear()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)
