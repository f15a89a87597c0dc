"""Programs of others that run on our operators without being edited.

An integration is a module of its own, which is imported only when it is asked for. Each has an entry, which puts ours
in place and returns what it replaced in one line, and a way to undo it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from .._config import unknown


class Integration(NamedTuple):
    """Where an integration is found, what has to be installed for it, and what it does."""

    module: str  # below dcn_plugin.integrations
    entry: str
    needs: str
    does: str

    def missing(self) -> str:
        """Return the package that it needs and that is not installed, or ''."""
        return "" if find_spec(self.needs) else self.needs


INTEGRATIONS = {
    "mmcv": Integration(
        "mmcv",
        "install",
        "mmcv",
        "mmcv.ops on an mmcv without compiled operators, for mmdet, mmseg and mmpretrain",
    ),
    "torchvision": Integration(
        "torchvision",
        "accelerate",
        "torchvision",
        "torchvision's own deform_conv2d and roi_align on our kernels",
    ),
    "transformers": Integration(
        "transformers",
        "accelerate",
        "transformers",
        "the deformable attention of transformers' detectors and segmenters on our operator",
    ),
    "ultralytics": Integration(
        "ultralytics",
        "accelerate",
        "ultralytics",
        "the deformable attention of ultralytics' RT-DETR on our operator",
    ),
    "rfdetr": Integration(
        "rfdetr",
        "accelerate",
        "rfdetr",
        "the deformable attention of rfdetr's detectors on our operator",
    ),
}
"""Name -> integration: `python -m dcn_plugin --accelerate NAME` and `enable` know these."""


def require(name: str) -> Integration:
    """Return the integration of that name.

    Args:
        name: one of `INTEGRATIONS`.

    Returns:
        What there is to know of it; nothing is imported or put in place.

    Raises:
        ValueError: there is none.
        ModuleNotFoundError: what it needs is not installed.

    Example:
        >>> from dcn_plugin.integrations import require
        >>> require("torchvision").does
        "torchvision's own deform_conv2d and roi_align on our kernels"
    """
    if name not in INTEGRATIONS:
        raise ValueError(unknown("integration", name, INTEGRATIONS))
    integration = INTEGRATIONS[name]
    if missing := integration.missing():
        raise ModuleNotFoundError(f"{name}: expected {missing} to be installed, got none", name=missing)
    return integration


def enable(name: str) -> str:
    """Put an integration in place; return what it replaced, in one line.

    Args:
        name: one of `INTEGRATIONS`.

    Raises:
        ValueError: there is no such integration.
        ModuleNotFoundError: what it needs is not installed.

    Example:
        >>> from dcn_plugin.integrations import enable, torchvision
        >>> "deform_conv2d and roi_align" in enable("torchvision")
        True
        >>> torchvision.uninstall()
    """
    integration = require(name)
    entry = getattr(import_module(f"{__name__}.{integration.module}"), integration.entry)
    return str(entry())
