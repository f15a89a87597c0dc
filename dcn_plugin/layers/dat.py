"""Deformable attention on one map: keys and values from a grid of samples that moves as a whole (Xia et al. 2022).

Symbols: N batch, C channels, H x W the map and its queries, H_k x W_k samples, G groups that share offsets, M heads.
Positions run from -1, the centre of the first pixel, to 1, the centre of the last one, and are (y, x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import ms_deform_attn
from ..ops._check import integer, number
from ..ops._transforms import unrecorded
from ._start import OffsetPredictor
from .arguments import check_input, check_sides, describe, divisible, factory_arguments, flag, pair, rate
from .samples import Samples, recorded
from .sampling import SamplingModule


class ChannelNorm(nn.Module):
    """`nn.LayerNorm` over the channels of `[N, C, H, W]`, under the name that DAT's checkpoints have."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@unrecorded
def _size(x: Tensor) -> tuple[int, int]:
    """Return height and width, as plain numbers also where `torch.jit.trace` records."""
    return x.shape[2], x.shape[3]


@unrecorded
def _pair(y: float, x: float, like: Tensor) -> Tensor:
    return torch.tensor([y, x], device=like.device, dtype=like.dtype)


@unrecorded
def _grid(size: tuple[int, int], plus: bool, like: Tensor, queries: bool = False) -> Tensor:
    """Return where samples lie at first, or where queries do, `[height, width, 2]`."""
    lines = []
    for count in size:
        i = torch.arange(count, device=like.device, dtype=like.dtype)
        if plus and queries:
            lines.append((2 * i - (count - 1)) / max(count - 1, 1))
        else:
            lines.append((2 * i + 1) / _distances(count, plus) - 1)
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)


def _distances(count: int, plus: bool) -> int:
    """Return into how many parts the way from -1 to 1 is cut; one sample of DAT++ lies in the middle of one."""
    return max(count - 1, 1) if plus else count


def _in_groups(query: Tensor, groups: int) -> Tensor:
    return query.unflatten(1, (groups, -1)).flatten(0, 1)


def _positions(raw: Tensor, groups: int, factor: float, plus: bool) -> Tensor:
    """Return positions `[N, G, H_k, W_k, 2]`, in float32 at least, from what `conv_offset` predicted."""
    height, width = _size(raw)
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    raw = raw.unflatten(0, (-1, groups)).permute(0, 1, 3, 4, 2)
    start = _grid((height, width), plus, raw)
    if factor < 0:
        return (raw + start).clamp(-1, 1)
    return start + raw.tanh() * _pair(factor / _distances(height, plus), factor / _distances(width, plus), raw)


def _moves(position: Tensor, x: Tensor, factor: float, plus: bool) -> Tensor:
    """Return how far samples lie from where they do at first, `[N, 2*G, H_k, W_k]` in pixels."""
    start = _grid(_size(position), plus, position)
    start = start.clamp(-1, 1) if factor < 0 else start
    height, width = _size(x)
    moved = (position - start) * _pair((height - 1) / 2, (width - 1) / 2, position)
    return moved.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _sample(x: Tensor, position: Tensor) -> Tensor:
    """Return `[N, C, H_k, W_k]`, each group's channels at its own positions."""
    height, width = _size(x)
    value = x.flatten(2).transpose(1, 2).unflatten(2, (position.shape[1], -1))
    # From pixel centres at -1 and 1 to borders at 0 and 1; the operator takes (x, y).
    part = _pair((height - 1) / (2 * height), (width - 1) / (2 * width), position)
    location = (position * part + 0.5).flip(-1).flatten(2, 3).transpose(1, 2)
    sampled = ms_deform_attn(value, [(height, width)], location[:, :, :, None, None])
    return sampled.transpose(1, 2).unflatten(2, _size(position))


