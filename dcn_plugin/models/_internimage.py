"""The skeleton of InternImage and FlashInternImage, in timm's grammar and with the official state dict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.fx
from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DCNv3, DCNv4, SamplingModule
from ..layers.channels import named_activation, named_norm
from ..ops._check import integer, integers, is_long, number
from ._internimage_parts import AttentionPool, Level, Stem
from ._timm import check_arguments, check_images

_CORES = {"DCNv3": DCNv3, "DCNv4": DCNv4}
#: What feature maps are made without.
HEAD = ("conv_head", "dcnv3_head_x4", "dcnv3_head_x3", "clip_projector", "fc_norm", "head")
torch.fx.wrap("check_images")  # symbolic tracing records it as a call: it looks at shapes
_WITH_PREVIOUS = (99999,)  # how timm marks a group of parameters that joins the one before


class InternImage(nn.Module):
    """InternImage (`core_op="DCNv3"`) or FlashInternImage (`"DCNv4"`), with the official arguments and weights.

    Input [N, C, H, W], output [N, num_classes]. Feature maps are those after each level's norm, [N, C_i, H_i, W_i].

    Args:
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as in timm's models; stochastic depth grows
            linearly. `global_pool` is "avg", or "map" (attention) with the projector.
        proj_drop_rate: dropout behind the stem and in the MLPs (`drop_rate` in the official code).
        core_op: "DCNv3" or "DCNv4".
        channels: of the first level; each level has twice as many as the one before.
        depths, groups: blocks of each level, and the groups of their layers.
        mlp_ratio: width of the MLPs as a multiple of the channels.
        act_layer, norm_layer, dw_kernel_size, offset_scale, center_feature_scale, remove_center: as in `DCNv3`.
        layer_scale: where the factors of the branches start; None: there are none.
        post_norm: norms behind the branches and none behind the levels, in place of norms before the branches.
        res_post_norm: norms behind the branches, too.
        level2_post_norm_block_ids: blocks of the third level that have a norm behind them.
        cls_scale: width of the head as a multiple of the last level's.
        use_clip_projector: attention pooling over the last two levels in place of that head.
        mlp_fc2_bias, dcn_output_bias: whether the last linear layers of the branches have one; the second for DCNv4.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        core_op: str = "DCNv3",
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] = (),
        cls_scale: float = 1.5,
        use_clip_projector: bool = False,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        mlp_fc2_bias: bool = True,
        dcn_output_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(core_op, str) or core_op not in _CORES:
            raise ValueError(f"core_op: expected {' or '.join(map(repr, _CORES))}, got {core_op!r}")
        check_arguments(
            in_chans, num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate
        )
        integer("channels", channels, 2)
        number("mlp_ratio", mlp_ratio, positive=True)
        number("cls_scale", cls_scale, positive=True)
        if post_norm + res_post_norm + (layer_scale is not None and res_post_norm) > 1:
            raise ValueError("res_post_norm: expected False with post_norm or layer_scale, got True")
        if not (is_long(depths) and is_long(groups)) or len(depths) != len(groups) or len(depths) < 3:
            raise ValueError(f"groups: expected a number for each of the levels of depths, 3 or more, got {groups!r}")
        integers("depths", depths, 1, (len(depths),))
        integers("groups", groups, 1, (len(groups),))
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        widths = [channels * 2**i for i in range(len(depths))]
        options: dict[str, Any] = dict(
            offset_scale=offset_scale, dw_kernel_size=dw_kernel_size, center_feature_scale=center_feature_scale,
            remove_center=remove_center, **factory,
        )  # fmt: skip
        options |= (
            dict(act_layer=act_layer, norm_layer=norm_layer)
            if core_op == "DCNv3"
            else dict(output_bias=dcn_output_bias)
        )
        self.num_classes, self.in_chans = num_classes, in_chans
        self.use_clip_projector = use_clip_projector
        self.grad_checkpointing = False
        self.patch_embed = Stem(in_chans, channels, act_layer, norm_layer, factory)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        block: dict[str, Any] = dict(
            rows=core_op == "DCNv4", mlp_ratio=mlp_ratio, act_layer=act_layer, drop=proj_drop_rate,
            layer_scale=layer_scale, post_norm=post_norm, res_post_norm=res_post_norm, fc2_bias=mlp_fc2_bias,
        )  # fmt: skip
        levels = []
        for i, (width, own_rates) in enumerate(zip(widths, rates, strict=True)):
            block["core"] = partial(_CORES[core_op], width, group=groups[i], **options)
            levels.append(
                Level(
                    [block | dict(drop_path=rate) for rate in own_rates.tolist()], width, factory,
                    norm=not post_norm or center_feature_scale, norm_layer=norm_layer,
                    post_norms=level2_post_norm_block_ids if i == 2 else (), downsample=i < len(widths) - 1,
                )
            )  # fmt: skip
        self.levels = nn.ModuleList(levels)
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f"levels.{i}.map") for i, width in enumerate(widths)
        ]
        if use_clip_projector:
            self.num_features, self.head_hidden_size = 1024, 768
            self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(widths[-1], 4096, 1, **factory), nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(widths[-2], 1024, 1, **factory)
            self.clip_projector = AttentionPool(1024, 768, 16, norm_layer, factory)
            self.fc_norm = named_norm(norm_layer, 768, factory)
        else:
            self.num_features, self.head_hidden_size = widths[-1], int(widths[-1] * cls_scale)
            self.conv_head: nn.Module = nn.Sequential(
                nn.Conv2d(widths[-1], self.head_hidden_size, 1, bias=False, **factory),
                named_norm("BN", self.head_hidden_size, factory, (True, True)),
                named_activation(act_layer),
            )
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool, factory)
        self.init_weights()

    def _set_classifier(self, num_classes: int, global_pool: str | None, factory: dict[str, Any]) -> None:
        usual = "map" if self.use_clip_projector else "avg"
        pool = usual if global_pool is None else global_pool
        if self.use_clip_projector and pool not in (usual, ""):
            raise ValueError(f"global_pool: expected 'map' or '' with use_clip_projector, got {global_pool!r}")
        if num_classes and not pool:
            raise ValueError(f"global_pool: expected some pooling in front of {num_classes} classes, got ''")
        self.num_classes, self.pool = num_classes, pool
        # Attention pools by itself.
        before = "" if self.use_clip_projector else pool
        self.global_pool, self.head = create_classifier(
            self.head_hidden_size, 0 if not before else num_classes, pool_type=before, **factory
        )
        if num_classes and self.use_clip_projector:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **factory)

    # -- what timm asks of a model -------------------------------------------------------------------------------------

    @torch.jit.ignore
    def init_weights(self, *_: Any) -> None:
        """Draw linear layers as published, all others as torch does, and let deformable layers start as fresh ones."""
        layers = []
        for module in self.modules():
            if isinstance(module, SamplingModule):
                layers.append(module)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        for layer in layers:
            cast(Any, layer).reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layers follow one another, for layer decay: a block a group, as in the official trainers.

        There the stem has the rate of the first block, what leads to a level that of its first block, and the head
        that of the last one.
        """
        if coarse:
            return dict(stem=r"^patch_embed", blocks=r"^levels\.(\d+)")
        last = len(self.levels) - 1
        return dict(
            stem=r"^patch_embed",
            blocks=[
                (rf"^levels\.(?:{last}\.norm|\d+\.post_norms)", (float("inf"), *_WITH_PREVIOUS)),
                (r"^levels\.(\d+)\.blocks\.(0)\.", _WITH_PREVIOUS),
                (r"^levels\.(\d+)\.blocks\.(\d+)\.", None),
                (r"^levels\.(\d+)\.(?:norm|downsample)", (float("inf"),)),
            ],
            head=[(r"", _WITH_PREVIOUS)],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let each block run again in the backward pass, in place of keeping what it computes."""
        for level in self.levels:
            cast(Level, level).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or the identity in its place."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where it is given."""
        first = next(self.parameters())
        self._set_classifier(
            num_classes, self.pool if global_pool is None else global_pool, dict(device=first.device, dtype=first.dtype)
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the result of `forward_features` and the maps of the levels `indices`, or these alone.

        Args:
            x: `[N, C, H, W]`.
            indices: of levels; the last so many where it is a number; None: all.
            norm: not looked at: the maps are behind their level's norm.
            stop_early: whether to leave out levels that no map needs.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: whether the maps alone are returned.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.levels), indices)
        maps = self._maps(x, last + 1 if stop_early else len(self.levels))
        found = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in wanted]
        return found if intermediates_only else (self._joined(maps), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the levels that the maps `indices` do not need, and the head."""
        wanted, last = feature_take_indices(len(self.levels), indices)
        cut = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        if cut:
            cast(Level, self.levels[-1]).downsample = None
        if prune_head or cut:
            for name in HEAD[:-1]:
                if hasattr(self, name):
                    delattr(self, name)
            self.use_clip_projector, self.conv_head = False, nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return wanted

    def _maps(self, x: Tensor, levels: int) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(check_images(x, 1)))
        maps: list[Tensor] = []
        for level in cast(list[Level], self.levels[:levels]):
            maps.append(level(x))
            if level.downsample is not None and len(maps) < levels:
                x = level.downsample(maps[-1])
        return maps

    def _joined(self, maps: list[Tensor]) -> Tensor:
        """Return the last map, or with the projector the last two in one, of the size of the one before the last."""
        if not self.use_clip_projector:
            return maps[-1]
        fine, coarse = self.dcnv3_head_x3(maps[-2]), self.dcnv3_head_x4(maps[-1])
        return fine + coarse[..., : fine.shape[2], : fine.shape[3]]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map that the head takes: the last level's; with the projector the last two, joined."""
        return self._joined(self._maps(x, len(self.levels)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; `pre_logits` leaves the classifier out."""
        if not self.use_clip_projector:
            x = self.global_pool(self.conv_head(x))
        elif self.pool:
            x = self.fc_norm(self.clip_projector(x.flatten(2).transpose(1, 2)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.forward_head(self.forward_features(x))
