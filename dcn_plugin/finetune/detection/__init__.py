"""Fine-tuning of detectors with Lightning: data in COCO's format, module, and the embedded scenes."""

from .data import CocoDataModule
from .module import DetectionModule
from .scenes import draw_scene, write_scenes

__all__ = ["CocoDataModule", "DetectionModule", "draw_scene", "write_scenes"]
