"""Layers: `nn.Module` forms of the operators, with the signatures PyTorch users know.

A layer of a new kind, here or in code of your own, keeps the contract of `sampling.py`.
"""

from ._prefix import PrefixPredictor, prefix_note
from ._start import OffsetPredictor, ZeroLinear, warn_if_redrawn
from .active_conv import ActiveConv2d
from .alignment import DCNv2Pack, PCDAlignment, SecondOrderDeformableAlignment
from .attention import MMCVMultiScaleDeformableAttention, MSDeformAttn
from .branch import regions_of
from .conv import DCNv1, DCNv2, DeformConv2d, OffsetConv, accept_sibling_offset_keys
from .conv1d import DeformConv1d
from .dat import DAttention
from .dcnv3 import DCNv3, DCNv4
from .dilated import Dilated
from .max_pool import DeformMaxPool2d, DeformMaxPool2dPack
from .ps_roi import DeformPSRoIPool, DeformPSRoIPoolPack, PSRoIPool
from .roi import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from .samples import OffsetRate, Regions, Samples, SamplingHandle, Window
from .sampling import (
    SamplingModule,
    offset_parameters,
    offset_rates,
    rename_former_keys,
    reset_offsets,
    sampling_layers,
)
from .sampling_conv import SamplingConv
from .spatial_transformer import AffineConv2d, AffineLinear, SpatialTransformer

# A new layer file adds its classes here; so does whoever wants rules from a file to find a layer of their own.
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
        MSDeformAttn,
        MMCVMultiScaleDeformableAttention,
        DCNv3,
        DCNv4,
        DAttention,
        SpatialTransformer,
        ActiveConv2d,
        Dilated,
        DeformConv1d,
        DeformMaxPool2d,
        DeformMaxPool2dPack,
        DCNv2Pack,
        SecondOrderDeformableAlignment,
    )
}
"""The one list of layers, by name: converter, registries and documents walk it."""

__all__ = [
    "LAYERS",
    "ActiveConv2d",
    "AffineConv2d",
    "AffineLinear",
    "DCNv1",
    "DCNv2",
    "DCNv2Pack",
    "DCNv3",
    "DCNv4",
    "DAttention",
    "DeformConv1d",
    "DeformConv2d",
    "DeformMaxPool2d",
    "DeformMaxPool2dPack",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "Dilated",
    "MMCVMultiScaleDeformableAttention",
    "MSDeformAttn",
    "ModulatedDeformRoIPoolPack",
    "OffsetConv",
    "OffsetPredictor",
    "OffsetRate",
    "PCDAlignment",
    "PSRoIPool",
    "PrefixPredictor",
    "Regions",
    "Samples",
    "SamplingConv",
    "SamplingHandle",
    "SamplingModule",
    "SecondOrderDeformableAlignment",
    "SpatialTransformer",
    "Window",
    "ZeroLinear",
    "accept_sibling_offset_keys",
    "drop_ins",
    "offset_parameters",
    "offset_rates",
    "prefix_note",
    "regions_of",
    "rename_former_keys",
    "reset_offsets",
    "sampling_layers",
    "warn_if_redrawn",
]


def drop_ins() -> dict[str, type[SamplingModule]]:
    """Return the layers of `LAYERS` that may take a convolution's place, by name."""
    return {name: layer for name, layer in LAYERS.items() if issubclass(layer, SamplingModule) and layer.drop_in}
