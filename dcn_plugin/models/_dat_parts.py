"""Stages of DAT and DAT++, with the names of their official state dicts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from ..layers import DAttention
from ..layers.dat import ChannelNorm
from ._windows import LocalAttention, NeighborhoodAttention, ShiftWindowAttention

_KERNELS = (9, 7, 5, 3)  # of what predicts the offsets, by stage
_STRIDES = (8, 4, 2, 1)  # of the same, in DAT++


class MLP(nn.Module):
    """Two linear layers at each pixel."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.chunk = nn.Sequential()
        self.chunk.add_module("linear1", nn.Linear(dim, hidden, **factory))
        self.chunk.add_module("act", nn.GELU())
        self.chunk.add_module("drop1", nn.Dropout(drop))
        self.chunk.add_module("linear2", nn.Linear(hidden, dim, **factory))
        self.chunk.add_module("drop2", nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """Two 1x1 convolutions with a depthwise 3x3 one added between them."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Conv2d(dim, hidden, 1, **factory))
        self.dwc = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **factory)
        self.act, self.drop1 = nn.GELU(), nn.Dropout(drop)
        self.linear2, self.drop2 = nn.Sequential(nn.Conv2d(hidden, dim, 1, **factory)), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.linear1(x))
        return self.drop2(self.linear2(self.act(x + self.dwc(x))))


class Stage(nn.Module):
    """Blocks of one size: x + attention(norm x), x + mlp(norm x); in DAT++ x + depthwise 3x3 (x) before each."""

    def __init__(
        self, kinds: str, dim: int, heads: int, groups: int, size: tuple[int, int], window: int, plus: bool,
        index: int, mlp_ratio: float, drop: float, attn_drop: float, drop_path: Sequence[float],
        factory: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        drops: dict[str, Any] = dict(attn_drop=attn_drop, proj_drop=drop)
        make: dict[str, Any] = {
            "L": partial(LocalAttention, dim, heads, window, **drops, **factory),
            "S": partial(ShiftWindowAttention, dim, heads, window, size, **drops, **factory),
            "N": partial(NeighborhoodAttention, dim, heads, window, **drops, **factory),
            "D": partial(
                DAttention, dim, heads, groups, size, _KERNELS[index], _STRIDES[index] if plus else 1,
                -1.0 if plus else 2.0, plus, **drops, **factory,
            ),
        }  # fmt: skip
        depth, hidden = len(kinds), int(dim * mlp_ratio)
        self.layer_norms = nn.ModuleList(ChannelNorm(dim, **factory) for _ in range(2 * depth))
        mlp = ConvMLP if plus else MLP
        self.mlps = nn.ModuleList(mlp(dim, hidden, drop, **factory) for _ in kinds)
        self.attns = nn.ModuleList(make[kind]() for kind in kinds)
        self.drop_path = nn.ModuleList(DropPath(rate) if rate > 0 else nn.Identity() for rate in drop_path)
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **factory) for _ in (kinds if plus else ())
        )
        self.grad_checkpointing = False

    def _block(self, d: int, x: Tensor) -> Tensor:
        if len(self.local_perception_units):
            x = x + self.local_perception_units[d](x)
        x = x + self.drop_path[d](self.attns[d](self.layer_norms[2 * d](x)))
        return x + self.drop_path[d](self.mlps[d](self.layer_norms[2 * d + 1](x)))

    def forward(self, x: Tensor) -> Tensor:
        for d in range(len(self.attns)):
            if self.grad_checkpointing:
                x = checkpoint(self._block, d, x)
            else:
                x = self._block(d, x)
        return x


def cut(kinds: str, depth: int) -> str:
    """Return the kinds of attention of a stage, if they are as many as its blocks."""
    if set(kinds) - set("LSND") or len(kinds) != depth:
        raise ValueError(f"spec: expected {depth} of L, S, N and D for a stage of {depth} blocks, got {kinds!r}")
    return kinds


def stem(inputs: int, dim: int, plus: bool, factory: dict[str, Any]) -> nn.Sequential:
    """Return what makes the first map, of a quarter of the image's size."""
    if not plus:
        return nn.Sequential(nn.Conv2d(inputs, dim, 4, 4, **factory), ChannelNorm(dim, **factory))
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(inputs, half, 3, 2, 1, **factory), ChannelNorm(half, **factory), nn.GELU(),
        nn.Conv2d(half, dim, 3, 2, 1, **factory), ChannelNorm(dim, **factory),
    )  # fmt: skip
