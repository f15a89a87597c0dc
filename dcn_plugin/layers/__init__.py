"""Layers: `nn.Module` forms of the operators, with the signatures PyTorch users know."""

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

# A new layer file adds its classes here.
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
"""The one list of layers, by name: converter, registries and documents walk it."""

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
