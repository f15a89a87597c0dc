"""A ResNet backbone with mmdet's arguments, state dict and numerics, needing neither mmdet nor mmcv nor MMEngine."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..layers import SamplingConv, accept_sibling_offset_keys, reset_offsets
from .layers import build_conv2

_DEPTHS: dict[int, tuple[bool, tuple[int, ...]]] = {  # depth: (bottleneck blocks?, blocks per stage)
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
_NORMS: dict[str, tuple[str, type[nn.Module]]] = {  # type: (name in the state dict, class)
    "BN": ("bn", nn.BatchNorm2d),
    "SyncBN": ("bn", nn.SyncBatchNorm),
    "GN": ("gn", nn.GroupNorm),
}


def _build_norm(norm_cfg: Mapping[str, Any], channels: int) -> tuple[str, nn.Module]:
    options = dict(norm_cfg)
    kind, requires_grad = options.pop("type", None), options.pop("requires_grad", True)
    if kind not in _NORMS:
        raise ValueError(f"norm_cfg: expected type out of {list(_NORMS)}, got {kind!r} in {dict(norm_cfg)!r}")
    name, norm_class = _NORMS[kind]
    key = "num_channels" if kind == "GN" else "num_features"
    norm = norm_class(**{key: channels}, **options)
    norm.requires_grad_(requires_grad)
    return name, norm


class _Block(nn.Module):
    """A residual block: `convs`, each followed by a norm, around a shortcut."""

    def __init__(
        self, convs: Sequence[nn.Module], norm_cfg: Mapping[str, Any], downsample: nn.Module | None, with_cp: bool
    ) -> None:
        super().__init__()
        self.names: list[tuple[str, str]] = []
        for number, conv in enumerate(convs, start=1):
            norm_name, norm = _build_norm(norm_cfg, conv.out_channels)  # type: ignore[arg-type]
            self.names.append((f"conv{number}", f"{norm_name}{number}"))
            self.add_module(f"conv{number}", conv)
            self.add_module(f"{norm_name}{number}", norm)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.with_cp = with_cp

    @property
    def last_norm(self) -> nn.Module:
        return getattr(self, self.names[-1][1])

    def _residual(self, x: Tensor) -> Tensor:
        out = x
        for conv, norm in self.names[:-1]:
            out = self.relu(getattr(self, norm)(getattr(self, conv)(out)))
        conv, norm = self.names[-1]
        out = getattr(self, norm)(getattr(self, conv)(out))
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint(self._residual, x, use_reentrant=False))
        return self.relu(self._residual(x))


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)


def _check_choices(depth: int, num_stages: int, style: str, frozen_stages: int, out_indices: Sequence[int]) -> None:
    if depth not in _DEPTHS:
        raise ValueError(f"depth: expected one of {list(_DEPTHS)}, got {depth!r}")
    if num_stages not in (1, 2, 3, 4):
        raise ValueError(f"num_stages: expected 1 to 4, got {num_stages!r}")
    if style not in ("pytorch", "caffe"):
        raise ValueError(f"style: expected 'pytorch' or 'caffe', got {style!r}")
    if frozen_stages not in range(-1, num_stages + 1):
        raise ValueError(f"frozen_stages: expected -1 to {num_stages} (num_stages), got {frozen_stages!r}")
    if not isinstance(out_indices, Sequence):
        raise TypeError(f"out_indices: expected a sequence of stages such as (0, 1, 2, 3), got {out_indices!r}")
    if not out_indices or any(index not in range(num_stages) for index in out_indices):
        raise ValueError(f"out_indices: expected stages out of 0..{num_stages - 1}, got {out_indices!r}")


def _check_per_stage(num_stages: int, **arguments: Sequence[Any]) -> None:
    for name, values in arguments.items():
        if not isinstance(values, Sequence):
            raise TypeError(f"{name}: expected {num_stages} values (num_stages), got {values!r}")
        if len(values) != num_stages:
            raise ValueError(f"{name}: expected {num_stages} values (num_stages), got {values!r}")


class DCNResNet(nn.Module):
    """mmdet's ResNet backbone: input [N, in_channels, H, W], output a tuple with the maps of stages `out_indices`.

    Stage i (0..3, mmdet's numbering; the paper's conv2_x..conv5_x) has `base_channels * 2**i` planes, four times as
    many output channels from depth 50 on, and stride 4 * strides[0] * ... * strides[i]. State dict keys are mmdet's.

    **Masks follow mmcv**: `dcn=dict(type="DCNv2")` starts with masks of 0.5, as mmdet's checkpoints need; add
    `mask_activation="2*sigmoid"` to start from plain ImageNet weights without changing what they compute.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stem_channels: channels after the stem; default `base_channels`.
        strides, dilations: of the stages, `num_stages` numbers each.
        style: where a bottleneck block has its stride: "pytorch" in the 3x3, "caffe" in the first 1x1 convolution.
        deep_stem: three 3x3 convolutions instead of a 7x7 one.
        avg_down: average pooling in the shortcuts.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages (no gradient, eval mode).
        norm_cfg: `dict(type="BN" | "SyncBN" | "GN", requires_grad=True, ...)`.
        norm_eval: keep batch norm statistics as they are, in train mode too.
        with_cp: recompute blocks in the backward pass to save memory.
        zero_init_residual: start every block as its shortcut.
        dcn: `dict(type="DCN" | "DCNv2", deform_groups=1, fallback_on_stride=False, ...)` for the 3x3 convolution of
            each block (the second one at depth 18 and 34); further keys are options of `dcn_plugin.DCNv1` or `DCNv2`.
        stage_with_dcn: which stages `dcn` applies to (mmdet's default is none of them, here stages 1 to 3).
        init_cfg: MMEngine's, applied by `init_weights`; `dict(type="Pretrained", checkpoint="torchvision://resnet50")`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from dcn_plugin.mm import DCNResNet
        >>> backbone = DCNResNet(18, dcn=dict(type="DCNv2", deform_groups=1), stage_with_dcn=(False, True, True, True))
        >>> [tuple(x.shape[1:]) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]

    Source of the interface: mmdet 3.3, `mmdet.models.backbones.ResNet`.
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int | None = None,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = True,
        dcn: Mapping[str, Any] | None = None,
        stage_with_dcn: Sequence[bool] = (False, True, True, True),
        with_cp: bool = False,
        zero_init_residual: bool = True,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        _check_choices(depth, num_stages, style, frozen_stages, out_indices)
        _check_per_stage(num_stages, strides=strides, dilations=dilations)
        for name, value in (("norm_cfg", norm_cfg), ("dcn", dcn)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name}: expected a dict or None, got {value!r}")
        if dcn is not None:
            _check_per_stage(num_stages, stage_with_dcn=stage_with_dcn)
            if not any(stage_with_dcn):
                raise ValueError(f"stage_with_dcn: expected a stage for dcn to apply to, got {stage_with_dcn!r}")
        init_cfgs = init_cfg if isinstance(init_cfg, list) else [] if init_cfg is None else [init_cfg]
        if not all(isinstance(cfg, Mapping) and "type" in cfg for cfg in init_cfgs):
            raise TypeError(f"init_cfg: expected None or one or more dict(type=..., ...), got {init_cfg!r}")

        self.out_indices = tuple(out_indices)
        self.frozen_stages, self.norm_eval, self.init_cfgs = frozen_stages, norm_eval, init_cfgs
        self._norm_cfg = {"type": "BN"} if norm_cfg is None else dict(norm_cfg)
        self._bottleneck, blocks = _DEPTHS[depth]
        self._style, self._avg_down, self._with_cp = style, avg_down, with_cp

        channels = base_channels if stem_channels is None else stem_channels
        self._add_stem(in_channels, channels, deep_stem)
        self.stages: list[str] = []
        for stage in range(num_stages):
            planes = base_channels * 2**stage
            stage_dcn = dcn if dcn is not None and stage_with_dcn[stage] else None
            layer = []
            for index in range(blocks[stage]):
                stride = strides[stage] if index == 0 else 1
                layer.append(self._build_block(channels, planes, stride, dilations[stage], stage_dcn, index == 0))
                channels = planes * (4 if self._bottleneck else 1)
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layer))
        accept_sibling_offset_keys(self)
        self._draw_weights(zero_init_residual)
        self._freeze()

    def _add_stem(self, in_channels: int, channels: int, deep: bool) -> None:
        if deep:
            half = channels // 2
            modules: list[nn.Module] = []
            for source, target, stride in ((in_channels, half, 2), (half, half, 1), (half, channels, 1)):
                modules += [_conv(source, target, 3, stride), _build_norm(self._norm_cfg, target)[1]]
                modules += [nn.ReLU(inplace=True)]
            self.stem_names = ["stem"]
            self.stem = nn.Sequential(*modules)
        else:
            name, norm = _build_norm(self._norm_cfg, channels)
            self.stem_names = ["conv1", f"{name}1", "relu"]
            self.conv1 = _conv(in_channels, channels, 7, stride=2)
            self.add_module(f"{name}1", norm)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _build_block(
        self, channels: int, planes: int, stride: int, dilation: int, dcn: Mapping[str, Any] | None, shortcut: bool
    ) -> _Block:
        out_channels = planes * (4 if self._bottleneck else 1)
        downsample = None
        if shortcut and (stride != 1 or channels != out_channels):
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if self._avg_down else []
            conv = _conv(channels, out_channels, 1, 1 if self._avg_down else stride)
            downsample = nn.Sequential(*pool, conv, _build_norm(self._norm_cfg, out_channels)[1])
        convs: list[nn.Module]
        if self._bottleneck:
            stride1, stride2 = (1, stride) if self._style == "pytorch" else (stride, 1)
            conv2 = build_conv2(dcn, planes, planes, stride2, dilation)
            convs = [_conv(channels, planes, 1, stride1), conv2, _conv(planes, out_channels, 1)]
        else:
            convs = [_conv(channels, planes, 3, stride, dilation), build_conv2(dcn, planes, planes, 1, 1)]
        return _Block(convs, self._norm_cfg, downsample, self._with_cp)

    def _draw_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, SamplingConv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block) and zero_init_residual:
                nn.init.zeros_(module.last_norm.weight)  # type: ignore[arg-type]
        reset_offsets(self)

    def init_weights(self) -> None:
        """Apply `init_cfg` (MMEngine's Runner calls this once, before training); without one the weights stay."""
        if not self.init_cfgs:
            return
        from mmengine.model import initialize
        from mmengine.model.weight_init import PretrainedInit

        pretrained = [cfg for cfg in self.init_cfgs if cfg["type"] in ("Pretrained", PretrainedInit)]
        drawn = [cfg for cfg in self.init_cfgs if cfg not in pretrained]
        if drawn:
            initialize(self, drawn)
            reset_offsets(self)  # one for all layers has met the offset convolutions too
        initialize(self, pretrained)

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for name in self.stem_names + self.stages[: self.frozen_stages]:
                getattr(self, name).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DCNResNet":
        """Set the mode, but leave frozen stages, and with `norm_eval` every batch norm, in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of the stages `out_indices`, finest first."""
        for name in self.stem_names:
            x = getattr(self, name)(x)
        x = self.maxpool(x)
        maps = []
        for name in self.stages:
            x = getattr(self, name)(x)
            maps.append(x)
        return tuple(maps[index] for index in self.out_indices)
