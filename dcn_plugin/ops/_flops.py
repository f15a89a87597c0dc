"""Operations of RoI pooling for `torch.utils.flop_counter`, which counts a product and a sum as two.

A sample is four products for each channel, a whole pixel of R-FCN's pooling one. How many there are depends on the
regions where sampling is adaptive, and in R-FCN's pooling. Where values cannot be read (fake tensors, a traced graph),
`UNKNOWN` samples, or pixels, of a bin along each axis are taken, as many as detectors usually sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ._operator import WANTED

UNKNOWN = 2


def _read(input: Tensor, rois: Tensor, vertical: Any, horizontal: Any, *_: Any) -> Tensor:
    """What `reference` would sum up: the samples of all bins that lie on the map."""
    return (vertical.read.sum(-1) * horizontal.read.sum(-1)).sum()


def _samples(rois: Tensor, output_size: Sequence[int], along: int, exactly: Callable[[], Tensor]) -> int:
    """Samples of all bins of all regions: `along` each axis, or, where that is 0, as the regions have it."""
    if along > 0 or type(rois) not in (Tensor, torch.nn.Parameter) or rois.is_meta:
        return rois.shape[0] * output_size[0] * output_size[1] * (along if along > 0 else UNKNOWN) ** 2
    return int(exactly())


def _deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, aligned):
    sizes = dict(output_size=output_size, spatial_scale=spatial_scale, aligned=aligned)
    samples = _samples(
        rois, output_size, sampling_ratio, lambda: reference.deform_roi_pool(input, rois, **sizes, pool=_read)
    )
    return 4 * samples * input.shape[1]


def _deform_ps_roi_pool(
    input, rois, offset, mask, output_dim, group_size, output_size, part_size, samples_per_part, *_
):  # fmt: skip
    return 4 * rois.shape[0] * output_size[0] * output_size[1] * samples_per_part**2 * output_dim


def _ps_roi_pool(input, rois, output_dim, group_size, output_size, spatial_scale):
    sizes = dict(output_dim=output_dim, group_size=group_size, output_size=output_size, spatial_scale=spatial_scale)
    return output_dim * _samples(rois, output_size, 0, lambda: reference.ps_roi_pool(input, rois, **sizes, pool=_read))


def _register(name: str, multiply_adds: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.dcn_plugin, name), get_raw=True)
    def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * multiply_adds(*args)

    @register_flop_formula(getattr(torch.ops.dcn_plugin, f"{name}_backward"), get_raw=True)
    def _(grad_output: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """As many for the gradient of the input, and for those of offset and mask together."""
        *given, wanted = args
        passes = bool(wanted & WANTED["input"]) + bool(wanted & (WANTED["offset"] | WANTED["mask"]))
        return 2 * multiply_adds(*given) * passes


for _name, _multiply_adds in (
    ("deform_roi_pool", _deform_roi_pool),
    ("deform_ps_roi_pool", _deform_ps_roi_pool),
    ("ps_roi_pool", _ps_roi_pool),
):
    _register(_name, _multiply_adds)
