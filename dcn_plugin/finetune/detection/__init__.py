"""Fine-tuning of detectors with Lightning: data in COCO's format, module, and the embedded scenes."""

from ...export.forms import DETECTOR
from ..scenes import draw_scene, write_scenes
from ..task import Task
from .data import CocoDataModule
from .module import DetectionModule
from .writer import DetectionWriter

TASK = Task(DetectionModule, CocoDataModule, DetectionWriter, DETECTOR)
"""What `run` trains where a config names `DetectionModule`."""

__all__ = ["TASK", "CocoDataModule", "DetectionModule", "DetectionWriter", "draw_scene", "write_scenes"]
