"""Classifiers from a configuration: by timm's names, or MMEngine's types."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import timm
from torch import nn

from .._config import plain, require_timm_model


def build_model(spec: str | Mapping[str, Any], num_classes: int | None = None) -> nn.Module:
    """Build a classifier from a timm name, `dict(name=<timm name>, ...)` or an MMEngine `dict(type=..., ...)`."""
    if isinstance(spec, str):
        spec = dict(name=spec)
    if not isinstance(spec, Mapping) or ("name" in spec) == ("type" in spec):
        raise ValueError(f"model: expected a timm name, dict(name=...) or an MMEngine dict(type=...), got {spec!r}")
    kwargs = plain(spec)
    if "type" in kwargs:
        from ..registry import MODELS

        return MODELS.build(kwargs)
    name = kwargs.pop("name")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    require_timm_model("model", name)
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise TypeError(f"model: expected arguments that {name} takes, got {kwargs}: {error}") from error


def without_weights(spec: Any) -> Any:
    """Return a configuration with every `pretrained=True` and `checkpoint_path` taken out of it, nested ones too."""
    if isinstance(spec, Mapping):
        result = {key: without_weights(value) for key, value in spec.items() if key != "checkpoint_path"}
        return result | (dict(pretrained=False) if spec.get("pretrained") is True else {})
    return [without_weights(item) for item in spec] if isinstance(spec, (list, tuple)) else spec


def saved_spec(model: nn.Module, spec: Any) -> dict[str, Any] | None:
    """Return the MMEngine configuration that a file holds of a model; None for one of timm's, which needs none."""
    if hasattr(model, "pretrained_cfg"):
        return None
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ValueError(f"spec: expected the MMEngine config of a {type(model).__name__}, got {spec!r}")
    return plain(spec)


def build_saved(spec: Mapping[str, Any], instead: str) -> nn.Module:
    """Build the model of an MMEngine configuration that a file holds, without fetching weights (see the next one)."""
    check_saved_model(spec, instead)
    return build_model(without_weights(spec))


def check_saved_model(spec: Any, instead: str) -> None:
    """Raise ValueError where a file names a module that MMEngine would have to import from who knows where.

    MMEngine takes any import path for a `type`, so a file could have it call any function there is. From a file only
    names that are registered with MMEngine are taken, our scope's among them, and those in the registries of
    OpenMMLab's own packages, which MMEngine imports by itself. This holds for every `type` inside, too.

    Args:
        spec: the model that the file describes.
        instead: how to name the model without the file, for the message.
    """
    if not isinstance(spec, Mapping) or "type" not in spec:  # timm knows its models by name
        return
    for where, name in _types(spec, "model"):
        if not _is_registered(name, where.endswith("_scope_")):
            raise ValueError(
                f"{where}: expected a name that is registered with MMEngine, got {name!r} from the file: importing "
                "what a file names would run code (register the class before, with "
                f"@dcn_plugin.registry.MODELS.register_module(), or name it in {instead})"
            )


def _types(spec: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(spec, Mapping):
        for key, value in spec.items():
            if key in ("type", "_scope_"):
                yield f"{where}.{key}", value
            yield from _types(value, f"{where}.{key}")
    elif isinstance(spec, (list, tuple)):
        for number, item in enumerate(spec):
            yield from _types(item, f"{where}[{number}]")


def _is_registered(name: Any, as_scope: bool) -> bool:
    import mmengine.registry as mmengine
    from mmengine.config.utils import MODULE2PACKAGE

    from .. import registry  # noqa: F401  (our scope)

    if not isinstance(name, str):
        return False
    roots = [root for root in vars(mmengine).values() if isinstance(root, mmengine.Registry)]
    scope, real = (name, "") if as_scope else name.rpartition(".")[::2]
    if scope in MODULE2PACKAGE:
        try:
            import_module(f"{MODULE2PACKAGE[scope]}.registry")
        except ImportError:  # not installed
            return False
    if as_scope:
        return any(scope in (root.scope, *root.children) for root in roots)
    every = [node for root in roots for node in (root, *root.children.values())]
    nodes = [node for node in every if scope in ("", node.scope)]
    if any(real in node.module_dict for node in nodes):
        return True
    for node in nodes:  # some are filled on first use
        node.import_from_location()
    # MMEngine writes lazy configs with import paths; of what is registered, and imported already, they are names, too.
    found = getattr(sys.modules.get(scope), real, None)
    return any(real in node.module_dict for node in nodes) or (
        found is not None and any(found is item for node in every for item in node.module_dict.values())
    )
