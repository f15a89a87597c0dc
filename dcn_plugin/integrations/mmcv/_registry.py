"""Who has mmcv's names in MMEngine's registry, and mmcv's modules in `sys.modules`, while the stand-in comes and goes.

`dcn_plugin.registry` has our layers under mmcv's names as long as mmcv's do not come. It is never imported here:
if nobody has, there is nothing of ours in the registry.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

# What `put_away` took, with the mmcv that it belongs to.
_modules: dict[str, ModuleType] = {}
_layers: dict[str, Any] = {}
_mmcv: list[ModuleType] = []


def _is_of_ops(name: str) -> bool:
    return name in ("mmcv._ext", "mmcv.ops") or name.startswith("mmcv.ops.")


def make_room() -> None:
    """Take our layers from the names that mmcv's are about to register."""
    if registry := sys.modules.get("dcn_plugin.registry"):
        registry.leave_mmcvs_place()


def put_away() -> None:
    """Remove `mmcv.ops` and its layers; ours come back under mmcv's names where they were."""
    _modules.update({name: module for name, module in sys.modules.items() if _is_of_ops(name)})
    for name in _modules:
        del sys.modules[name]
    if (mmcv := sys.modules.get("mmcv")) is not None:
        _mmcv.append(mmcv)
        for name in ("ops", "_ext"):
            vars(mmcv).pop(name, None)
    if _modules:
        from mmengine.registry import MODELS

        found = MODELS.module_dict
        _layers.update(
            {name: layer for name, layer in found.items() if _is_of_ops(str(getattr(layer, "__module__", "")))}
        )
        for name in _layers:
            del found[name]
    if registry := sys.modules.get("dcn_plugin.registry"):
        registry.fill_mmcvs_place()


def bring_back() -> None:
    """Undo `put_away`, unless mmcv itself has been imported anew since."""
    if _modules and _mmcv == [sys.modules.get("mmcv")]:
        from mmengine.registry import MODELS

        make_room()
        sys.modules.update(_modules)
        for name in ("ops", "_ext"):
            if (module := _modules.get(f"mmcv.{name}")) is not None:
                setattr(_mmcv[0], name, module)
        MODELS.module_dict.update(_layers)
    _modules.clear()
    _layers.clear()
    _mmcv.clear()
