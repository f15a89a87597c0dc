"""Hooks for MMEngine's Runner."""

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer

from .scope import HOOKS

__all__ = ["WeightsOnlyCheckpointHook"]


def _plain(value: Any) -> Any:
    """Turn what torch's safe loader refuses (numpy values, containers of other types) into plain Python and tensors."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        items = {_plain(key): _plain(item) for key, item in value.items()}
        return type(value)(items) if type(value) in (OrderedDict, Counter) else items
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    return value


def _stored(buffer: HistoryBuffer) -> dict[str, Any]:
    history, counts = buffer.data
    return {"log_history": history, "count_history": counts, "max_length": buffer.max_length}


class WeightsOnlyCheckpointHook(Hook):
    """Make the Runner's checkpoints loadable with `torch.load(..., weights_only=True)`, torch's default since 2.6.

    MMEngine 0.10.7 stores its log history as pickled `HistoryBuffer` objects, which the safe loader refuses: training
    runs, and `resume=True` or `load_from` of its checkpoint then fails with "Weights only load failed". This hook
    stores the history as tensors and restores it on resume, so nothing is lost. Such a checkpoint also loads without
    the hook (the log history is then skipped, with a warning); one written without it needs `weights_only=False`.

    Example:
        >>> custom_hooks = [dict(type="dcn_plugin.WeightsOnlyCheckpointHook")]

    MMEngine 0.10.7 also imports `pkg_resources`, which new versions of setuptools lack, for configs with
    `_base_ = "package::config.py"` and for `mmengine.utils.is_installed`. Relative `_base_` paths do not meet
    that; for the others: `pip install "setuptools<82"`.
    """

    priority = "VERY_LOW"  # after every hook that may add to the checkpoint

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace what the safe loader refuses, everywhere but in the weights themselves."""
        hub = checkpoint.get("message_hub")
        if hub:
            hub["log_scalars"] = {name: _stored(buffer) for name, buffer in hub["log_scalars"].items()}
        for key in checkpoint:
            if key != "state_dict":
                checkpoint[key] = _plain(checkpoint[key])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turn the stored log history back into the objects that MMEngine's message hub takes."""
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, stored in scalars.items():
            if isinstance(stored, dict):
                history, counts = (stored[key].cpu().numpy() for key in ("log_history", "count_history"))
                scalars[name] = HistoryBuffer(history, counts, stored["max_length"])


HOOKS.register_module(module=WeightsOnlyCheckpointHook)
