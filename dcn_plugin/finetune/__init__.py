"""Fine-tuning with Lightning: modules, data, callbacks, export and the runner behind `scripts/finetune.py`."""

from __future__ import annotations

try:
    from ..export import export_model, load_exported
    from .callbacks import OffsetMonitor
    from .classification import FinetuneModule, ImageDataModule
    from .detection import CocoDataModule, DetectionModule
    from .digits import Digits
    from .freezing import BackboneFinetuning
    from .run import build, load_config, run
    from .segmentation import SegmentationDataModule, SegmentationModule
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("dcn_plugin"):
        raise
    raise ModuleNotFoundError(
        f"dcn_plugin.finetune needs {error.name}, which is not installed: pip install '.[finetune]' in a clone",
        name=error.name,
    ) from error

__all__ = [
    "BackboneFinetuning",
    "CocoDataModule",
    "DetectionModule",
    "Digits",
    "FinetuneModule",
    "ImageDataModule",
    "OffsetMonitor",
    "SegmentationDataModule",
    "SegmentationModule",
    "build",
    "export_model",
    "load_config",
    "load_exported",
    "run",
]
