"""The operators in plain PyTorch: short, differentiable, the executable definitions the kernels are tested against."""

from .bilinear import bilinear_sample
from .deform_conv2d import deform_conv2d

__all__ = ["bilinear_sample", "deform_conv2d"]
