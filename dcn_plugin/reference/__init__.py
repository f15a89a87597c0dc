"""The operators in plain PyTorch: short, differentiable, the executable definitions the kernels are tested against."""

from .bilinear import axis_weights, bilinear_sample
from .deform_aggregate2d import deform_aggregate2d
from .deform_conv2d import deform_conv2d
from .ms_deform_attn import ms_deform_attn
from .roi_pool import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool

__all__ = [
    "axis_weights",
    "bilinear_sample",
    "deform_aggregate2d",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "ms_deform_attn",
    "ps_roi_pool",
]
