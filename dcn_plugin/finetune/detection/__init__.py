"""Fine-tuning of detectors with Lightning: data in COCO's format, module, and the embedded scenes."""

from .data import CocoDataModule
from .module import DetectionModule
from .scenes import draw_scene, write_scenes
from .writer import DetectionWriter

__all__ = ["CocoDataModule", "DetectionModule", "DetectionWriter", "draw_scene", "write_scenes"]
