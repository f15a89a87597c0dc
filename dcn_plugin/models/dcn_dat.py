"""DAT (2022) and DAT++ (2023), vision transformers with deformable attention, with their official state dicts.

`dat_{tiny,small,base}` attend within local windows, shifted windows and, in the last two stages, to deformed grids;
`dat_plus_{tiny,small,base}` to neighbourhoods and deformed grids in all stages. Images may be of any size, of `dat_*`
from 32 x 32 pixels on: position biases hold for ways relative to the map, and windows that do not fit are filled with
zeros, as in DAT's detectors.

The published weights are no download by name (their links lead to pages): fetch the file, and give it to timm.

Example:
    >>> import timm, dcn_plugin
    >>> model = timm.create_model("dat_tiny", num_classes=10, drop_path_rate=0.2)
    >>> # timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=dict(file="dat_tiny_in1k_224.pth"))
    >>> type(model.stages[2].attns[1]).__name__
    'DAttention'

Keyword arguments of every entry, besides timm's usual ones (`num_classes`, `in_chans`, `drop_rate`, `drop_path_rate`,
`attn_drop_rate`, ...):

- `img_size`: (H, W) or one number, which `rpe_table` and the masks of shifted windows are made for. The tables of
  weights for another size are resized bicubically when they are loaded, by timm, by torch or by `load_checkpoint`.
- `window_size`: pixels of a window's side (7; the published `dat_base` for 384 x 384 has 12), or of a neighbourhood's.

The papers train with `drop_path_rate` 0.2, 0.3, 0.5 (DAT) and 0.2, 0.4, 0.7 (DAT++) for tiny, small and base.

Sources: https://arxiv.org/abs/2201.00520, https://arxiv.org/abs/2309.01430.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..checkpoint import find_weights, match_wrappers
from ..layers.arguments import pair
from ..layers.dat import ChannelNorm
from ..ops._check import integer, integers, is_long, number
from ._dat_parts import Stage, cut, stem
from ._dat_state import TABLES, fit_tables
from ._official import official_weights
from ._timm import by_getter, check_arguments, check_images

__all__ = ["DAT"]

# Attention of each block: L local windows, S shifted ones, N neighbourhoods, D deformed grids.
_DAT = dict(plus=False, groups=(0, 0, 3, 6))
_PLUS = dict(plus=True, depths=(2, 4, 18, 2), spec=("ND", "NDND", "ND" * 9, "DD"))
_VARIANTS: dict[str, dict[str, Any]] = {
    "dat_tiny": dict(_DAT, depths=(2, 2, 6, 2), spec=("LS", "LS", "LD" * 3, "LD")),
    "dat_small": dict(_DAT, depths=(2, 2, 18, 2), spec=("LS", "LS", "LD" * 9, "LD")),
    "dat_base": dict(
        _DAT, depths=(2, 2, 18, 2), spec=("LS", "LS", "LD" * 9, "LD"), dim=128, heads=(4, 8, 16, 32),
        groups=(0, 0, 4, 8),
    ),
    "dat_plus_tiny": dict(_PLUS, dim=64, heads=(2, 4, 8, 16), groups=(1, 2, 4, 8)),
    "dat_plus_small": dict(_PLUS, groups=(1, 2, 3, 6)),
    "dat_plus_base": dict(_PLUS, dim=128, heads=(4, 8, 16, 32), groups=(2, 4, 8, 16)),
}  # fmt: skip
_logger = logging.getLogger("dcn_plugin")
torch.fx.wrap("check_images")  # symbolic tracing records it as a call: it looks at shapes


class DAT(nn.Module):
    """DAT or DAT++: input [N, C, H, W], output [N, num_classes] (see the module).

    Raises TypeError or ValueError naming a bad argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        spec: Sequence[str] = ("LS", "LS", "LDLDLD", "LD"),
        heads: Sequence[int] = (3, 6, 12, 24),
        groups: Sequence[int] = (0, 0, 3, 6),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        plus: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        check_arguments(
            in_chans, num_classes, drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip
        integer("dim", dim, 2)
        integer("window_size", window_size, 1)
        number("mlp_ratio", mlp_ratio, positive=True)
        if not is_long(spec) or not 1 <= len(spec) <= 4 or not all(isinstance(stage, str) for stage in spec):
            raise ValueError(f"spec: expected 1 to 4 stages, got {spec!r}")
        for name, given, least in (("depths", depths, 1), ("heads", heads, 1), ("groups", groups, 0)):
            if not is_long(given) or len(given) != len(spec):
                raise ValueError(f"{name}: expected one for each of {len(spec)} stages, got {given!r}")
            integers(name, given, least, (len(spec),))
        kinds = [cut(stage, depth) for stage, depth in zip(spec, depths, strict=True)]
        self.num_classes, self.in_chans, self.drop_rate, self.plus = num_classes, in_chans, drop_rate, plus
        dims = [dim * 2**i for i in range(len(kinds))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f"stages.{i}") for i, width in enumerate(dims)
        ]
        self.patch_proj = stem(in_chans, dim, plus, factory)
        rates = torch.linspace(0, drop_path_rate, sum(map(len, kinds)), device="cpu").tolist()
        height, width = (side // 4 for side in pair("img_size", img_size, 4 * 2 ** (len(kinds) - 1)))
        stages = []
        for i, kind in enumerate(kinds):
            own, rates = rates[: len(kind)], rates[len(kind) :]
            size = (height // 2**i, width // 2**i)
            stages.append(
                Stage(
                    kind,
                    dims[i],
                    heads[i],
                    groups[i],
                    size,
                    window_size,
                    plus,
                    i,
                    mlp_ratio,
                    proj_drop_rate,
                    attn_drop_rate,
                    own,
                    factory,
                )  # fmt: skip
            )
        self.stages = nn.ModuleList(stages)
        kernel: dict[str, Any] = dict(kernel_size=3, padding=1) if plus else dict(kernel_size=2)
        self.down_projs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, stride=2, bias=False, **kernel, **factory), ChannelNorm(after, **factory)
            )
            for before, after in zip(dims, dims[1:], strict=False)
        )
        self.cls_norm: nn.Module = ChannelNorm(dims[-1], **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool, factory)

    def _set_classifier(self, num_classes: int, global_pool: str, factory: dict[str, Any]) -> None:
        if not global_pool and num_classes:
            raise ValueError(
                f"global_pool: expected some pooling in front of {num_classes} classes, got {global_pool!r}"
            )
        self.num_classes = num_classes
        # "catavgmax" gives the classifier two numbers for each channel.
        self.global_pool, self.cls_head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **factory
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw fresh weights: torch's for linear layers and convolutions, small biases, and offsets of zero."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def fit_state_dict(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """Fit weights for images or windows of other sizes to this model, in place, as loading does by itself.

        Tables of position biases are resized bicubically, as in the official code; what is computed (masks and numbers
        of windows) is this model's.

        Args:
            state: a state dict.
            prefix: of the names that are this model's.

        Returns:
            What was resized, as sentences; empty where all fits.
        """
        return fit_tables(self, state, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for note in self.fit_state_dict(state_dict, prefix):
            _logger.info("%s", note)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(TABLES)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: list[tuple[str, tuple[int, ...] | None]] = []
        for i, stage in enumerate(self.stages):
            # What makes the map smaller belongs to what works on the smaller one.
            blocks.append((rf"^down_projs\.{i - 1}\.", (i,) if coarse else (i, 0)))
            if coarse:
                blocks.append((rf"^stages\.{i}\.", (i,)))
                continue
            attentions: Any = stage.attns
            for d in range(len(attentions)):
                blocks.append((rf"^stages\.{i}\.layer_norms\.(?:{2 * d}|{2 * d + 1})\.", (i, d)))
                blocks.append((rf"^stages\.{i}\.(?!layer_norms)\w+\.{d}\.", (i, d)))
        return dict(stem=r"^patch_proj", blocks=[*blocks, (r"^cls_norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.cls_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in place of the head, and other pooling where it is given; 0 classes: none."""
        like = next(self.parameters())
        pool: Any = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(num_classes, pool, dict(device=like.device, dtype=like.dtype))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and those of the stages `indices`, before the next smaller one is made.

        Args:
            x: images.
            indices: stages to return, or how many of the last; None: all.
            norm: apply the last norm to the last stage's map, too.
            stop_early: stop behind the last stage that is returned.
            output_fmt: "NCHW" alone.
            intermediates_only: return the maps of the stages alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        found: list[Tensor] = []
        x = self._first_map(x, last + 1 if stop_early else len(self.stages))
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(self.down_projs[i - 1](x) if i else x)
            final = i == len(self.feature_info) - 1
            if i in wanted:
                found.append(self.cls_norm(x) if norm and final else x)
        if intermediates_only:
            return found
        return self.cls_norm(x) if final else x, found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`; norm, and head with pooling, if asked or without use then."""
        kept, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages, self.down_projs = self.stages[: last + 1], self.down_projs[:last]
        if prune_norm or shorter:
            self.cls_norm = nn.Identity()
        if shorter:
            info: Any = self.feature_info[last]
            self.num_features = self.head_hidden_size = info["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return kept

    def _first_map(self, x: Tensor, stages: int) -> Tensor:
        """Return the map that the first of so many stages takes; steps of 2 x 2 pixels leave none of 1."""
        return self.patch_proj(check_images(x, 1 if self.plus else 4 * 2 ** (stages - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, [N, C, H/32, W/32]."""
        x = self._first_map(x, len(self.stages))
        for i, stage in enumerate(self.stages):
            x = stage(self.down_projs[i - 1](x) if i else x)
        return self.cls_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, or with `pre_logits` what the classifier is given."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.cls_head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _official(content: Mapping[str, Any], model: nn.Module, features_only: bool) -> dict[str, Any]:
    """Return the weights in a file, fitted to the model's sizes, if they are of such a model."""
    state = match_wrappers(model, find_weights(content, None, "pretrained", []))
    fit_tables(model, state, "")
    return official_weights(state, model, ("cls_norm", "cls_head"), features_only)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> DAT:
    fit = partial(_official, features_only=bool(kwargs.get("features_only")))
    return build_model_with_cfg(
        DAT, variant, pretrained, pretrained_filter_fn=fit,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **dict(_VARIANTS[variant], **by_getter(kwargs)),
    )  # fmt: skip


# No url: the published files are behind pages, and come by pretrained_cfg_overlay=dict(file=...).
default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": dict(
            url="", num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, crop_mode="squash",
            interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
            first_conv="patch_proj.0", classifier="cls_head", license="apache-2.0",
        )
        for name in _VARIANTS
    }
)  # fmt: skip


@register_model
def dat_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-T: windows, and deformable attention in the last two stages."""
    return _create("dat_tiny", pretrained, **kwargs)


@register_model
def dat_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S: windows, and deformable attention in the last two stages."""
    return _create("dat_small", pretrained, **kwargs)


@register_model
def dat_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-B: windows, and deformable attention in the last two stages."""
    return _create("dat_base", pretrained, **kwargs)


@register_model
def dat_plus_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-T++: neighbourhoods, and deformable attention in all stages."""
    return _create("dat_plus_tiny", pretrained, **kwargs)


@register_model
def dat_plus_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S++: neighbourhoods, and deformable attention in all stages."""
    return _create("dat_plus_small", pretrained, **kwargs)


@register_model
def dat_plus_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-B++: neighbourhoods, and deformable attention in all stages."""
    return _create("dat_plus_base", pretrained, **kwargs)
