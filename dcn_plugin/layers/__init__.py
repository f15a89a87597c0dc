"""Layers: ``nn.Module`` forms of the operators, with the signatures PyTorch users know.

``MultiScaleDeformRoIPool`` is here, too; it is imported on first use, because it needs torchvision.
"""

from typing import TYPE_CHECKING, Any

from .conv import DCNv1, DCNv2, DeformConv2d, OffsetConv, accept_sibling_offset_keys
from .roi import (
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    PSRoIPool,
    offset_parameters,
)
from .sampling import Samples, SamplingHandle, SamplingModule, sampling_layers

if TYPE_CHECKING:
    from .multiscale_roi import MultiScaleDeformRoIPool as MultiScaleDeformRoIPool

# The one list of layers: converter, registries and docs walk it. A new layer file adds its classes here.
LAYERS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        DeformConv2d,
        DCNv1,
        DCNv2,
        DeformRoIPool,
        DeformRoIPoolPack,
        ModulatedDeformRoIPoolPack,
        PSRoIPool,
        DeformPSRoIPool,
        DeformPSRoIPoolPack,
    )
}

__all__ = [
    "LAYERS",
    "DCNv1",
    "DCNv2",
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformRoIPoolPack",
    "OffsetConv",
    "PSRoIPool",
    "Samples",
    "SamplingHandle",
    "SamplingModule",
    "accept_sibling_offset_keys",
    "offset_parameters",
    "sampling_layers",
]


def __getattr__(name: str) -> Any:
    if name != "MultiScaleDeformRoIPool":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .multiscale_roi import MultiScaleDeformRoIPool
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchvision":
            raise
        message = f"{name} needs torchvision, which is not installed: pip install torchvision"
        raise ModuleNotFoundError(message, name=error.name) from error
    return MultiScaleDeformRoIPool


def __dir__() -> list[str]:
    return sorted([*globals(), "MultiScaleDeformRoIPool"])
