"""Layers under mmcv's names and with mmcv's arguments and numerics, for configs and checkpoints of mm* projects.

Beware: mmcv's DCNv2 masks with a plain sigmoid, so a fresh layer halves its output, and a plain ImageNet ResNet put
into such layers no longer computes what it was trained to. mmcv's checkpoints need just that, hence the default here.
`dcn_plugin.DCNv2` and the timm models use `mask_activation="2*sigmoid"`, which starts at 1;
`dict(type="DCNv2", mask_activation="2*sigmoid")` asks for the same in an mm* config.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..layers import DCNv1, DCNv2, MMCVMultiScaleDeformableAttention

IntPair = int | tuple[int, int]


def _offset_groups(deform_groups: int, options: dict[str, Any]) -> int:
    """Take mmcv's number of offset groups, under either name; the former one is removed from `options`."""
    former = options.pop("deformable_groups", None)
    if former is not None and deform_groups != 1:
        raise TypeError(
            f"deform_groups: expected either it or deformable_groups, its former name, got {deform_groups} and {former}"
        )
    return deform_groups if former is None else former


def build_dcn(
    in_channels: int,
    out_channels: int,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
    **options: Any,
) -> DCNv1:
    """Build a `DCNv1` layer from the arguments of mmcv's `DCN` (which has no bias; here it may).

    `im2col_step`, how many images mmcv works on at once, changes nothing here. `deform_groups` may have its former
    name, `deformable_groups`. Other options are those of `DCNv1`, as `offset_bound`.

    Example:
        >>> from dcn_plugin.mm import build_dcn
        >>> build_dcn(64, 64, 3, padding=1, deform_groups=4).conv_offset.out_channels  # 2 * 4 * 9
        72
    """
    options.update(offset_groups=_offset_groups(deform_groups, options))
    return DCNv1(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)


def build_dcnv2(
    in_channels: int,
    out_channels: int,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = True,
    mask_activation: str = "sigmoid",
    **options: Any,
) -> DCNv2:
    """Build a `DCNv2` layer from the arguments of mmcv's `DCNv2`, with mmcv's sigmoid mask: 0.5 at the start.

    `deform_groups` may have its former name, `deformable_groups`. Other options are those of `DCNv2`.

    Example:
        >>> from dcn_plugin.mm import build_dcnv2
        >>> build_dcnv2(64, 64, 3, padding=1, deform_groups=4).mask_activation
        'sigmoid'
    """
    options.update(offset_groups=_offset_groups(deform_groups, options), mask_activation=mask_activation)
    return DCNv2(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)


MMCV_CONVS: dict[str, Callable[..., nn.Module]] = {"DCN": build_dcn, "DCNv2": build_dcnv2}
MMCV_LAYERS: dict[str, Callable[..., nn.Module]] = {
    **MMCV_CONVS, "MultiScaleDeformableAttention": MMCVMultiScaleDeformableAttention,
}  # fmt: skip
"""mmcv's names, with what stands in their place where mmcv has no operators."""


def build_conv2(
    dcn: Mapping[str, Any] | None, in_channels: int, out_channels: int, stride: int, dilation: int
) -> nn.Module:
    """Build the 3x3 convolution of a residual block, deformable if `dcn` says so, as mmdet's ResNet does.

    `dcn` is `dict(type="DCN" | "DCNv2", deform_groups=1, fallback_on_stride=False, ...)` and is left as it is. With
    `fallback_on_stride` a convolution of stride > 1 stays plain: the option's original meaning (mmdet instead makes
    the first block it builds plain, whatever its stride). Raises ValueError for another `type`.
    """
    geometry: dict[str, Any] = dict(kernel_size=3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    options = dict(dcn or {})
    fallback = options.pop("fallback_on_stride", False) and stride > 1
    if dcn is None or fallback:
        return nn.Conv2d(in_channels, out_channels, **geometry)
    name = options.pop("type", None)
    if name not in MMCV_CONVS:
        raise ValueError(f"dcn: expected type out of {list(MMCV_CONVS)}, got {name!r} in {dict(dcn)!r}")
    return MMCV_CONVS[name](in_channels, out_channels, **geometry, **options)
