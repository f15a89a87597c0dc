"""Fine-tuning of classifiers with Lightning: images in folders, lists or streams, module, and the embedded digits."""

from ..task import Task
from .data import ImageDataModule
from .module import FinetuneModule
from .writer import PredictionWriter

TASK = Task(FinetuneModule, ImageDataModule, PredictionWriter)
"""What `run` trains where a config names `FinetuneModule`."""

__all__ = ["TASK", "FinetuneModule", "ImageDataModule", "PredictionWriter"]
