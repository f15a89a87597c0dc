"""Pooling over regions of interest, plain and position-sensitive, with bins that move: the public functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check, _transforms
from ._operator import register

Rois = Tensor | Sequence[Tensor]
POOLING = ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")
"""Names of the operators that pool regions."""

_ROIS = "[R, 5] (batch index, x1, y1, x2, y2)"


def deform_roi_pool(
    input: Tensor,
    rois: Rois,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """Pool regions into bins that have each moved by a learnt offset: deformable RoI pooling.

        out(r, c, p) = mask(r, p) * mean over s of input(c, start(r) + p * bin(r) + gamma * size(r) * offset(r, p) + s)

    for a grid of bilinear samples s in bin p of region r. Without offset and mask it is RoIAlign, value for value. A
    sample within [-1, H] x [-1, W] (ends included) reads the nearest point of the map, any other counts as 0.

    Args:
        input: `[N, C, H, W]`; float64, float32, float16 or bfloat16; channels_last in, channels_last out.
        rois: `[R, 5]` of (batch index, x1, y1, x2, y2), or one `[L, 4]` of (x1, y1, x2, y2) for each image; in
            pixels of the image, which `spatial_scale` turns into the input's. No gradient flows to them.
        offset: `[R, 2, P_h, P_w]`, (y, x) in units of `gamma` times the size of the region; None: no shift.
        mask: `[R, 1, P_h, P_w]`, a factor for each bin; None: all ones.
        output_size: bins, int or (P_h, P_w).
        spatial_scale: input pixels per image pixel, for instance 1/16.
        sampling_ratio: samples of a bin along each axis; 0 or less takes ceil(bin size) of them.
        gamma: scale of the offsets.
        aligned: shift by half a pixel, so that pixel (i, j) covers [i, i + 1), and a region that is inside out
            (x2 < x1) is pooled backwards, with as many samples as `sampling_ratio` says, and 0 where that is 0;
            otherwise regions are at least 1 x 1.

    `rois`, `offset` and `mask` may be float32 beside a half-precision input.

    Returns:
        `[R, C, P_h, P_w]`.

    Raises:
        ValueError: a shape, size, device or region does not fit. TypeError: a type does not fit. Both name the
            argument. A region whose values cannot be looked at without waiting (on CUDA, in a compiled graph) and that
            names no image of the batch or is not finite, gives NaN and passes no gradient to the input.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import deform_roi_pool
        >>> input, rois = torch.randn(1, 4, 16, 16), torch.tensor([[0.0, 8.0, 8.0, 40.0, 56.0]])
        >>> offset = torch.zeros(1, 2, 7, 7)  # no shift: RoIAlign
        >>> deform_roi_pool(input, rois, offset, output_size=7, spatial_scale=0.25).shape
        torch.Size([1, 4, 7, 7])

    Source: Dai et al., Deformable Convolutional Networks (2017), eq. 6; Zhu et al., Deformable ConvNets v2 (2019),
    eq. 2 (mask); numbers as mmcv's `deform_roi_pool`.
    """
    size = _pair("output_size", output_size)
    scale = _check.number("spatial_scale", spatial_scale, positive=True)
    ratio = _count("sampling_ratio", sampling_ratio, -(2**31))
    gamma = _check.number("gamma", gamma)
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned: expected True or False, got {aligned!r}")
    _check.tensor(input, "input", 4, "[N, C, H, W]")
    given: dict[str, Any] = dict(
        input=input, rois=_as_tensor(rois, input), offset=offset, mask=mask, output_size=size, spatial_scale=scale,
        sampling_ratio=max(ratio, 0), gamma=gamma, aligned=aligned,
    )  # fmt: skip
    _shape_of_deform_roi_pool(**given)
    return _run(_deform_roi_pool, reference.deform_roi_pool, given)


def deform_ps_roi_pool(
    input: Tensor,
    rois: Rois,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    output_dim: int,
    group_size: int,
    output_size: int | Sequence[int],
    part_size: int | Sequence[int] | None = None,
    samples_per_part: int = 4,
    spatial_scale: float = 1.0,
    offset_scale: float = 0.1,
) -> Tensor:
    """Pool regions into bins that have moved, each from channels of its own: deformable position-sensitive pooling.

        out(r, d, p) = mask(r, class(d), p)
            * mean over s of input(c(d, p), start(r) + p * bin(r) + offset_scale * size(r) * offset(r, class(d), p) + s)

    with `c(d, p) = (d * group_size + g_y) * group_size + g_x` for the group (g_y, g_x) that bin p lies in. As in the
    original, corners are rounded (half away from zero) before scaling and the last pixel belongs to the region, sizes
    are at least 0.1 (those of regions that are inside out, too), samples start at the bin's own start, and the average
    is over those that lie within the input.

    Args:
        input: `[N, output_dim * group_size ** 2, H, W]`; any type and layout that `deform_roi_pool` takes.
        rois: as for `deform_roi_pool`.
        offset: `[R, 2 * classes, part_h, part_w]`, (y, x) for each class, in units of `offset_scale` times the
            size of the region. Output d belongs to class `d // (output_dim / classes)`. None: no shift.
        mask: `[R, classes, part_h, part_w]`, a factor for each class and part; None: all ones.
        output_dim: D, channels of the result.
        group_size: groups of channels along each axis.
        output_size: bins, int or (P_h, P_w).
        part_size: parts that have offsets, int or (part_h, part_w); None: one for each bin.
        samples_per_part: samples of a bin along each axis.
        spatial_scale: input pixels per image pixel.
        offset_scale: the scale of the offsets; the original's `trans_std`.

    Returns:
        `[R, output_dim, P_h, P_w]`.

    Raises:
        ValueError, TypeError: as for `deform_roi_pool`, and channels that are not output_dim * group_size ** 2.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import deform_ps_roi_pool
        >>> input, rois = torch.randn(1, 5 * 3 * 3, 16, 16), torch.tensor([[0.0, 8.0, 8.0, 40.0, 56.0]])
        >>> out = deform_ps_roi_pool(input, rois, output_dim=5, group_size=3, output_size=3, spatial_scale=0.25)
        >>> out.shape
        torch.Size([1, 5, 3, 3])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2, and the authors' DeformablePSROIPooling.
    """
    size = _pair("output_size", output_size)
    given: dict[str, Any] = dict(
        input=input, rois=None, offset=offset, mask=mask, output_dim=_check.integer("output_dim", output_dim, 1),
        group_size=_count("group_size", group_size), output_size=size,
        part_size=size if part_size is None else _pair("part_size", part_size),
        samples_per_part=_count("samples_per_part", samples_per_part),
        spatial_scale=_check.number("spatial_scale", spatial_scale, positive=True),
        offset_scale=_check.number("offset_scale", offset_scale),
    )  # fmt: skip
    _check.tensor(input, "input", 4, "[N, output_dim * group_size ** 2, H, W]")
    given["rois"] = _as_tensor(rois, input)
    _shape_of_deform_ps_roi_pool(**given)
    return _run(_deform_ps_roi_pool, reference.deform_ps_roi_pool, given)


def ps_roi_pool(
    input: Tensor,
    rois: Rois,
    *,
    output_dim: int,
    group_size: int,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Average the whole pixels of every bin, each bin from channels of its own: R-FCN's position-sensitive pooling.

        out(r, d, p) = mean over the pixels q of bin p of input(c(d, p), q)

    with channels as in `deform_ps_roi_pool`. Corners are rounded (half away from zero) before scaling and the
    last pixel belongs to the region; sizes are at least 0.1; a bin holds the pixels from the floor of its start to the
    ceiling of its end. A bin without pixels is 0. (torchvision's `ps_roi_pool` rounds after scaling and leaves the
    last pixel out.)

    Args:
        input: `[N, output_dim * group_size ** 2, H, W]`; any type and layout that `deform_roi_pool` takes.
        rois: as for `deform_roi_pool`.
        output_dim: D, channels of the result.
        group_size: groups of channels along each axis.
        output_size: bins, int or (P_h, P_w).
        spatial_scale: input pixels per image pixel.

    Returns:
        `[R, output_dim, P_h, P_w]`.

    Raises:
        ValueError, TypeError: as for `deform_ps_roi_pool`.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import ps_roi_pool
        >>> input, rois = torch.ones(1, 5 * 3 * 3, 16, 16), torch.tensor([[0.0, 8.0, 8.0, 40.0, 56.0]])
        >>> ps_roi_pool(input, rois, output_dim=5, group_size=3, output_size=3, spatial_scale=0.25).unique()
        tensor([1.])

    Source: Dai et al., R-FCN: Object Detection via Region-based Fully Convolutional Networks (2016), eq. 1.
    """
    given: dict[str, Any] = dict(
        input=input, rois=None, output_dim=_check.integer("output_dim", output_dim, 1),
        group_size=_count("group_size", group_size), output_size=_pair("output_size", output_size),
        spatial_scale=_check.number("spatial_scale", spatial_scale, positive=True),
    )  # fmt: skip
    _check.tensor(input, "input", 4, "[N, output_dim * group_size ** 2, H, W]")
    given["rois"] = _as_tensor(rois, input)
    _shape_of_ps_roi_pool(**given)
    return _run(_ps_roi_pool, reference.ps_roi_pool, given)


