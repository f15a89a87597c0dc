"""Multi-scale deformable attention: the public function, and what torch needs to trace and differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import _check, _transforms
from ._operator import WANTED, register

P = ParamSpec("P")
# As many as the compiled operator's table holds (csrc/core/attention_geometry.h).
MOST_LEVELS = 16
_LOCATIONS = "[N, Q, M, L, P, 2] or [N, Q, M, K, 2]"
_WEIGHTS = "[N, Q, M, L, P] or [N, Q, M, K]"


def _four_in_order(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Say what is expected to whoever gives arguments in the order of the field's CUDA function."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if len(args) > 4:
            raise TypeError(
                "ms_deform_attn: expected (value, spatial_shapes, sampling_locations, attention_weights), got "
                f"{len(args)} arguments; level_start_index and im2col_step follow from spatial_shapes"
            )
        return function(*args, **kwargs)

    return call


@_four_in_order
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor | None = None,
    *,
    points: Sequence[int] | None = None,
    softmax: bool = False,
    reference_points: Tensor | None = None,
    offset_scale: float = 0.5,
) -> Tensor:
    """Sum weighted samples of several maps at learnt positions: multi-scale deformable attention.

        out(n, q, m) = sum over l, p of weight(q, m, l, p) * value_l(n, m, location(q, m, l, p) * (W_l, H_l) - 0.5)

    for query q, head m and point p of level l, with zeros outside the map and bilinear interpolation in between.
    Unlike elsewhere in this package, pairs of positions are **(x, y)**, as in every checkpoint of the field; shapes are
    (H, W).

    Args:
        value: `[N, S, M, D]`, the pixels of all levels one after the other, S = sum of H_l * W_l; float64, float32,
            float16 or bfloat16.
        spatial_shapes: (H, W) of each of the L levels: pairs, or a tensor `[L, 2]`, whose numbers are read (on CUDA
            that waits for the device; pairs do not; where a whole graph is exported, pairs alone).
        sampling_locations: `[N, Q, M, L, P, 2]` in units of each map, (0, 0) its top left corner and (1, 1) its bottom
            right one; or `[N, Q, M, K, 2]` with the K points of all levels side by side. May be float32 beside half
            values. Beside `reference_points` these are raw offsets.
        attention_weights: `[N, Q, M, L, P]` or `[N, Q, M, K]`; None: all ones. May be float32 beside half values.
        points: how many points each level has, where they differ; None: K / L each.
        softmax: take `attention_weights` as logits of a softmax over all K points of a query and head.
        reference_points: `[N, Q, L, 2]` or `[N, Q, 1, 2]` (x, y): location = reference + offset / (W_l, H_l); or
            `[..., 4]` (x, y, w, h): location = (x, y) + offset * (w, h) * offset_scale / P_l. None:
            `sampling_locations` are locations.
        offset_scale: the part of a box that an offset of P_l reaches.

    Returns:
        `[N, Q, M * D]`, of the values' type. A position that lies outside its map, or is infinite, contributes 0; a
        NaN position gives NaN.

    Raises:
        ValueError: a shape, size or device does not fit; levels that do not add up to S. TypeError: a type does not
            fit. Both name the argument.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import ms_deform_attn
        >>> shapes = [(6, 8), (3, 4)]
        >>> value = torch.ones(1, 6 * 8 + 3 * 4, 2, 16)  # 2 heads of 16 channels
        >>> locations, logits = torch.rand(1, 5, 2, 2, 4, 2) * 0.5 + 0.25, torch.zeros(1, 5, 2, 2, 4)
        >>> out = ms_deform_attn(value, shapes, locations, logits, softmax=True)
        >>> out.shape, torch.allclose(out, torch.ones(1))
        (torch.Size([1, 5, 32]), True)

    Source: Zhu et al., Deformable DETR (2021), eq. 3.
    """
    sizes = _sizes(spatial_shapes, value)
    each = _points(points, len(sizes) // 2, sampling_locations, attention_weights)
    if not isinstance(softmax, bool):
        raise TypeError(f"softmax: expected True or False, got {softmax!r}")
    scale = _check.number("offset_scale", offset_scale)
    _check_tensors(value, sampling_locations, attention_weights, reference_points, each, softmax)
    if sampling_locations.dim() == 6:
        sampling_locations = sampling_locations.flatten(3, 4)
    if attention_weights is not None and attention_weights.dim() == 5:
        attention_weights = attention_weights.flatten(3)
    tensors = value, sampling_locations, attention_weights, reference_points
    if _transforms.need_plain_torch():
        return reference.ms_deform_attn(
            value, sizes, sampling_locations, attention_weights,
            points=each, softmax=softmax, reference_points=reference_points, offset_scale=scale,
        )  # fmt: skip
    return _op(*tensors, sizes, each, softmax, scale)


@_transforms.unrecorded
def _sizes(spatial_shapes: Sequence[Sequence[int]] | Tensor, value: Tensor) -> list[int]:
    """Return [H_0, W_0, H_1, W_1, ...], read from pairs or from a tensor, if these are the levels of `value`."""
    if isinstance(spatial_shapes, Tensor):
        pairs: Any = _numbers(spatial_shapes)
    elif isinstance(spatial_shapes, (str, int, dict, set, frozenset)) or not _check.is_long(spatial_shapes):
        raise TypeError(f"spatial_shapes: expected a pair (H, W) for each level, got {spatial_shapes!r}")
    else:
        pairs = spatial_shapes
    if not 1 <= len(pairs) <= MOST_LEVELS:
        raise ValueError(f"spatial_shapes: expected 1 to {MOST_LEVELS} levels, got {len(pairs)}")
    found: list[int] = []
    for level, pair in enumerate(pairs):
        if isinstance(pair, (str, int, torch.SymInt)) or not _check.is_long(pair) or len(pair) != 2:
            raise ValueError(f"spatial_shapes: expected a pair (H, W) for each level, got {pair!r} as number {level}")
        found += (_check.integer("spatial_shapes", size, 1) for size in pair)
    _check_levels(found, value)
    return found


def _check_levels(sizes: Sequence[int], value: Tensor) -> None:
    """Check that the levels are those of `value`, whatever the device: nothing behind this looks at them again."""
    _check.tensor(value, "value", 4, "[N, S, M, D]")
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    pixels = sum(h * w for h, w in pairs)
    if pixels != value.shape[1]:
        raise ValueError(
            f"spatial_shapes: expected levels with the S = {value.shape[1]} pixels of value together, got {pixels} in "
            f"{pairs}"
        )


def _numbers(table: Tensor) -> list[list[int]]:
    if table.dim() != 2 or table.shape[1] != 2:
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {tuple(table.shape)}")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"spatial_shapes: expected integers, got {table.dtype}")
    return _check.pairs_of("spatial_shapes", table)


@_transforms.unrecorded
def _points(
    points: Sequence[int] | None, levels: int, sampling_locations: Tensor, attention_weights: Tensor | None
) -> list[int]:
    """Return how many points each level has."""
    _check.tensor(sampling_locations, "sampling_locations", (6, 5), _LOCATIONS)
    if sampling_locations.dim() == 6 and sampling_locations.shape[3] != levels:
        raise ValueError(
            f"sampling_locations: expected {_LOCATIONS} with L = {levels}, got shape {tuple(sampling_locations.shape)}"
        )
    if attention_weights is not None:
        _check.tensor(attention_weights, "attention_weights", (5, 4), _WEIGHTS)
        if attention_weights.dim() == 5 and attention_weights.shape[3] != levels:
            raise ValueError(
                f"attention_weights: expected {_WEIGHTS} with L = {levels}, got shape {tuple(attention_weights.shape)}"
            )
    if sampling_locations.shape[-2] < 1:
        raise ValueError(
            f"sampling_locations: expected {_LOCATIONS} with 1 point or more, got shape "
            f"{tuple(sampling_locations.shape)}"
        )
    if points is not None:
        found = list(_check.integers("points", points, 1, (levels,)))
        if sampling_locations.dim() == 6 and any(p != sampling_locations.shape[4] for p in found):
            raise ValueError(
                f"points: expected {sampling_locations.shape[4]} for each level, as sampling_locations "
                f"{tuple(sampling_locations.shape)} have them, got {found}"
            )
        return found
    if sampling_locations.dim() == 6:
        return [sampling_locations.shape[4]] * levels
    count = sampling_locations.shape[3]
    if count % levels:
        raise ValueError(
            f"sampling_locations: expected a multiple of {levels} points, the same for each level, or the argument "
            f"points, got shape {tuple(sampling_locations.shape)}"
        )
    return [count // levels] * levels


@_transforms.unrecorded
def _check_tensors(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor | None,
    reference_points: Tensor | None,
    points: Sequence[int],
    softmax: bool,
) -> None:
    """Check the tensors as they came, so that a message has their own shape."""
    n, _, heads, channels = value.shape
    if 0 in (heads, channels):
        raise ValueError(f"value: expected heads and channels, got shape {tuple(value.shape)}")
    queries, count, each = sampling_locations.shape[1], sum(points), (len(points), points[0])
    if sampling_locations.dim() == 5 and sampling_locations.shape[3] != count:
        count = sampling_locations.shape[3]
        raise ValueError(f"points: expected {count} together, as sampling_locations have, got {list(points)}")
    expected: list[tuple[str, Tensor, tuple[Any, ...]]] = [
        (
            "sampling_locations", sampling_locations,
            (n, queries, heads, *(each if sampling_locations.dim() == 6 else (count,)), 2),
        )
    ]  # fmt: skip
    if attention_weights is not None:
        apart = attention_weights.dim() == 5
        if apart and any(p != points[0] for p in points):
            raise ValueError(
                f"attention_weights: expected [N, Q, M, K], since levels have different numbers of points "
                f"({list(points)}), got shape {tuple(attention_weights.shape)}"
            )
        shape = (n, queries, heads, *(each if apart else (count,)))
        expected.append(("attention_weights", attention_weights, shape))
    elif softmax:
        raise ValueError("attention_weights: expected logits for softmax=True, got None")
    if reference_points is not None:
        text = "[N, Q, L or 1, 2 or 4]"
        _check.tensor(reference_points, "reference_points", 4, text)
        levels, numbers = reference_points.shape[2:]
        if levels not in (len(points), 1) or numbers not in (2, 4):
            raise ValueError(
                f"reference_points: expected {text} with L = {len(points)}, got shape {tuple(reference_points.shape)}"
            )
        expected.append(("reference_points", reference_points, (n, queries, levels, numbers)))
    for name, tensor, shape in expected:
        _check.shape(tensor, name, shape)
        _check.same_dtype(tensor, name, value, or_float32=True, input_name="value")
        _check.same_device(tensor, name, value, input_name="value")


@_transforms.unrecorded
def _out_shape(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: list[int],
    points: list[int],
    softmax: bool,
    offset_scale: float,
) -> list[int]:
    if not 1 <= len(points) <= MOST_LEVELS:
        raise ValueError(f"points: expected 1 to {MOST_LEVELS} levels, got {len(points)}")
    _check.integers("points", points, 1, (len(points),))
    _check_levels(_check.integers("spatial_shapes", spatial_shapes, 1, (2 * len(points),)), value)
    # In the compiled operator the points of all levels lie side by side.
    _check.tensor(sampling_locations, "sampling_locations", 5, "[N, Q, M, K, 2]")
    if attention_weights is not None:
        _check.tensor(attention_weights, "attention_weights", 4, "[N, Q, M, K]")
    _check_tensors(value, sampling_locations, attention_weights, reference_points, points, softmax)
    return [value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]]


def _fold(own: set[str]) -> dict[str, int]:
    """Samples are queries beside each other where all of them have the same value, else images."""
    dim = 0 if "value" in own else 1
    queries = dict.fromkeys(("sampling_locations", "attention_weights", "reference_points", "out"), dim)
    return {"value": 0, **queries} if dim == 0 else queries


_op = register(
    "ms_deform_attn",
    positions=("sampling_locations", "attention_weights", "reference_points"),
    reference=reference.ms_deform_attn,
    out_shape=_out_shape,
    fold=_fold,
    images=False,
)


def _multiply_adds(value_shape: Sequence[int], locations_shape: Sequence[int]) -> int:
    """Four products of each bilinear sample."""
    n, queries, heads, points, _ = locations_shape
    return 4 * n * queries * heads * points * value_shape[3]


@register_flop_formula(torch.ops.dcn_plugin.ms_deform_attn)
def _(value_shape, locations_shape, *args, out_shape=None, **kwargs):
    """Count a product and a sum as two."""
    return 2 * _multiply_adds(value_shape, locations_shape)


@register_flop_formula(torch.ops.dcn_plugin.ms_deform_attn_backward)
def _(grad_shape, value_shape, locations_shape, *args, out_shape=None, **kwargs):
    """As many for the gradient of the value, and for those of points and weights together."""
    wanted = args[-1]
    others = WANTED["sampling_locations"] | WANTED["attention_weights"] | WANTED["reference_points"]
    return 2 * _multiply_adds(value_shape, locations_shape) * (bool(wanted & WANTED["value"]) + bool(wanted & others))
