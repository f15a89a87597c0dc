"""Multi-scale deformable attention: a few samples of every level of a pyramid for each query (Zhu et al. 2021).

Symbols: N batch, Q queries, M heads, L levels, P points a level, S = sum of H_l * W_l pixels of all levels, C channels.
Positions, reference points and offsets are **(x, y)** here, as in every checkpoint of the field; `Samples`, which
hooks see, are (y, x) like those of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import ms_deform_attn
from ..ops._check import integer, number
from ..ops.ms_deform_attn import MOST_LEVELS
from ._levels import Levels, Names, check_added, check_levels
from ._start import ZeroLinear, warn_if_redrawn
from .arguments import describe, divisible, factory_arguments, flag, rate
from .samples import recorded
from .sampling import SamplingModule

Shapes = Sequence[Sequence[int]] | Tensor


class RayLinear(ZeroLinear):
    """What predicts sampling offsets: at first point p of a head lies p + 1 pixels along the head's own ray."""

    points: tuple[int, ...] = ()  # while nn.Linear's constructor runs

    def __init__(self, in_features: int, heads: int, points: tuple[int, ...], factory: dict[str, Any]) -> None:
        super().__init__(in_features, 2 * heads * sum(points), **factory)
        self.heads, self.points = heads, points
        self.reset_parameters()

    def first_bias(self) -> Tensor | None:
        if not self.points:
            return None
        # On the CPU whatever the default device is: the same numbers for whoever compares with them.
        angles = torch.arange(self.heads, dtype=torch.float32, device="cpu") * (2.0 * math.pi / self.heads)
        rays = torch.stack((angles.cos(), angles.sin()), -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)  # onto the square around 0
        steps = torch.cat([torch.arange(1.0, count + 1, device="cpu") for count in self.points])
        return (rays[:, None] * steps[:, None]).flatten()


def _wide(position: Tensor, value: Tensor) -> Tensor:
    """Positions in float32 at least: in half precision those of a map 256 pixels wide lie on every other pixel."""
    return position.to(torch.promote_types(value.dtype, torch.float32))


def _sample(value: Tensor, levels: Levels, points: Sequence[int], offset: Tensor, logits: Tensor, at: Tensor) -> Tensor:
    """Return `[N, Q, M * D]`: locations and softmax are made inside of the operator."""
    return ms_deform_attn(
        value, levels, _wide(offset, value), logits,
        points=tuple(points), softmax=True, reference_points=_wide(at, value),
    )  # fmt: skip


def _turned(value: Any) -> Any:
    """Batch first; what is no such tensor is refused later, under its name."""
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() == 3 else value


# Symbolic tracing records these as calls: they look at shapes.
torch.fx.wrap("check_added")
torch.fx.wrap("check_levels")
torch.fx.wrap("_sample")
torch.fx.wrap("_turned")


