"""A task of fine-tuning: what belongs together in a config, a run, its predictions and its exported folder."""

from __future__ import annotations

from typing import NamedTuple

from ..export import Form
from .data import TunedData
from .module import TunedModule
from .writer import EpochWriter

__all__ = ["Task"]


class Task(NamedTuple):
    """What `run` is told of a task; `TASKS` of `run.py` has them by the names of their modules.

    Fields:
        module: builds the model from a config's top-level keys, trains and evaluates it, and says what an exported
            folder holds beside the weights (`TunedModule.described`).
        data: gives it the batches; its arguments are a config's `data`.
        writer: writes the predictions to a file.
        form: how an exported folder describes a model and builds it again (`to_spec`, `from_spec`); None where timm or
            MMEngine know the models by name.
    """

    module: type[TunedModule]
    data: type[TunedData]
    writer: type[EpochWriter]
    form: Form | None = None