def _run(op: Any, definition: Any, given: dict[str, Any]) -> Tensor:
    _check_values(given["rois"], given["input"])
    if _transforms.need_plain_torch():
        return definition(**given)
    return op(*given.values())


def _count(name: str, value: Any, least: int = 1) -> int:
    return _check.integer(name, value, least, _check.MOST_OF_REGION)


def _pair(name: str, value: Any) -> list[int]:
    return list(_check.integers(name, value, 1, most=_check.MOST_OF_REGION))


def _as_tensor(rois: Rois, input: Tensor) -> Tensor:
    """Put the batch index before the boxes of each image, where they come as a list."""
    if not isinstance(rois, (list, tuple)):
        return rois  # type: ignore[return-value]
    _check.boxes(rois, "rois", input)
    if not rois:
        return input.new_empty(0, 5)
    return torch.cat([torch.nn.functional.pad(boxes, (1, 0), value=i) for i, boxes in enumerate(rois)])


@_transforms.unrecorded
def _check_values(rois: Tensor, input: Tensor) -> None:
    """Look at the regions themselves, where that is possible without waiting for a device or breaking a graph."""
    if rois.device.type != "cpu":
        return
    count, n = rois.shape[0], input.shape[0]

    def look(rois: Tensor) -> None:
        rois = rois.reshape(-1, 5)
        number = rois[:, 0]
        for wrong, what in (
            (~((number >= 0) & (number < n) & (number == number.trunc())), f"a batch index from 0 to {n - 1}"),
            (~rois.isfinite().all(1), "finite corners"),
        ):
            if wrong.any():
                i = int(wrong.nonzero()[0])
                raise ValueError(f"rois: expected {what}, got {rois[i].tolist()} in row {i % count}")

    _transforms.look_at(rois, look)