class LevelAttention(SamplingModule):
    """What both layers share: four projections, and the operator between them."""

    # The learning rate of Zhu et al. (2021), appendix A.4.
    offset_branches: ClassVar[Mapping[str, float]] = {"sampling_offsets": 0.1}
    _names: ClassVar[Names]
    _heads: int
    _points: tuple[int, ...]  # of each level
    _width: int
    _depth: int  # channels of a head

    def _project(self, width: int, inner: int, heads: int, points: tuple[int, ...], factory: dict[str, Any]) -> None:
        self._width, self._heads, self._points = width, heads, points
        self._depth = inner // heads
        self.sampling_offsets = RayLinear(width, heads, points, factory)
        self.attention_weights = ZeroLinear(width, heads * sum(points), **factory)
        self.value_proj = nn.Linear(width, inner, **factory)
        self.output_proj = nn.Linear(inner, width, **factory)
        LevelAttention.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Initialise as published: points on rays, equal weights, projections by Xavier's rule."""
        self.sampling_offsets.reset_parameters()
        self.attention_weights.reset_parameters()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def _predict(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw offsets `[N, Q, M, K, 2]`, (x, y), and logits `[N, Q, M, K]` for the K points of all levels."""
        warn_if_redrawn(self)
        count = sum(self._points)
        offset = self.sampling_offsets(query).unflatten(2, (self._heads, count, 2))
        return offset, self.attention_weights(query).unflatten(2, (self._heads, count))

    def _attend(self, *given: Any, batch_first: bool = True) -> Tensor:
        """Return what `output_proj` makes of a call's arguments in the order of `Names`, batch first."""
        query, at, pixels, _, _, mask = given
        levels = check_levels(self._names, given, self.output_proj.weight, self._width, len(self._points), batch_first)
        value = self.value_proj(pixels)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        value = value.unflatten(2, (self._heads, self._depth))
        offset, logits = self._predict(query)
        output = self.output_proj(_sample(value, levels, self._points, offset, logits, at))
        if self._sampling_hooks is not None and not recorded(pixels):
            self.tell_hooks(_maps(pixels, levels), *self._samples(offset, logits, at, levels))
        return output

    def _offsets(self, *given: Any, batch_first: bool = True) -> tuple[Tensor, Tensor]:
        levels = check_levels(self._names, given, self.output_proj.weight, self._width, len(self._points), batch_first)
        query, at, *_ = given
        return self._samples(*self._predict(query), at, levels)

    def _samples(self, offset: Tensor, logits: Tensor, at: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return what was sampled with, as `Samples` has it: `[N, 2*M*K, Q]` in pixels, (y, x), and `[N, M*K, Q]`."""
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        if at.shape[3] == 4:
            each = zip(offset.split(self._points, 3), at.expand(-1, -1, len(levels), -1).unbind(2), levels, strict=True)
            offset = torch.cat(
                [
                    own * (box[..., 2:] * box.new_tensor((width, height)) * (0.5 / own.shape[3]))[:, :, None, None]
                    for own, box, (height, width) in each
                ],
                3,
            )
        weights = logits.to(offset.dtype).softmax(-1)
        return offset.flip(4).permute(0, 2, 3, 4, 1).flatten(1, 3), weights.permute(0, 2, 3, 1).flatten(1, 2)

    def explain_mismatch(self, name: str, shape: torch.Size) -> str:
        outputs, own = (int(shape[0]) if shape else 1), 2 * self._heads * sum(self._points)
        if outputs == own:
            return ""
        return (
            f"{name} of {list(shape)} predicts {outputs} numbers, two for each point of each head: this layer has "
            f"{self._heads} heads with {list(self._points)} points in its levels, so {own}"
        )


def _maps(pixels: Tensor, levels: Levels) -> dict[str, Tensor]:
    """Return the levels as maps `[N, C, H, W]`, by their number."""
    parts = pixels.transpose(1, 2).split([height * width for height, width in levels], 2)
    return {str(i): part.unflatten(2, size) for i, (part, size) in enumerate(zip(parts, levels, strict=True))}


class MSDeformAttn(LevelAttention):
    """Multi-scale deformable attention with Deformable DETR's name, arguments, state dict and initialisation.

    `out(q) = output_proj(sum_{m,l,p} A(q, m, l, p) * value_proj(x_l)(m, ref(q, l) + off(q, m, l, p) / (W_l, H_l)))`

    `off = sampling_offsets(query)`, and `A` is the softmax of `attention_weights(query)` over all points of a head.
    With boxes as reference points, `ref_xy + off * ref_wh * 0.5 / P_l`. Locations are computed in float32 at least,
    whatever the type of the layer and under autocast; what is rounded in half precision is the result of the linear
    `sampling_offsets` (to 1/256 of an offset in bfloat16) and reference points that come in half.

    Args:
        d_model: C, channels of queries and pixels.
        n_levels: L, at most 16.
        n_heads: M; divides `d_model`.
        n_points: P, points in each level; or a number for each level, as in D-FINE.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Its weights are those of Deformable DETR's, transformers' and mmcv's layers, key for key. (transformers' mask is
    True where there is *no* padding.) Optimizers of this package train `sampling_offsets` at 0.1 of the usual rate.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import MSDeformAttn
        >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=4)
        >>> shapes = [(6, 8), (3, 4)]  # pairs, or a tensor
        >>> pixels = torch.rand(1, 6 * 8 + 3 * 4, 32)
        >>> queries, centres = torch.rand(1, 5, 32), torch.rand(1, 5, 2, 2)  # (x, y) from 0 to 1, in each level
        >>> layer(queries, centres, pixels, shapes).shape
        torch.Size([1, 5, 32])

    Source: Zhu et al., Deformable DETR (2021), eq. 3 and appendix A.4.
    """

    _names = Names(
        "query", "reference_points", "input_flatten", "input_spatial_shapes", "input_level_start_index",
        "input_padding_mask",
    )  # fmt: skip

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int | Sequence[int] = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = integer("d_model", d_model, 1)
        self.n_levels = integer("n_levels", n_levels, 1, MOST_LEVELS)
        self.n_heads = integer("n_heads", n_heads, 1)
        divisible("d_model", self.d_model, "n_heads", self.n_heads)
        self.n_points: int | tuple[int, ...]
        if isinstance(n_points, Sequence):
            points = self.n_points = tuple(integer("n_points", count, 1) for count in n_points)
            if len(points) != self.n_levels:
                raise ValueError(f"n_points: expected a number for each of {self.n_levels} levels, got {n_points!r}")
        else:
            self.n_points = integer("n_points", n_points, 1)
            points = (self.n_points,) * self.n_levels
        self._project(self.d_model, self.d_model, self.n_heads, points, factory_arguments(device, dtype))

    def _reset_parameters(self) -> None:
        """Initialise again, by the name that Deformable DETR's models call."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[N, Q, C]`.
            reference_points: `[N, Q, L, 2]`, (x, y) from 0 to 1, or `[N, Q, L, 4]`, (x, y, w, h); for all levels alike
                also `[N, Q, 1, ...]`.
            input_flatten: `[N, S, C]`, the pixels of all levels one after the other.
            input_spatial_shapes: (H, W) of each level: pairs, or a tensor `[L, 2]`. Pairs wait for no device, and
                compile and export as one graph.
            input_level_start_index: `[L]`, where each level begins in S; it follows from the shapes and is only
                compared with them.
            input_padding_mask: `[N, S]`, True where there is padding, which reads as zeros; or None.

        Returns:
            `[N, Q, C]`.
        """
        return self._attend(
            query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask
        )

    def offsets(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` samples with, as hooks see it.

        Args:
            query .. input_padding_mask: as in `forward`.

        Returns:
            Offset `[N, 2*M*K, Q]` in (y, x), in pixels of the level that a point lies in, and weights `[N, M*K, Q]`
            after the softmax, for the K points of all levels.
        """
        return self._offsets(
            query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask
        )

    def extra_repr(self) -> str:
        return describe(self, ("d_model", "n_levels", "n_heads", "n_points"))


