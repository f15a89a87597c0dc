"""For MMEngine and the packages on it: mmdet's ResNet, mmcv's layer names, any timm model as a backbone.

Importing it does not import MMEngine: `scope` does, for `dcn_plugin.registry`, and `hooks` and `optim`, which MMEngine
imports by itself on first use.
"""

from .layers import build_dcn, build_dcnv2
from .resnet import DCNResNet
from .timm_backbone import TimmBackbone

__all__ = ["DCNResNet", "TimmBackbone", "build_dcn", "build_dcnv2"]