@_transforms.unrecorded
def _check_tensors(input: Tensor, rois: Tensor, shifts: Mapping[str, tuple[Tensor | None, str, Sequence[Any]]]) -> None:
    _check.tensor(input, "input", 4, "[N, C, H, W]")
    if 0 in input.shape[1:]:
        raise ValueError(f"input: expected channels and pixels, got shape {tuple(input.shape)}")
    _check.tensor(rois, "rois", 2, _ROIS)
    if rois.shape[1] != 5:
        raise ValueError(f"rois: expected shape {_ROIS}, got {tuple(rois.shape)}")
    _check.same_dtype(rois, "rois", input, or_float32=True)
    _check.same_device(rois, "rois", input)
    for name, (value, text, shape) in shifts.items():
        if value is not None:
            _check.tensor(value, name, 4, text)
            _check.shape(value, name, (rois.shape[0], *shape))
            _check.same_dtype(value, name, input, or_float32=True)
            _check.same_device(value, name, input)


@_transforms.unrecorded
def _check_groups(input: Tensor, output_dim: int, group_size: int) -> None:
    if input.shape[1] != output_dim * group_size**2:
        raise ValueError(
            f"input: expected output_dim * group_size ** 2 = {output_dim * group_size**2} channels, got shape "
            f"{tuple(input.shape)}"
        )


