"""The operators, as functions of tensors. They need torch alone."""

from .. import _extension

_extension.load()

from . import _flops, _precision  # noqa: E402, F401  (register what the operators cost, and what the kernels ask)
from ._kernels import kernels_used  # noqa: E402  (registrations refer to schemas that the library defines)
from .deform_aggregate2d import deform_aggregate2d  # noqa: E402
from .deform_conv2d import deform_conv2d  # noqa: E402
from .ms_deform_attn import ms_deform_attn  # noqa: E402
from .roi_pool import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool  # noqa: E402

__all__ = [
    "deform_aggregate2d",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "kernels_used",
    "ms_deform_attn",
    "ps_roi_pool",
]
