"""Semantic segmentation on timm backbones: the deformable paper's DeepLab, and torchvision's DeepLabV3 and FCN."""

try:
    from .segmenters import Segmenter, build_segmenter, deeplab, deeplabv3, fcn
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("dcn_plugin"):
        raise
    raise ModuleNotFoundError(
        f"dcn_plugin.segmentation needs {error.name}, which is not installed: pip install {error.name}", name=error.name
    ) from error

__all__ = ["Segmenter", "build_segmenter", "deeplab", "deeplabv3", "fcn"]