@_transforms.unrecorded
def _shape_of_deform_roi_pool(
    input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, output_size: list[int], **_: Any
) -> list[int]:
    shifts = {
        "offset": (offset, "[R, 2, P_h, P_w]", (2, *output_size)),
        "mask": (mask, "[R, 1, P_h, P_w]", (1, *output_size)),
    }
    _check_tensors(input, rois, shifts)
    return [rois.shape[0], input.shape[1], *output_size]


@_transforms.unrecorded
def _shape_of_deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_dim: int,
    group_size: int,
    output_size: list[int],
    part_size: list[int],
    **_: Any,
) -> list[int]:
    classes = None
    for name, value, each in (("offset", offset, 2), ("mask", mask, 1)):
        _check.require_dense(name, value)
        if not isinstance(value, Tensor) or value.dim() != 4:
            continue
        if value.shape[1] == 0 or value.shape[1] % each or output_dim % (value.shape[1] // each):
            raise ValueError(
                f"{name}: expected {'2 * ' * (each == 2)}classes channels with classes dividing output_dim = "
                f"{output_dim}, got shape {tuple(value.shape)}"
            )
        classes = value.shape[1] // each if classes is None else classes
    classes = classes or 1
    shifts = {
        "offset": (offset, "[R, 2 * classes, part_h, part_w]", (2 * classes, *part_size)),
        "mask": (mask, "[R, classes, part_h, part_w]", (classes, *part_size)),
    }
    _check_tensors(input, rois, shifts)
    _check_groups(input, output_dim, group_size)
    return [rois.shape[0], output_dim, *output_size]


@_transforms.unrecorded
def _shape_of_ps_roi_pool(
    input: Tensor, rois: Tensor, output_dim: int, group_size: int, output_size: list[int], **_: Any
) -> list[int]:
    _check_tensors(input, rois, {})
    _check_groups(input, output_dim, group_size)
    return [rois.shape[0], output_dim, *output_size]


def _fold(own: set[str]) -> dict[str, int]:
    """The regions of all samples are one list; their images too, unless all samples have the same."""
    regions = {"rois": 0, "offset": 0, "mask": 0, "out": 0}
    return {"input": 0, **regions} if "input" in own else regions


def _number_images(samples: dict[str, Tensor]) -> None:
    """Let regions name the images of their own sample, once the images of all samples are one batch."""
    if "input" not in samples:
        return
    rois, n = samples["rois"], samples["input"].shape[1]
    if rois.dtype in (torch.float16, torch.bfloat16):
        rois = rois.float()  # half precision does not hold every number of an image
    number, corners = rois.split((1, 4), -1)
    # What names no image must not name one of another sample.
    valid = (number >= 0) & (number < n) & (number == number.trunc())
    first = n * torch.arange(rois.shape[0], dtype=rois.dtype, device=rois.device)
    samples["rois"] = torch.cat([torch.where(valid, number + first[:, None, None], torch.nan), corners], -1)


_deform_roi_pool = register(
    "deform_roi_pool",
    positions=("rois", "offset", "mask"),
    reference=reference.deform_roi_pool,
    out_shape=_shape_of_deform_roi_pool,
    fold=_fold,
    prepare=_number_images,
)
_deform_ps_roi_pool = register(
    "deform_ps_roi_pool",
    positions=("rois", "offset", "mask"),
    reference=reference.deform_ps_roi_pool,
    out_shape=_shape_of_deform_ps_roi_pool,
    fold=_fold,
    prepare=_number_images,
)
_ps_roi_pool = register(
    "ps_roi_pool",
    positions=("rois",),
    reference=reference.ps_roi_pool,
    out_shape=_shape_of_ps_roi_pool,
    fold=_fold,
    prepare=_number_images,
)
