"""Fine-tuning of classifiers with Lightning: images in folders, lists or streams, module, and the embedded digits."""

from .data import ImageDataModule
from .module import FinetuneModule
from .writer import PredictionWriter

__all__ = ["FinetuneModule", "ImageDataModule", "PredictionWriter"]
