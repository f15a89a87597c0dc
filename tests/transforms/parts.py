"""What tests of transforms share: samples for torch.func.vmap, and layers with what they are called with."""

import pytest
import torch
from cases import CASES
from torch import nn

from dcn_plugin import layers
from dcn_plugin.layers import (
    ActiveConv2d,
    AffineLinear,
    DAttention,
    DCNv1,
    DCNv2,
    DCNv2Pack,
    DCNv3,
    DCNv4,
    DeformMaxPool2dPack,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    MMCVMultiScaleDeformableAttention,
    ModulatedDeformRoIPoolPack,
    MSDeformAttn,
    SecondOrderDeformableAlignment,
    SpatialTransformer,
)

SAMPLES = 3
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def names_of(arguments: dict) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]


def batch_of(arguments: dict, names, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    """Different values of these arguments for each sample; regions move within their image."""
    batch = {}
    for name in names:
        value = torch.stack([arguments[name]] * samples)
        step = torch.arange(samples).to(value).view(-1, *[1] * (value.dim() - 1))
        if name == "rois":
            value[..., 1:] += step
        else:
            value += 0.1 * step * torch.randn_like(value)
        batch[name] = value
    return batch


def mapped(function, arguments: dict, names, in_dims=0):
    """vmap of the function of the arguments that `names` are."""
    return torch.func.vmap(lambda *t: function(**{**arguments, **dict(zip(names, t, strict=True))}), in_dims)


def sample(arguments: dict, batch: dict[str, torch.Tensor], i: int) -> dict:
    return {**arguments, **{name: value[i] for name, value in batch.items()}}


def _image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 8, 9)


def _rois() -> torch.Tensor:
    return torch.tensor([[0, 2.0, 3.0, 12.0, 11.0], [1, 0.0, 1.0, 9.5, 15.0], [0, 4.5, 2.5, 6.0, 14.0]])


def _localiser() -> nn.Module:
    """One that does not reach beyond the map, where borders have no gradient."""
    return nn.Sequential(nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), AffineLinear(5))


SHAPES = [(4, 6), (2, 3)]


class AtLevels(MSDeformAttn):
    """Called with tensors alone."""

    def forward(self, query, reference_points, input_flatten):
        return super().forward(query, reference_points, input_flatten, SHAPES, [0, 24])


class MMCVAtLevels(MMCVMultiScaleDeformableAttention):
    def forward(self, query, reference_points, value):
        return super().forward(query, value=value, reference_points=reference_points, spatial_shapes=SHAPES)


def _attended(numbers: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, 8), 0.3 + 0.4 * torch.rand(2, 5, 2, numbers), torch.randn(2, 30, 8)


LAYERS = {
    "DCNv1": lambda: (DCNv1(4, 6, 3, padding=1, offset_groups=2), (_image(4),)),
    "DCNv2": lambda: (DCNv2(4, 6, 3, padding=1, groups=2), (_image(4),)),
    "DeformRoIPoolPack": lambda: (DeformRoIPoolPack((2, 3), 8, 16, 0.5, 2), (_image(8), _rois())),
    "ModulatedDeformRoIPoolPack": lambda: (ModulatedDeformRoIPoolPack((2, 3), 8, 16, 0.5, 2), (_image(8), _rois())),
    "DeformPSRoIPoolPack": lambda: (
        DeformPSRoIPoolPack(2, 2, (2, 3), 0.5, deform_fc_channels=16, modulated=True), (_image(8), _rois())
    ),
    "MSDeformAttn": lambda: (AtLevels(8, 2, 2, (1, 3)), _attended(2)),
    "MMCVMultiScaleDeformableAttention": lambda: (
        MMCVAtLevels(8, 2, 2, 3, dropout=0.0, batch_first=True, value_proj_ratio=0.5), _attended(4)
    ),
    "DCNv3": lambda: (DCNv3(6, group=2, stride=2, center_feature_scale=True), (torch.randn(2, 7, 8, 6),)),
    "DCNv4": lambda: (DCNv4(6, group=2, dw_kernel_size=3, remove_center=True), (torch.randn(2, 49, 6),)),
    "DAttention": lambda: (DAttention(8, 4, 2, (8, 9), stride=2, offset_range_factor=0.5), (_image(8),)),
    # Divided by their lengths, the gradients of its moves would be no slopes.
    "ActiveConv2d": lambda: (ActiveConv2d(4, 6, 3, padding=1, offset_groups=2, normalise=False), (_image(4),)),
    "DeformMaxPool2dPack": lambda: (DeformMaxPool2dPack(4, 2, offset_groups=2), (_image(4),)),
    "DCNv2Pack": lambda: (DCNv2Pack(4, 6, 3, padding=1, offset_groups=2), (_image(4), _image(4))),
    "SecondOrderDeformableAlignment": lambda: (
        SecondOrderDeformableAlignment(4, 2, 3, offset_groups=2), (_image(4), _image(6), _image(2), _image(2))
    ),
    "SpatialTransformer": lambda: (SpatialTransformer(4, _localiser(), (5, 10), padding_mode="border"), (_image(4),)),
}  # fmt: skip
PREDICTING = {name for name, cls in layers.LAYERS.items() if getattr(cls, "offset_branches", {})}
assert LAYERS.keys() == PREDICTING, f"add rows to LAYERS of {__file__}: {', '.join(PREDICTING - LAYERS.keys())}"
each_layer = pytest.mark.parametrize("name", LAYERS)


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The layer, with samples that have moved, and its arguments."""
    torch.manual_seed(0)
    layer, inputs = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.to(dtype), tuple(t.to(dtype) for t in inputs)
