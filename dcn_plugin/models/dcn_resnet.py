"""timm's ResNets with a deformable 3x3 convolution in every block of the chosen stages.

Each `<base>_dcn` (DCNv2) and `<base>_dcnv1` entry is timm's `<base>` with `conv2` of its blocks replaced. A
fresh or pretrained model computes exactly what the base computes, as every offset starts at zero and every mask at one.
`pretrained=True` therefore loads the base model's own published weights, under the base's own tags
(`timm.create_model("resnet50_dcn.a1_in1k", pretrained=True)`).

Example:
    >>> import timm, dcn_plugin
    >>> model = timm.create_model("resnet18_dcn", dcn_stages=(4, 5), dcn_layer=dict(type="DCNv2", offset_bound=8.0))
    >>> type(model.layer2[0].conv2).__name__, type(model.layer3[0].conv2).__name__
    ('Conv2d', 'DCNv2')

Keyword arguments of every entry, besides those of `timm.models.resnet.ResNet`:

- `dcn_stages`: stages to make deformable, in the paper's numbering 2..5 for conv2_x..conv5_x (timm's layer1..layer4),
  or as those layer names. Default (3, 4, 5), as in Deformable ConvNets v2.
- `dcn_layer`: `"DCNv1"`, `"DCNv2"`, or `dict(type=..., **options of that layer)`.
- `offset_groups`: channel groups that share one offset field.

Sources: https://arxiv.org/abs/1703.06211 (v1), https://arxiv.org/abs/1811.11168 (v2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..layers import (
    LAYERS,
    SamplingConv,
    SamplingModule,
    accept_sibling_offset_keys,
    drop_ins,
    offset_parameters,
    reset_offsets,
)

__all__ = ["DeformResNet"]

# Arguments that tell one base from another; the rest is timm's default.
_BASES: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    "resnet152": dict(block=Bottleneck, layers=(3, 8, 36, 3)),
    "resnet50d": dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_width=32, stem_type="deep", avg_down=True),
    "resnext50_32x4d": dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    "wide_resnet50_2": dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128),
}

_LAYER_OF_SUFFIX = {"dcn": "DCNv2", "dcnv1": "DCNv1"}
_STAGES: dict[Any, str] = {stage: f"layer{stage - 1}" for stage in (2, 3, 4, 5)}
_STAGES |= {name: name for name in tuple(_STAGES.values())}


class DeformResNet(ResNet):
    """timm's ResNet whose blocks have a deformable `conv2` in the stages given by `dcn_stages` (see the module).

    Input [N, C, H, W], output [N, num_classes]. Raises ValueError or TypeError naming a bad `dcn_*` argument.
    """

    def __init__(
        self,
        *args: Any,
        dcn_stages: Sequence[int | str] = (3, 4, 5),
        dcn_layer: str | Mapping[str, Any] = "DCNv2",
        offset_groups: int = 1,
        **kwargs: Any,
    ) -> None:
        stages = _resolve_stages(dcn_stages)
        from_conv = _resolve_layer(dcn_layer, offset_groups)
        super().__init__(*args, **kwargs)
        for stage in stages:
            for block in getattr(self, stage):
                block.conv2 = from_conv(block.conv2)
        accept_sibling_offset_keys(self)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Draw fresh weights as timm does, and let every deformable layer start as the plain convolution again."""
        super().init_weights(zero_init_last)
        reset_offsets(self)


# timm's fx feature extractor takes a deformable layer as one node.
for _layer in (SamplingModule, *LAYERS.values()):
    register_notrace_module(_layer)


def _resolve_stages(dcn_stages: Sequence[int | str]) -> list[str]:
    if isinstance(dcn_stages, (str, int)) or not isinstance(dcn_stages, Sequence):
        raise TypeError(f"dcn_stages: expected a sequence such as (3, 4, 5), got {dcn_stages!r}")
    unknown = [stage for stage in dcn_stages if stage not in _STAGES]
    if unknown:
        raise ValueError(f"dcn_stages: expected stages out of {list(_STAGES)}, got {unknown[0]!r} in {dcn_stages!r}")
    return sorted({_STAGES[stage] for stage in dcn_stages})


def _resolve_layer(dcn_layer: str | Mapping[str, Any], offset_groups: int) -> Callable[[nn.Conv2d], nn.Module]:
    if not isinstance(dcn_layer, (str, Mapping)):
        raise TypeError(f"dcn_layer: expected a layer name or dict(type=..., ...), got {dcn_layer!r}")
    options: dict[str, Any] = {"type": dcn_layer} if isinstance(dcn_layer, str) else dict(dcn_layer)
    name = options.pop("type", None)
    known = {kind: layer for kind, layer in drop_ins().items() if issubclass(layer, SamplingConv)}
    if name not in known:
        raise ValueError(f"dcn_layer: expected type out of {list(known)}, got {name!r} in {dcn_layer!r}")
    if options.setdefault("offset_groups", offset_groups) != offset_groups and offset_groups != 1:
        got = f"{options['offset_groups']} and {offset_groups}"
        raise ValueError(f"offset_groups: expected one value, got {got} (in dcn_layer and as a keyword argument)")
    return partial(known[name].from_conv, **options)


