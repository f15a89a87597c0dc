"""Classifiers from a configuration: by timm's names, or MMEngine's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from .config import plain


def build_model(spec: str | Mapping[str, Any], num_classes: int | None = None) -> nn.Module:
    """Build a classifier from a timm name, `dict(name=<timm name>, ...)` or an MMEngine `dict(type=..., ...)`."""
    if isinstance(spec, str):
        spec = dict(name=spec)
    if not isinstance(spec, Mapping) or ("name" in spec) == ("type" in spec):
        raise ValueError(f"model: expected a timm name, dict(name=...) or an MMEngine dict(type=...), got {spec!r}")
    kwargs = plain(spec)
    if "type" in kwargs:
        from dcn_plugin.registry import MODELS

        return MODELS.build(kwargs)
    name = kwargs.pop("name")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*dcn*") or timm.list_models("*_dcn")
        raise ValueError(f"model: unknown timm model {name!r}; deformable ones close to it: {', '.join(close[:8])}")
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise TypeError(f"model: {name} does not take these arguments: {error}") from error
