"""MMEngine's view of this package: the registry scope `dcn_plugin`.

MMEngine imports this module by itself when a config says `type="dcn_plugin.<name>"`; no `custom_imports` needed.

Example:
    >>> from mmengine.registry import MODELS
    >>> MODELS.build(dict(type="dcn_plugin.DCNv2", in_channels=8, out_channels=8, kernel_size=3, padding=1)).kernel_size
    (3, 3)

`DCN` and `DCNv2` without a scope are mmcv's names. Where mmcv's compiled operators are installed they stay mmcv's;
elsewhere they mean this package's layers with mmcv's arguments and mmcv's sigmoid masks (see `mm.layers`), so
that `conv_cfg` and `dcn=dict(type="DCNv2", deform_groups=1)` of mm* models work. The decision looks at what is
installed, not at what is imported, so the order of imports does not matter. `dcn_plugin.MMCVDCN` and
`dcn_plugin.MMCVDCNv2` are the same two layers under names that are always ours. Under
`default_scope = "dcn_plugin"` a bare `DCNv2` is this package's own layer, with its own arguments and masks.
`MultiScaleDeformableAttention` is a third name of mmcv's, `dcn_plugin.MMCVMultiScaleDeformableAttention` the layer.

The RoI pooling layers are in our scope only: mmcv registers none, and mmdetection's RoI extractors do not look into a
registry for `roi_layer=dict(type=...)` but among the names in `mmcv.ops`, which this package does not touch.
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import mmengine.registry as _mmengine
from torch import nn

from .flops import register_with_mmengine
from .layers import LAYERS
from .mm import DCNResNet, TimmBackbone
from .mm.layers import MMCV_LAYERS
from .mm.scope import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["HOOKS", "MODELS", "OPTIM_WRAPPER_CONSTRUCTORS"]


def mmcv_has_ops() -> bool:
    """Tell whether an mmcv with compiled operators is installed, without importing it."""
    spec = find_spec("mmcv")
    return spec is not None and PathFinder.find_spec("mmcv._ext", spec.submodule_search_locations) is not None


def _build_multiscale_deform_roi_pool(**arguments: Any) -> nn.Module:
    """Build `MultiScaleDeformRoIPool`, which is imported only now because it needs torchvision."""
    from .detection import MultiScaleDeformRoIPool

    return MultiScaleDeformRoIPool(**arguments)


# What is registered: under our scope, and under mmcv's names.
SCOPED = {
    **LAYERS,
    "MultiScaleDeformRoIPool": _build_multiscale_deform_roi_pool,
    "DCNResNet": DCNResNet,
    "TimmBackbone": TimmBackbone,
    **{f"MMCV{name}": build for name, build in MMCV_LAYERS.items()},
}

for _name, _module in SCOPED.items():
    MODELS.register_module(name=_name, module=_module)


def fill_mmcvs_place() -> None:
    """Register our layers under mmcv's names, unless mmcv's own come."""
    if mmcv_has_ops() or "mmcv._ext" in sys.modules:
        return
    for name, module in MMCV_LAYERS.items():
        if name not in _mmengine.MODELS.module_dict:  # another package may fill mmcv's place
            _mmengine.MODELS.register_module(name=name, module=module)


def leave_mmcvs_place() -> None:
    """Take them away again, before mmcv registers its own."""
    for name, module in MMCV_LAYERS.items():
        if _mmengine.MODELS.module_dict.get(name) is module:
            del _mmengine.MODELS.module_dict[name]


fill_mmcvs_place()
register_with_mmengine()


def _watch_constructors(root: Any) -> Callable[[], None]:
    """Let MMEngine's constructors of optimizers say when `paramwise_cfg` means something else for our layers.

    The registry's function that builds them is wrapped, so nothing of MMEngine's is imported early or replaced; one
    built without `paramwise_cfg` stays as it is. Returns what takes the wrapper away again.
    """
    build = root.build_func

    @wraps(build)
    def build_and_watch(*args: Any, **kwargs: Any) -> Any:
        constructor = build(*args, **kwargs)
        if not getattr(constructor, "paramwise_cfg", None) or not hasattr(constructor, "add_params"):
            return constructor
        from .mm.optim import OptimWrapperConstructor, warn_of_other_rates

        if not isinstance(constructor, OptimWrapperConstructor):
            add = constructor.add_params

            def warn_and_add(params: list[dict], module: nn.Module, *others: Any, **options: Any) -> None:
                del constructor.add_params  # once: what is inside the model comes through the method itself
                warn_of_other_rates(constructor, module)
                add(params, module, *others, **options)

            constructor.add_params = warn_and_add
        return constructor

    def stop() -> None:
        root.build_func = build

    root.build_func = build_and_watch
    return stop


# Undone by calling it.
stop_watching_constructors = _watch_constructors(_mmengine.OPTIM_WRAPPER_CONSTRUCTORS)
