"""Fine-tuning with Lightning: modules, data, callbacks, export and the runner behind `scripts/finetune.py`."""

from __future__ import annotations

from .callbacks import OffsetMonitor
from .data import ImageDataModule
from .digits import Digits
from .export import export_model, load_exported
from .module import FinetuneModule
from .run import build, load_config, run

__all__ = [
    "Digits",
    "FinetuneModule",
    "ImageDataModule",
    "OffsetMonitor",
    "build",
    "export_model",
    "load_config",
    "load_exported",
    "run",
]
