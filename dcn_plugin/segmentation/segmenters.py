"""Semantic segmentation on timm backbones: the deformable paper's DeepLab, and torchvision's DeepLabV3 and FCN.

`deeplab`, `deeplabv3` and `fcn` return a `Segmenter`, whose parts are named as in torchvision's segmentation models.
`build_segmenter` makes one from a dict, for configs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from .._config import are_numbers, did_you_mean
from .._config import arguments as arguments_of
from ..detection.backbone import TimmMaps, hold_still, timm_maps, to_nchw

__all__ = ["SEGMENTERS", "Segmenter", "build_segmenter", "deeplab", "deeplabv3", "fcn"]

# What timm's models with a choice can be built for.
STRIDES = (8, 16, 32)


class Segmenter(nn.Module):
    """A timm model, a head that classifies each pixel of its last map, and perhaps another one before it.

    `model(images)` of images [N, C, H, W] in 0..1 is a dict of logits [N, num_classes, H, W]: `out`, and `aux` with an
    auxiliary head. Heads work at the maps' size; their logits are interpolated bilinearly, with pixels as areas
    (align_corners=False). Images are normalised here, by the backbone's mean and standard deviation.

    Keys of the state dict are those of torchvision's models: `backbone`, `classifier`, `aux_classifier`.

    Args:
        maps: the backbone.
        classifier: a module from its last map to logits [N, num_classes, h, w].
        aux_classifier: the same from the map before; None leaves it out.
        num_classes: as the heads have them.
        image_mean, image_std: one number for each channel; None takes the backbone's.

    Raises:
        ValueError: means or standard deviations that do not fit; in `forward`, images of another form.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        maps: TimmMaps,
        classifier: nn.Module,
        aux_classifier: nn.Module | None,
        num_classes: int,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_classifier = maps.body, classifier, aux_classifier
        self.num_classes, self.in_chans, self.output_stride = num_classes, maps.in_chans, maps.strides[-1]
        self.channels_last, self.frozen, self.norm_eval = maps.channels_last, maps.frozen, maps.norm_eval
        for name, given, own in (("image_mean", image_mean, maps.mean), ("image_std", image_std, maps.std)):
            values = own if given is None else given
            if not are_numbers(values) or len(values) != maps.in_chans:
                raise ValueError(f"{name}: expected one number for each of {maps.in_chans} channels, got {values!r}")
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std: expected numbers above 0, got {values!r}")
            # Not among the weights, so that their names are torchvision's.
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Segmenter:
        """Switch to training, but for frozen stages and, with `norm_eval`, batch norms of the backbone."""
        super().train(mode)
        if mode:
            hold_still(self.backbone, self.frozen, self.norm_eval)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return `out`, and `aux` with an auxiliary head, each [N, num_classes, H, W]."""
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.in_chans:
            got = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ValueError(f"images: expected [N, {self.in_chans}, H, W], got {got}")
        maps = to_nchw(self.backbone((images - self.image_mean) / self.image_std), self.channels_last)
        size = images.shape[-2:]
        result: dict[str, Tensor] = OrderedDict()
        result["out"] = _enlarge(self.classifier(maps[-1]), size)
        if self.aux_classifier is not None:
            result["aux"] = _enlarge(self.aux_classifier(maps[-2]), size)
        return result


def _enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _maps_of(
    backbone: str | Mapping[str, Any],
    output_stride: int | None,
    aux_loss: bool,
    trainable_layers: int | None,
    norm_eval: bool | None,
) -> TimmMaps:
    """Build the backbone for the last map, and the one before where it is needed, at the stride that is asked for."""
    given: dict[str, Any] = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if "output_stride" in given:
        got = given["output_stride"]
        raise ValueError(f"backbone: expected no output_stride, which is an argument beside it, got {got!r}")
    if output_stride is not None and output_stride not in STRIDES:
        raise ValueError(f"output_stride: expected 8, 16, 32 or None, got {output_stride!r}")
    given.setdefault("out_indices", (-2, -1) if aux_loss else (-1,))
    indices = given["out_indices"]
    if not isinstance(indices, Sequence) or not indices or not all(type(index) is int for index in indices):
        raise ValueError(f"backbone: expected out_indices of maps, as (-2, -1), got {indices!r}")
    chosen = {} if output_stride is None else dict(output_stride=output_stride)
    try:
        maps = timm_maps({**given, **chosen}, trainable_layers, norm_eval)
    except (AssertionError, IndexError) as error:  # timm's words for it, if they are about that
        raise ValueError(f"backbone: expected out_indices among its maps, got {indices!r} ({error})") from error
    except TypeError as error:
        if "output_stride" not in str(error):
            raise
        maps = timm_maps(given, trainable_layers, norm_eval)  # it has no choice; one of its maps may have that stride
    if output_stride not in (None, maps.strides[-1]):
        raise ValueError(
            f"output_stride: expected {maps.strides[-1]} or None, as the stride of {given['name']} cannot be chosen "
            f"(out_indices of the backbone chooses among its maps), got {output_stride}"
        )
    if aux_loss and len(maps.channels) < 2:
        raise ValueError(f"backbone: expected out_indices of two maps, as aux_loss needs both, got {indices!r}")
    return maps


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        least = 2 if name == "num_classes" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")


def _auxiliary(maps: TimmMaps, num_classes: int, aux_loss: bool) -> FCNHead | None:
    return FCNHead(maps.channels[-2], num_classes) if aux_loss else None


def deeplab(
    num_classes: int,
    backbone: str | Mapping[str, Any] | None = None,
    *,
    output_stride: int | None = 16,
    head_channels: int = 1024,
    aux_loss: bool = False,
    trainable_backbone_layers: int | None = None,
    norm_eval: bool | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Segmenter:
    """Return the DeepLab of the deformable papers: a 1x1 convolution and ReLU, a 1x1 convolution to the classes.

    `out = enlarge(score(relu(fc(C5(images)))))`, with a last stage of stride 1 whose taps lie apart in turn, and
    deformable convolutions in it. Both convolutions start from a normal distribution of 0.01, biases from 0.

    Args:
        num_classes: classes of pixels, with a background where there is one.
        backbone: name of a timm model, or `dict(name=..., **arguments)` such as `pretrained=True`,
            `checkpoint_path=...`, `in_chans=1`, `dcn_stages`, `out_indices` (default: the last map, with `aux_loss` the
            last two). None is the paper's: `dict(name="resnet101_dcnv1", dcn_stages=(5,))`.
        output_stride: pixels of the image per pixel of the last map, 8, 16 or 32. None takes what the model has, which
            models without a choice need (InternImage, DAT).
        head_channels: channels between the two convolutions.
        aux_loss: add torchvision's `FCNHead` on the map before the last.
        trainable_backbone_layers: how many stages of the backbone train, counted from the last; by default 3 for a
            pretrained backbone, as in the original, and all for another.
        norm_eval: keep the backbone's batch norms at their stored statistics; by default for a pretrained backbone.
        image_mean, image_std: normalisation of the images; by default the backbone's.

    Raises:
        TypeError, ValueError: a wrong value, or a stride that the backbone cannot have, by name.

    Example:
        >>> import torch
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> model = deeplab(21, tiny, output_stride=8, head_channels=16).eval()
        >>> model(torch.rand(1, 3, 65, 80))["out"].shape
        torch.Size([1, 21, 65, 80])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 4.1; Chen et al., DeepLab (2016).
    """
    _check_counts(num_classes=num_classes, head_channels=head_channels)
    backbone = dict(name="resnet101_dcnv1", dcn_stages=(5,)) if backbone is None else backbone
    maps = _maps_of(backbone, output_stride, aux_loss, trainable_backbone_layers, norm_eval)
    convolutions = [nn.Conv2d(maps.channels[-1], head_channels, 1), nn.Conv2d(head_channels, num_classes, 1)]
    for layer in convolutions:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, layer.bias))
    head = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])
    return Segmenter(maps, head, _auxiliary(maps, num_classes, aux_loss), num_classes, image_mean, image_std)


def deeplabv3(
    num_classes: int,
    backbone: str | Mapping[str, Any] = "resnet50_dcn",
    *,
    output_stride: int | None = 8,
    atrous_rates: Sequence[int] = (12, 24, 36),
    aux_loss: bool = False,
    trainable_backbone_layers: int | None = None,
    norm_eval: bool | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Segmenter:
    """Return torchvision's DeepLabV3 on a timm model: its `DeepLabHead`, with `FCNHead` as auxiliary head.

    On a plain ResNet it is torchvision's model, name by name. A training batch has at least two images, as batch norm
    of the head's pooled branch needs them.

    Args:
        num_classes, backbone, output_stride, aux_loss: as in `deeplab`.
        atrous_rates: dilations of the head's parallel 3x3 convolutions; those of the default are meant for stride 8,
            half of them for 16.
        trainable_backbone_layers, norm_eval, image_mean, image_std: as in `deeplab`.

    Example:
        >>> import torch
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> sorted(deeplabv3(3, tiny, aux_loss=True)(torch.rand(2, 3, 64, 64)))
        ['aux', 'out']

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation (2017).
    """
    _check_counts(num_classes=num_classes)
    rates = list(atrous_rates) if isinstance(atrous_rates, Sequence) else []
    if not rates or not all(isinstance(rate, int) and rate >= 1 for rate in rates):
        raise ValueError(f"atrous_rates: expected positive integers, as (12, 24, 36), got {atrous_rates!r}")
    maps = _maps_of(backbone, output_stride, aux_loss, trainable_backbone_layers, norm_eval)
    head = DeepLabHead(maps.channels[-1], num_classes, rates)
    return Segmenter(maps, head, _auxiliary(maps, num_classes, aux_loss), num_classes, image_mean, image_std)


def fcn(
    num_classes: int,
    backbone: str | Mapping[str, Any] = "resnet50_dcn",
    *,
    output_stride: int | None = 8,
    aux_loss: bool = False,
    trainable_backbone_layers: int | None = None,
    norm_eval: bool | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Segmenter:
    """Return torchvision's FCN on a timm model: its `FCNHead`, once more as auxiliary head.

    Args:
        num_classes, backbone, output_stride, aux_loss: as in `deeplab`.
        trainable_backbone_layers, norm_eval, image_mean, image_std: as in `deeplab`.

    Example:
        >>> import torch
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> fcn(3, tiny, output_stride=16).eval()(torch.rand(1, 3, 64, 64))["out"].shape
        torch.Size([1, 3, 64, 64])

    Source: Long et al., Fully Convolutional Networks for Semantic Segmentation (2015), as torchvision has it.
    """
    _check_counts(num_classes=num_classes)
    maps = _maps_of(backbone, output_stride, aux_loss, trainable_backbone_layers, norm_eval)
    head = FCNHead(maps.channels[-1], num_classes)
    return Segmenter(maps, head, _auxiliary(maps, num_classes, aux_loss), num_classes, image_mean, image_std)


SEGMENTERS: dict[str, Callable[..., Segmenter]] = {"deeplab": deeplab, "deeplabv3": deeplabv3, "fcn": fcn}
"""What `build_segmenter` builds, by name."""


def build_segmenter(spec: Mapping[str, Any]) -> Segmenter:
    """Return the segmenter of `dict(name="deeplab" | "deeplabv3" | "fcn", num_classes=..., **its arguments)`.

    Raises:
        TypeError, ValueError: another name, an argument that it does not take, no number of classes.

    Example:
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
        >>> build_segmenter(dict(name="fcn", num_classes=3, backbone=tiny)).output_stride
        8
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec: expected dict(name=..., num_classes=..., ...), got {spec!r}")
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in SEGMENTERS:
        raise ValueError(f"name: expected a segmenter out of {', '.join(SEGMENTERS)}, got {name!r}")
    known = arguments_of(SEGMENTERS[name])
    for key in arguments:
        if key not in known:
            raise TypeError(f"{name}: expected arguments {', '.join(known)}, got {key!r}{did_you_mean(key, known)}")
    if "num_classes" not in arguments:
        raise ValueError(f"num_classes: expected a number for {name}, got none")
    return SEGMENTERS[name](**arguments)
