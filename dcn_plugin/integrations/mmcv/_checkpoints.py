"""Checkpoints of MMEngine's Runner with today's `torch.load`, which refuses log histories and NumPy's numbers."""

from __future__ import annotations

import torch


def begin() -> None:
    """Let `torch.load(..., weights_only=True)`, its default, take them by readers of ours; it refuses all else."""
    from . import _readers

    torch.serialization.add_safe_globals(_readers.ALLOWED)


def end() -> None:
    """Undo `begin`: only readers of ours leave, so what others have allowed stays, whenever they did."""
    from . import _readers

    kept = [each for each in torch.serialization.get_safe_globals() if each not in _readers.ALLOWED]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)
