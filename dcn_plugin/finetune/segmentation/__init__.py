"""Fine-tuning of semantic segmentation with Lightning: images with masks, module, and the embedded scenes."""

from ...export.forms import SEGMENTER
from ..task import Task
from .data import SegmentationDataModule
from .module import SegmentationModule
from .writer import MaskWriter

TASK = Task(SegmentationModule, SegmentationDataModule, MaskWriter, SEGMENTER)
"""What `run` trains where a config names `SegmentationModule`."""

__all__ = ["TASK", "MaskWriter", "SegmentationDataModule", "SegmentationModule"]
