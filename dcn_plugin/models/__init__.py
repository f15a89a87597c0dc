"""Backbones: timm models (`dcn_resnet`), mmdet's ResNet (`dcn_resnet_mmdet`), any timm model for MMEngine configs.

Nothing here imports timm or MMEngine by itself; ``import dcn_plugin`` registers with those that are installed.
"""

from .dcn_mmcv import build_dcn, build_dcnv2
from .dcn_resnet_mmdet import DCNResNet
from .dcn_timm_backbone import TimmBackbone

__all__ = ["DCNResNet", "TimmBackbone", "build_dcn", "build_dcnv2"]
