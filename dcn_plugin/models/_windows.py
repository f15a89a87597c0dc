"""Attention within windows in plain PyTorch, with DAT's state dicts: local, shifted, and of each pixel's neighbours.

Symbols: N batch, C channels, H x W the map, M heads. Input and output are `[N, C, H, W]`, of any size: where windows do
not fit, the map gets zeros on the right and at the bottom, which take part as in DAT's detectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..layers.arguments import divisible


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


@register_notrace_module  # timm's fx feature extractor takes it as one node, as it looks at sizes
class LocalAttention(nn.Module):
    """Attention within windows of `window` x `window` pixels, with a bias for each way between two pixels of one."""

    def __init__(
        self, dim: int, heads: int, window: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        divisible("dims", dim, "heads", heads)
        self.heads, self.window = heads, window
        self.proj_qkv, self.proj_out = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads, **factory))
        index = torch.empty(window**2, window**2, dtype=torch.int64, device=factory.get("device"))
        self.register_buffer("relative_position_index", index)
        LocalAttention.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Draw the biases, and number the ways between pixels."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)
        index: Any = self.relative_position_index
        index.copy_(LocalAttention.computed(self, index)["relative_position_index"])

    def computed(self, like: Tensor) -> dict[str, Tensor]:
        """Return the buffers that follow from sizes alone, on the device of `like`."""
        place = torch.arange(self.window, device=like.device)
        along = place[:, None] - place + self.window - 1
        ways = along[:, None, :, None] * (2 * self.window - 1) + along[:, None]
        return {"relative_position_index": ways.reshape(self.window**2, self.window**2)}

    def forward(self, x: Tensor) -> Tensor:
        height, width = (math.ceil(size / self.window) * self.window for size in x.shape[2:])
        return self._within(_padded(x, height, width))[:, :, : x.shape[2], : x.shape[3]]

    def _within(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """Attend in a map of whole windows; `apart` `[windows, pixels, pixels]` is added for each window."""
        n, c, h, w = x.shape
        size, rows, columns = self.window, h // self.window, w // self.window
        windows = x.reshape(n, c, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        # [3, N, windows, M, pixels, C / M]
        parts = self.proj_qkv(windows).unflatten(3, (3, self.heads, c // self.heads)).permute(3, 0, 1, 4, 2, 5)
        query, key, value = parts.unbind(0)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)
        scores = query * (c // self.heads) ** -0.5 @ key.transpose(-2, -1) + bias
        if apart is not None:
            scores = scores + apart[:, None].to(scores.dtype)
        mixed = self.attn_drop(scores.softmax(-1)) @ value
        out = self.proj_drop(self.proj_out(mixed.transpose(2, 3).flatten(3)))
        return out.reshape(n, rows, columns, size, size, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


class ShiftWindowAttention(LocalAttention):
    """Local attention of a map that is rolled by half a window; pixels that were apart before do not meet."""

    def __init__(self, dim: int, heads: int, window: int, size: tuple[int, int], **options: Any) -> None:
        if window < 2:
            raise ValueError(f"window_size: expected at least 2 for windows that shift, got {window}")
        super().__init__(dim, heads, window, **options)
        self.shift, self.size = math.ceil(window / 2), size
        windows = math.prod(math.ceil(side / window) for side in size)
        factory = {name: options.get(name) for name in ("device", "dtype")}
        self.register_buffer("attn_mask", torch.empty(windows, window**2, window**2, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        mask: Any = self.attn_mask
        mask.copy_(self.computed(mask)["attn_mask"])

    def computed(self, like: Tensor) -> dict[str, Tensor]:
        height, width = (math.ceil(side / self.window) * self.window for side in self.size)
        mask: Any = self.attn_mask
        return super().computed(like) | {"attn_mask": self._apart(height, width, like).to(mask.dtype)}

    def _apart(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return -100 for pairs of pixels of a window that lay apart before the roll, `[windows, pixels, pixels]`."""
        lines = []
        for size in (height, width):
            place = torch.arange(size, device=like.device)
            lines.append((place >= size - self.window).long() + (place >= size - self.shift))
        part = lines[0][:, None] * 3 + lines[1]
        rows, columns = height // self.window, width // self.window
        part = part.reshape(rows, self.window, columns, self.window).transpose(1, 2).reshape(rows * columns, -1)
        return torch.where(part[:, None] != part[:, :, None], -100.0, 0.0).to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (math.ceil(side / self.window) * self.window for side in x.shape[2:])
        mask: Any = self.attn_mask
        made_for = [math.ceil(side / self.window) * self.window for side in self.size]
        apart = mask if made_for == [height, width] else self._apart(height, width, mask)
        rolled = torch.roll(_padded(x, height, width), (-self.shift, -self.shift), (2, 3))
        out = torch.roll(self._within(rolled, apart), (self.shift, self.shift), (2, 3))
        return out[:, :, : x.shape[2], : x.shape[3]]


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Attention of each pixel to the `window` x `window` pixels around it; at borders the window is moved inside."""

    def __init__(
        self, dim: int, heads: int, window: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        divisible("dims", dim, "heads", heads)
        if window % 2 == 0:
            raise ValueError(f"window_size: expected an odd number for neighbourhoods, got {window}")
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.rpb = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the biases."""
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def _axis(self, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut an axis into tiles of queries, each with the keys that its queries reach together.

        Returns:
            Places of queries `[tiles, T]` and of keys `[tiles, R]`, and where in `rpb` the way from a query to a key
            stands, `[tiles, T, R]`; beyond its end where the key is not in the query's window.
        """
        # With R = 2 * window - 1 about a quarter of the pairs are in windows, and keys are copied three times.
        tile = size if size <= 2 * self.window else self.window
        reach = min(size, tile + self.window - 1)
        first = torch.arange(0, size, tile, device=like.device)[:, None]
        queries = (first + torch.arange(tile, device=like.device)).clamp(max=size - 1)
        keys = (first - self.window // 2).clamp(0, size - reach) + torch.arange(reach, device=like.device)
        start = (queries - self.window // 2).clamp(0, size - self.window)[:, :, None]
        inside = (keys[:, None] >= start) & (keys[:, None] < start + self.window)
        way = keys[:, None] - queries[:, :, None] + self.window - 1
        return queries, keys, torch.where(inside, way, 2 * self.window - 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = _padded(x, max(h, self.window), max(w, self.window))
        height, width = x.shape[2:]
        query, key, value = self.qkv(x.permute(0, 2, 3, 1)).chunk(3, 3)
        (q_rows, k_rows, up), (q_columns, k_columns, left) = self._axis(height, x), self._axis(width, x)

        def tiles(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            """Return `[N, tiles, M, pixels of a tile, C / M]`."""
            cut = pixels.index_select(1, rows.flatten()).index_select(2, columns.flatten())
            cut = cut.reshape(n, *rows.shape, *columns.shape, self.heads, c // self.heads)
            return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)

        query = tiles(query * (c // self.heads) ** -0.5, q_rows, q_columns)
        key, value = tiles(key, k_rows, k_columns), tiles(value, k_rows, k_columns)
        # One more row and column: pairs that are not in each other's window.
        table = F.pad(self.rpb, (0, 1, 0, 1), value=-math.inf)
        bias = table.index_select(1, up.flatten()).index_select(2, left.flatten())
        bias = bias.reshape(self.heads, *up.shape, *left.shape).permute(1, 4, 0, 2, 5, 3, 6)
        bias = bias.flatten(5, 6).flatten(3, 4).flatten(0, 1)
        weights = self.attn_drop((query @ key.transpose(-2, -1) + bias).softmax(-1))
        out = (weights @ value).unflatten(3, (q_rows.shape[1], q_columns.shape[1]))
        out = out.unflatten(1, (len(q_rows), len(q_columns))).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(n, q_rows.numel(), q_columns.numel(), c)[:, :h, :w]
        return self.proj_drop(self.proj(out)).permute(0, 3, 1, 2)
