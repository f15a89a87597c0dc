"""What InternImage is made of, with the official names of its parts; inside of a level, channels are last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..layers.channels import ToChannelsFirst, named_activation, named_norm

Factory = dict[str, Any]


class Stem(nn.Module):
    """Two strided convolutions: `[N, C, H, W]` to `[N, H/4, W/4, channels]`."""

    def __init__(self, in_chans: int, channels: int, act_layer: str, norm_layer: str, factory: Factory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1, **factory)
        self.norm1 = named_norm(norm_layer, channels // 2, factory, (True, True))
        self.act = named_activation(act_layer)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, **factory)
        self.norm2 = named_norm(norm_layer, channels, factory, (True, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """A strided convolution to twice the channels: `[N, C, H, W]` to `[N, H/2, W/2, 2C]`."""

    def __init__(self, channels: int, norm_layer: str, factory: Factory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False, **factory)
        self.norm = named_norm(norm_layer, 2 * channels, factory, (True, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class MLP(nn.Module):
    def __init__(self, channels: int, hidden: int, act_layer: str, drop: float, bias: bool, factory: Factory) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.act = named_activation(act_layer)
        self.fc2 = nn.Linear(hidden, channels, bias=bias, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Deformable aggregation, then an MLP, each as a branch beside the identity; `rows` is how DCNv4 takes pixels."""

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        core: Callable[[], nn.Module],
        channels: int,
        factory: Factory,
        *,
        rows: bool,
        mlp_ratio: float,
        act_layer: str,
        drop: float,
        drop_path: float,
        layer_scale: float | None,
        post_norm: bool,
        res_post_norm: bool,
        fc2_bias: bool,
    ) -> None:
        super().__init__()
        self.rows, self.post_norm = rows, post_norm
        self.norm1 = named_norm("LN", channels, factory)
        self.dcn = core()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = named_norm("LN", channels, factory)
        self.mlp = MLP(channels, int(channels * mlp_ratio), act_layer, drop, fc2_bias, factory)
        self.layer_scale = layer_scale
        for name in ("gamma1", "gamma2"):
            scale = None if layer_scale is None else nn.Parameter(torch.empty(channels, **factory))
            self.register_parameter(name, scale)
        self.res_post_norm1 = named_norm("LN", channels, factory) if res_post_norm else None
        self.res_post_norm2 = named_norm("LN", channels, factory) if res_post_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the factors of the branches start again; all else here belongs to other modules."""
        for scale in (self.gamma1, self.gamma2):
            if scale is not None and self.layer_scale is not None:
                nn.init.constant_(scale, self.layer_scale)

    def _branch(self, x: Tensor, run: Callable[[Tensor], Tensor], number: int) -> Tensor:
        """Add a branch to `x`: with its norm before or behind, and in some models another behind, and a factor."""
        norm, gamma = getattr(self, f"norm{number}"), getattr(self, f"gamma{number}")
        behind = getattr(self, f"res_post_norm{number}")
        out = norm(run(x)) if self.post_norm else run(norm(x))
        if behind is not None:
            out = behind(out)
        return x + self.drop_path(out if gamma is None else gamma * out)

    def _aggregate(self, x: Tensor) -> Tensor:
        if self.rows:
            return self.dcn(x.flatten(1, 2), x.shape[1:3]).view_as(x)
        return self.dcn(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._branch(self._branch(x, self._aggregate, 1), self.mlp, 2)


class Level(nn.Module):
    """Blocks on `[N, H, W, C]`, and their result as a map `[N, C, H, W]`; who calls it calls `downsample`."""

    def __init__(
        self,
        blocks: Sequence[dict[str, Any]],
        channels: int,
        factory: Factory,
        *,
        norm: bool,
        norm_layer: str,
        post_norms: Sequence[int],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(Block(channels=channels, factory=factory, **options) for options in blocks)
        self.post_norm_block_ids = tuple(post_norms)
        if post_norms:
            self.post_norms = nn.ModuleList(named_norm("LN", channels, factory) for _ in post_norms)
        self.norm = named_norm("LN", channels, factory) if norm else None
        # A module of its own, and before the next one, so that extractors of features find the map by its name.
        self.map = ToChannelsFirst()
        self.downsample = Downsample(channels, norm_layer, factory) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            again = self.grad_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            if i in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(i)](x)
        if self.norm is not None:
            x = self.norm(x)
        return self.map(x)


class _CrossAttention(nn.Module):
    """Attention whose biases of query, key and value are parameters beside the weights."""

    def __init__(self, channels: int, outputs: int, heads: int, factory: Factory) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False, **factory)
        self.k = nn.Linear(channels, channels, bias=False, **factory)
        self.v = nn.Linear(channels, channels, bias=False, **factory)
        self.q_bias = nn.Parameter(torch.empty(channels, **factory))
        self.k_bias = nn.Parameter(torch.empty(channels, **factory))
        self.v_bias = nn.Parameter(torch.empty(channels, **factory))
        self.proj = nn.Linear(channels, outputs, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the biases that stand beside the weights start again at 0."""
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            nn.init.zeros_(bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = ((query, self.q, self.q_bias), (key, self.k, self.k_bias), (value, self.v, self.v_bias))
        q, k, v = (
            F.linear(x, layer.weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, layer, bias in given
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """Attention of the mean pixel to all pixels: `[N, L, C]` to `[N, outputs]`."""

    def __init__(self, channels: int, outputs: int, heads: int, norm_layer: str, factory: Factory) -> None:
        super().__init__()
        self.norm1_q = named_norm(norm_layer, channels, factory)
        self.norm1_k = named_norm(norm_layer, channels, factory)
        self.norm1_v = named_norm(norm_layer, channels, factory)
        self.cross_dcn = _CrossAttention(channels, outputs, heads, factory)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_dcn(mean, self.norm1_k(x), self.norm1_v(x)).squeeze(1)
