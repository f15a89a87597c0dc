"""Norms and activations by the names of the official configurations, between layouts, with the official state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "GELU": nn.GELU,
    "ReLU": lambda: nn.ReLU(inplace=True),
    "SiLU": nn.SiLU,
}
_NORMS = ("LN", "BN")


class ToChannelsFirst(nn.Module):
    """`[N, H, W, C]` as `[N, C, H, W]`, a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """`[N, C, H, W]` as `[N, H, W, C]`, a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def named_activation(kind: Any) -> nn.Module:
    """Return a new module of this kind."""
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(f"act_layer: expected {' or '.join(map(repr, _ACTIVATIONS))}, got {kind!r}")
    return _ACTIVATIONS[kind]()


def named_norm(
    kind: Any, channels: int, factory: dict[str, Any], first: tuple[bool, bool] = (False, False)
) -> nn.Sequential:
    """Return a norm over the channels; `first` tells whether they come, and leave, as the second axis.

    Its place in the sequence is part of the official names: a `LayerNorm` stands behind the permutation that it needs.
    """
    if kind not in _NORMS:
        raise ValueError(f"norm_layer: expected {' or '.join(map(repr, _NORMS))}, got {kind!r}")
    given, left = first
    as_second = kind == "BN"
    norm = nn.BatchNorm2d(channels, **factory) if as_second else nn.LayerNorm(channels, eps=1e-6, **factory)
    before = [] if given == as_second else [ToChannelsLast() if given else ToChannelsFirst()]
    after = [] if left == as_second else [ToChannelsFirst() if left else ToChannelsLast()]
    return nn.Sequential(*before, norm, *after)