def _bias(table: Tensor, position: Tensor, query: Tensor, plus: bool) -> Tensor:
    """Return what the table holds for the way from each sample to each query, `[N, M, H * W, H_k * W_k]`."""
    height, width = _size(table[None])
    # The way (query - sample) / 2 runs over the table as positions do over a map.
    part = _pair((height - 1) / (4 * height), (width - 1) / (4 * width), position)
    to = (_grid(_size(query), plus, position, queries=True) * part + 0.5).flip(-1).flatten(0, 1)
    of = (position * part).flip(-1).flatten(2, 3).transpose(1, 2)
    location = to[:, None, None] - of[:, None]  # [N, queries, samples, G, 2]
    # One table for all images, so the ways of all of them are its queries.
    value = table.flatten(1).unflatten(0, (position.shape[1], -1)).permute(2, 0, 1)[None]
    found = ms_deform_attn(value, [(height, width)], location.flatten(0, 2)[None, :, :, None, None])
    return found[0].unflatten(0, (-1, to.shape[0], of.shape[1])).permute(0, 3, 1, 2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.flatten(2).unflatten(1, (heads, -1))


def _weights(query: Tensor, key: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Return `[N, M, H * W, H_k * W_k]`, which sum to 1 over the samples."""
    query = _heads(query, heads).transpose(2, 3)
    return (query * query.shape[3] ** -0.5 @ _heads(key, heads) + bias).softmax(-1)


def _mixed(weights: Tensor, value: Tensor, query: Tensor) -> Tensor:
    mixed = _heads(value, weights.shape[1]) @ weights.transpose(2, 3)
    return mixed.flatten(1, 2).unflatten(2, _size(query))


# Symbolic tracing records these as calls: they look at shapes.
for _name in ("check_input", "check_sides"):
    torch.fx.wrap(_name)
for _name in ("_in_groups", "_positions", "_sample", "_bias", "_weights", "_mixed"):
    torch.fx.wrap(_name)


class DAttention(SamplingModule):
    """Deformable attention of DAT and DAT++, with their state dicts: every query attends to the same moved grid.

    `out(q) = proj_out(sum_s softmax_s(proj_q(x)(q) . k(s) / sqrt(C / M) + b(q, s)) * v(s))`

    `k`, `v` are `proj_k`, `proj_v` of bilinear samples of `x`, `H_k x W_k` of them for each group, at
    `grid + tanh(conv_offset(proj_q(x))) * offset_range_factor / (H_k, W_k)`, where the grid is at half pixels and
    positions run from -1 to 1 over the centres of the map's pixels; zeros lie outside. `b(q, s)` is a bilinear sample
    of `rpe_table` at `(q - s) / 2`. With `plus=True` distances of the grid are `2 / (H_k - 1)`, and queries lie from
    -1 to 1. A fresh layer samples its undeformed grid (the original draws the offset branch, too). Positions are
    computed in float32 at least.

    Args:
        dim: C, channels of the input and the output.
        n_heads: M; divides `dim`.
        n_groups: G, groups of channels with offsets of their own; divides `n_heads`.
        q_size: (H, W), or one number for both, of the maps that `rpe_table` `[M, 2H - 1, 2W - 1]` is made for; with
            maps of other sizes it stands for the same ways relative to the map.
        ksize: kernel of the depthwise convolution that offsets are predicted with.
        stride: of that convolution: one sample for so many pixels along each axis.
        offset_range_factor: the longest offset, in distances of the grid; negative (with `plus=True`): any offset,
            and positions are clamped to the map.
        plus: the arithmetic of DAT++ (2023) instead of that of DAT (2022).
        attn_drop: the part of the weights that is dropped while training.
        proj_drop: the part of the result that is dropped while training.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DAttention
        >>> layer = DAttention(32, n_heads=4, n_groups=2, q_size=14, ksize=5)
        >>> layer(torch.rand(1, 32, 14, 14)).shape
        torch.Size([1, 32, 14, 14])

    Source: Xia et al., Vision Transformer with Deformable Attention (2022), and DAT++ (2023).
    """

    # Trained like the rest in the papers.
    offset_branches: ClassVar[Mapping[str, float]] = {"conv_offset": 1.0}

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_groups: int,
        q_size: int | tuple[int, int],
        ksize: int = 5,
        stride: int = 1,
        offset_range_factor: float = 2.0,
        plus: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.n_heads, self.n_groups = integer("n_heads", n_heads, 1), integer("n_groups", n_groups, 1)
        divisible("dim", self.dim, "n_heads", self.n_heads)
        divisible("n_heads", self.n_heads, "n_groups", self.n_groups)
        self.q_size = pair("q_size", q_size, 1)
        self.ksize, self.stride = integer("ksize", ksize, 1), integer("stride", stride, 1)
        self.plus = flag("plus", plus)
        self.offset_range_factor = number("offset_range_factor", offset_range_factor)
        if self.offset_range_factor == 0 or self.offset_range_factor < 0 and not self.plus:
            wanted = "a positive number, or with plus=True a negative one"
            raise ValueError(f"offset_range_factor: expected {wanted}, got {offset_range_factor}")
        factory = factory_arguments(device, dtype)
        inner = self.dim // self.n_groups
        pad = 0 if self.plus and self.ksize == self.stride else self.ksize // 2
        self.conv_offset = nn.Sequential(
            nn.Conv2d(inner, inner, self.ksize, self.stride, pad, groups=inner, **factory),
            ChannelNorm(inner, **factory),
            nn.GELU(),
            OffsetPredictor(inner, 2, 1, bias=False, **factory),
        )
        self.proj_q = nn.Conv2d(self.dim, self.dim, 1, **factory)
        self.proj_k = nn.Conv2d(self.dim, self.dim, 1, **factory)
        self.proj_v = nn.Conv2d(self.dim, self.dim, 1, **factory)
        self.proj_out = nn.Conv2d(self.dim, self.dim, 1, **factory)
        self.attn_drop = nn.Dropout(rate("attn_drop", attn_drop))
        self.proj_drop = nn.Dropout(rate("proj_drop", proj_drop))
        height, width = self.q_size
        self.rpe_table = nn.Parameter(torch.empty(self.n_heads, 2 * height - 1, 2 * width - 1, **factory))
        nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def reset_parameters(self) -> None:
        """Initialise as published, but for the offsets, which start at zero."""
        nn.init.trunc_normal_(self.rpe_table, std=0.01)
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def forward(self, input: Tensor) -> Tensor:
        """Attend from every pixel of `input`, `[N, C, H, W]`, to samples of it; returns the same shape."""
        x = self._checked(input)
        query, position = self._predict(x)
        if self._sampling_hooks is not None and not recorded(x):
            self.tell_hooks(x, _moves(position, x, self.offset_range_factor, self.plus))
        sampled = _sample(x, position)
        bias = _bias(self.rpe_table, position, query, self.plus)
        weights = self.attn_drop(_weights(query, self.proj_k(sampled), bias, self.n_heads))
        return self.proj_drop(self.proj_out(_mixed(weights, self.proj_v(sampled), query)))

    def _checked(self, input: Tensor) -> Tensor:
        x = check_input(input, self.dim, self.proj_q.weight)
        return check_sides(x, 2, self.ksize if self.plus and self.ksize == self.stride else 1)

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.proj_q(x)
        raw = self.conv_offset(_in_groups(query, self.n_groups))
        return query, _positions(raw, self.n_groups, self.offset_range_factor, self.plus)

    def offsets(self, input: Tensor) -> tuple[Tensor, None]:
        """What `forward` samples with, as hooks see it.

        Args:
            input: `[N, C, H, W]`.

        Returns:
            Offset `[N, 2*G, H_k, W_k]` in (y, x), in pixels of the map, from where a sample lies at first (in the map,
            where positions are clamped), and None.
        """
        x = self._checked(input)
        _, position = self._predict(x)
        return _moves(position, x, self.offset_range_factor, self.plus), None

    def places(self, samples: Samples) -> Tensor:
        """Return where the samples of one call lie without offsets, `[H_k, W_k, 2]` in pixels, (y, x)."""
        assert isinstance(samples.input, Tensor) and samples.offset is not None
        height, width = _size(samples.input)
        start = _grid(_size(samples.offset), self.plus, samples.offset)
        start = start.clamp(-1, 1) if self.offset_range_factor < 0 else start
        return (start + 1) * _pair((height - 1) / 2, (width - 1) / 2, start)

    def extra_repr(self) -> str:
        names = ("dim", "n_heads", "n_groups", "q_size", "ksize", "stride", "offset_range_factor", "plus")
        return describe(self, names)
