"""Networks that no configuration makes of timm's and ours: a ResNet behind a spatial transformer, and one of DCNv3."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

from dcn_plugin.layers import DCNv3, SpatialTransformer

__all__ = ["AggregatingResNet", "TransformedResNet"]

GROUP_CHANNELS = 8


class TransformedResNet(ResNet):
    """timm's ResNet behind a spatial transformer of the image, with the border's pixels around it."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.transformer = SpatialTransformer(in_chans, padding_mode="border")

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(self.transformer(x))


class AggregatingResNet(ResNet):
    """timm's ResNet with a DCNv3 in place of `conv2` in conv3_x to conv5_x, in groups of `GROUP_CHANNELS` channels.

    A DCNv3 takes the place of depthwise convolutions. Here it takes that of full ones, for which its own projections
    make up: two 1x1 convolutions around the aggregation, which mix channels as a full convolution does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stage in (self.layer2, self.layer3, self.layer4):
            for block in stage:
                conv = block.conv2
                block.conv2 = DCNv3(
                    conv.in_channels,
                    conv.kernel_size[0],
                    pad=conv.padding[0],
                    dilation=conv.dilation[0],
                    group=conv.in_channels // GROUP_CHANNELS,
                    channels_first=True,
                )


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": dict(first_conv="conv1", classifier="fc", input_size=(3, 224, 224), pool_size=(7, 7))
        for name in ("resnet18_behind_transformer", "resnet18_of_dcnv3")
    }
)


def _create(cls: type[ResNet], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> ResNet:
    return build_model_with_cfg(cls, variant, pretrained, **dict(dict(block=BasicBlock, layers=(2, 2, 2, 2)), **kwargs))


@register_model
def resnet18_behind_transformer(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 behind a spatial transformer."""
    return _create(TransformedResNet, "resnet18_behind_transformer", pretrained, kwargs)


@register_model
def resnet18_of_dcnv3(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with DCNv3 in conv3_x to conv5_x."""
    return _create(AggregatingResNet, "resnet18_of_dcnv3", pretrained, kwargs)