class MMCVMultiScaleDeformableAttention(LevelAttention):
    """`MSDeformAttn` with the arguments, state dict and residual of mmcv's `MultiScaleDeformableAttention`.

    `out = identity + dropout(MSDeformAttn(query + query_pos, reference_points, value, ...))`

    It needs neither mmcv nor MMEngine. MMEngine knows it as `dcn_plugin.MMCVMultiScaleDeformableAttention`, and under
    mmcv's own name where mmcv has no operators (see `dcn_plugin.registry`).

    Args:
        embed_dims: C, channels of queries and values.
        num_heads: M; divides `embed_dims` and the channels of `value_proj`.
        num_levels: L, at most 16.
        num_points: P, points in each level.
        im2col_step: how many images mmcv works on at once; nothing changes with it here.
        dropout: the part of the result that is dropped while training.
        batch_first: whether queries and values are `[N, Q, C]` or `[Q, N, C]`.
        norm_cfg, init_cfg: kept and not used, as in mmcv.
        value_proj_ratio: channels of `value_proj` as a multiple of C.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import MMCVMultiScaleDeformableAttention
        >>> layer = MMCVMultiScaleDeformableAttention(32, num_heads=4, num_levels=1, batch_first=True)
        >>> pixels, centres = torch.rand(1, 6 * 8, 32), torch.rand(1, 48, 1, 2)
        >>> layer(pixels, reference_points=centres, spatial_shapes=torch.tensor([[6, 8]])).shape
        torch.Size([1, 48, 32])

    Source: Zhu et al., Deformable DETR (2021), eq. 3.
    """

    _names = Names(
        "query", "reference_points", "value", "spatial_shapes", "level_start_index", "key_padding_mask"
    )  # fmt: skip

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dims = integer("embed_dims", embed_dims, 1)
        self.num_heads = integer("num_heads", num_heads, 1)
        self.num_levels = integer("num_levels", num_levels, 1, MOST_LEVELS)
        self.num_points = integer("num_points", num_points, 1)
        self.im2col_step = im2col_step
        divisible("embed_dims", self.embed_dims, "num_heads", self.num_heads)
        self.value_proj_ratio = number("value_proj_ratio", value_proj_ratio, positive=True)
        inner = int(self.embed_dims * self.value_proj_ratio)
        if not inner or inner % self.num_heads:
            raise ValueError(
                f"value_proj_ratio: expected one that gives value_proj a multiple of {self.num_heads} channels, got "
                f"{value_proj_ratio}, which gives {inner}"
            )
        self.dropout = nn.Dropout(rate("dropout", dropout))
        self.batch_first = flag("batch_first", batch_first)
        self.norm_cfg, self.init_cfg = deepcopy(norm_cfg), deepcopy(init_cfg)
        points = (self.num_points,) * self.num_levels
        self._project(self.embed_dims, inner, self.num_heads, points, factory_arguments(device, dtype))

    def init_weights(self) -> None:
        """Initialise again, by the name that MMEngine's models call."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        level_start_index: Tensor | Sequence[int] | None = None,
        **others: Any,
    ) -> Tensor:
        """Attend, and add the result to `identity`.

        Args:
            query: `[Q, N, C]`, or `[N, Q, C]` with `batch_first`.
            key: not looked at: the keys are the positions.
            value: `[S, N, C]` or `[N, S, C]`, the pixels of all levels; None: `query`.
            identity: what the result is added to; None: `query`.
            query_pos: is added to `query` for offsets and weights.
            key_padding_mask: `[N, S]`, True where there is padding, which reads as zeros; or None.
            reference_points: `[N, Q, L, 2]`, (x, y) from 0 to 1, or `[N, Q, L, 4]`, (x, y, w, h), whatever
                `batch_first` is.
            spatial_shapes: (H, W) of each level: a tensor `[L, 2]`, or pairs, which wait for no device.
            level_start_index: `[L]`, where each level begins in S; only compared with the shapes.
            others: not looked at, but for `residual`, mmcv's former name of `identity`.

        Returns:
            As `query`.
        """
        if identity is None:
            identity = others.get("residual")
        if identity is None:
            identity = query
        else:
            check_added("identity", identity, query, "[N, Q, C]" if self.batch_first else "[Q, N, C]")
        output = self._attend(
            *self._arranged(query, value, query_pos, reference_points, spatial_shapes, level_start_index),
            key_padding_mask,
            batch_first=self.batch_first,
        )
        return self.dropout(output if self.batch_first else output.transpose(0, 1)) + identity

    def offsets(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        level_start_index: Tensor | Sequence[int] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` samples with, as hooks see it.

        Args:
            query .. others: as in `forward`.

        Returns:
            As `MSDeformAttn.offsets`.
        """
        return self._offsets(
            *self._arranged(query, value, query_pos, reference_points, spatial_shapes, level_start_index),
            key_padding_mask,
            batch_first=self.batch_first,
        )

    def _arranged(self, query: Any, value: Any, query_pos: Any, *others: Any) -> tuple[Any, ...]:
        """Return arguments in the order of `Names`, batch first, but for the mask."""
        reference, *levels = others
        value = query if value is None else value
        if query_pos is not None:
            check_added("query_pos", query_pos, query, "[N, Q, C]" if self.batch_first else "[Q, N, C]")
            query = query + query_pos
        if not self.batch_first:
            query, value = _turned(query), _turned(value)
        return query, reference, value, *levels

    def extra_repr(self) -> str:
        names = ("embed_dims", "num_heads", "num_levels", "num_points", "batch_first", "value_proj_ratio")
        return describe(self, names)
