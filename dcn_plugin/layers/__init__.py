"""Layers: ``nn.Module`` forms of the operators, with the signatures PyTorch users know."""

from .conv import DCNv1, DCNv2, DeformConv2d, OffsetConv, accept_sibling_offset_keys

# The one list of layers: converter, registries and docs walk it. A new layer file adds its classes here.
LAYERS: dict[str, type] = {cls.__name__: cls for cls in (DeformConv2d, DCNv1, DCNv2)}

__all__ = ["LAYERS", "DCNv1", "DCNv2", "DeformConv2d", "OffsetConv", "accept_sibling_offset_keys"]
