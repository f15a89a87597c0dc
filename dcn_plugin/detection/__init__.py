"""Detectors of torchvision's kinds on timm backbones, with plain or deformable pooling of regions."""

try:
    from .faster_rcnn import build_detector, faster_rcnn, rfcn
    from .roi_pool import MultiScaleDeformRoIPool
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("dcn_plugin"):
        raise
    raise ModuleNotFoundError(
        f"dcn_plugin.detection needs {error.name}, which is not installed: pip install {error.name}", name=error.name
    ) from error

__all__ = ["MultiScaleDeformRoIPool", "build_detector", "faster_rcnn", "rfcn"]