def _accept_base_weights(state_dict: dict[str, Tensor], model: nn.Module, features_only: bool) -> dict[str, Tensor]:
    """Let base weights, which know no offsets, load; anything else that is missing or unknown is an error by name.

    timm itself turns its strict check off as soon as the number of classes differs, hence a check of our own.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")]
    predicting = offset_parameters(model)
    offsets = [key for key in missing if key in predicting]
    if len(offsets) < len(predicting):
        offsets = []  # some are there: the weights are those of another deformable model
    cfg: Any = model.pretrained_cfg
    other_head = features_only or model.num_classes != cfg["num_classes"]
    head = f"{cfg['classifier']}." if other_head else "\0"
    missing = [key for key in missing if key not in offsets and not key.startswith(head)]
    unexpected = [key for key in state_dict if key not in own and not key.startswith(head)]
    if missing or unexpected:
        raise RuntimeError(
            f"pretrained: expected the weights of {cfg['architecture']}'s base, or of a deformable model with the same "
            "dcn_stages and dcn_layer (dcn_plugin.load_checkpoint reads other layouts), got some with "
            f"missing keys {missing}, unexpected keys {unexpected}"
        )
    return {**state_dict, **{key: own[key] for key in offsets}}


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    base, _, suffix = variant.rpartition("_")
    accept = partial(_accept_base_weights, features_only=bool(kwargs.get("features_only")))
    model_args = dict(_BASES[base], dcn_layer=_LAYER_OF_SUFFIX[suffix])
    return build_model_with_cfg(
        DeformResNet, variant, pretrained, pretrained_filter_fn=accept, **dict(model_args, **kwargs)
    )


# The bases' own weights and preprocessing, tag by tag, the base's default tag first.
default_cfgs = generate_default_cfgs(
    {
        f"{base}_{suffix}.{cfg.tag}": replace(cfg, architecture=None, tag=None)
        for base in _BASES
        for suffix in _LAYER_OF_SUFFIX
        for cfg in get_arch_pretrained_cfgs(base).values()
    }
)


@register_model
def resnet18_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-18 with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet18_dcn", pretrained, **kwargs)


@register_model
def resnet18_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-18 with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet18_dcnv1", pretrained, **kwargs)


@register_model
def resnet34_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-34 with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet34_dcn", pretrained, **kwargs)


@register_model
def resnet34_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-34 with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet34_dcnv1", pretrained, **kwargs)


@register_model
def resnet50_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-50 with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet50_dcn", pretrained, **kwargs)


@register_model
def resnet50_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-50 with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet50_dcnv1", pretrained, **kwargs)


@register_model
def resnet101_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-101 with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet101_dcn", pretrained, **kwargs)


@register_model
def resnet101_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-101 with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet101_dcnv1", pretrained, **kwargs)


@register_model
def resnet152_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-152 with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet152_dcn", pretrained, **kwargs)


@register_model
def resnet152_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-152 with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet152_dcnv1", pretrained, **kwargs)


@register_model
def resnet50d_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-50-D with DCNv2 in conv3_x to conv5_x."""
    return _create("resnet50d_dcn", pretrained, **kwargs)


@register_model
def resnet50d_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNet-50-D with DCNv1 in conv3_x to conv5_x."""
    return _create("resnet50d_dcnv1", pretrained, **kwargs)


@register_model
def resnext50_32x4d_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNeXt-50-32x4d with DCNv2 in conv3_x to conv5_x."""
    return _create("resnext50_32x4d_dcn", pretrained, **kwargs)


@register_model
def resnext50_32x4d_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """ResNeXt-50-32x4d with DCNv1 in conv3_x to conv5_x."""
    return _create("resnext50_32x4d_dcnv1", pretrained, **kwargs)


@register_model
def wide_resnet50_2_dcn(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """Wide ResNet-50-2 with DCNv2 in conv3_x to conv5_x."""
    return _create("wide_resnet50_2_dcn", pretrained, **kwargs)


@register_model
def wide_resnet50_2_dcnv1(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
    """Wide ResNet-50-2 with DCNv1 in conv3_x to conv5_x."""
    return _create("wide_resnet50_2_dcnv1", pretrained, **kwargs)
