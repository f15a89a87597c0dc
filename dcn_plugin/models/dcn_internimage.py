"""InternImage and FlashInternImage: backbones of DCNv3 and of DCNv4 layers, with the official weights, for timm.

Both are one skeleton: a stem of two strided convolutions, four levels of blocks (deformable aggregation, then an MLP,
each with a residual), strided convolutions between the levels. State dicts are the official ones, key for key, and
`pretrained=True` fetches the published files.

Example:
    >>> import timm, torch, dcn_plugin
    >>> small = dict(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8))
    >>> maps = timm.create_model("internimage_tiny", features_only=True, **small)(torch.zeros(1, 3, 64, 64))
    >>> [tuple(m.shape[1:]) for m in maps]
    [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]

Keyword arguments of every entry, besides timm's: those of `InternImage`.

Sources: https://arxiv.org/abs/2211.05778 (InternImage), https://arxiv.org/abs/2401.06197 (FlashInternImage).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ._internimage import HEAD, InternImage
from ._official import official_weights
from ._timm import by_getter

__all__ = ["InternImage"]

# Arguments of each size; the rest are the class's.
_POST: dict[str, Any] = dict(post_norm=True, layer_scale=1e-5)
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(),
    "small": dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), **_POST),
    "base": dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), **_POST),
    "large": dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), offset_scale=2.0, **_POST),
    "xlarge": dict(channels=192, depths=(5, 5, 24, 5), groups=(12, 24, 48, 96), offset_scale=2.0, **_POST),
    "huge": dict(
        channels=320, depths=(6, 6, 32, 6), groups=(10, 20, 40, 80), dw_kernel_size=5, res_post_norm=True,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29), center_feature_scale=True, use_clip_projector=True,
    ),
}  # fmt: skip
_FLASH: dict[str, dict[str, Any]] = {
    "tiny": dict(mlp_fc2_bias=False, dcn_output_bias=False),
    "small": dict(mlp_fc2_bias=False, dcn_output_bias=False, dw_kernel_size=3),
    "base": dict(mlp_fc2_bias=False, dcn_output_bias=False, dw_kernel_size=3, offset_scale=0.5),
    "large": dict(dw_kernel_size=3),
}


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> InternImage:
    family, _, size = variant.rpartition("_")
    arguments = dict(_SIZES[size], **(dict(_FLASH[size], core_op="DCNv4") if family == "flash_internimage" else {}))
    accept = partial(official_weights, head=HEAD, features_only=bool(kwargs.get("features_only")))
    return build_model_with_cfg(
        InternImage, variant, pretrained, pretrained_filter_fn=accept,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"), **dict(arguments, **by_getter(kwargs)),
    )  # fmt: skip


def _cfg(file: str, side: int = 224, num_classes: int = 1000) -> dict[str, Any]:
    return dict(
        hf_hub_id="OpenGVLab/DCNv4" if file.startswith("flash") else "OpenGVLab/InternImage", hf_hub_filename=file,
        num_classes=num_classes, input_size=(3, side, side), pool_size=(side // 32, side // 32), crop_pct=1.0,
        interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.conv1",
        classifier="head", license="mit",
    )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "internimage_tiny.ogvl_in1k": _cfg("internimage_t_1k_224.pth"),
        "internimage_small.ogvl_in1k": _cfg("internimage_s_1k_224.pth"),
        "internimage_base.ogvl_in1k": _cfg("internimage_b_1k_224.pth"),
        "internimage_large.ogvl_in22k_ft_in1k_384": _cfg("internimage_l_22kto1k_384.pth", 384),
        "internimage_large.ogvl_in22k": _cfg("internimage_l_22k_192to384.pth", 384, 21841),
        "internimage_xlarge.ogvl_in22k_ft_in1k_384": _cfg("internimage_xl_22kto1k_384.pth", 384),
        "internimage_xlarge.ogvl_in22k": _cfg("internimage_xl_22k_192to384.pth", 384, 21841),
        "internimage_huge.ogvl_in22k_ft_in1k_640": _cfg("internimage_h_22kto1k_640.pth", 640),
        "internimage_huge.ogvl_in22k": _cfg("internimage_h_jointto22k_384.pth", 384, 21841),
        "flash_internimage_tiny.ogvl_in1k": _cfg("flash_intern_image_t_1k_224.pth"),
        "flash_internimage_small.ogvl_in1k": _cfg("flash_intern_image_s_1k_224.pth"),
        "flash_internimage_base.ogvl_in1k": _cfg("flash_intern_image_b_1k_224.pth"),
        "flash_internimage_large.ogvl_in22k_ft_in1k_384": _cfg("flash_internimage_l_22kto1k_384.pth", 384),
    }
)


@register_model
def internimage_tiny(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-T."""
    return _create("internimage_tiny", pretrained, **kwargs)


@register_model
def internimage_small(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-S."""
    return _create("internimage_small", pretrained, **kwargs)


@register_model
def internimage_base(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-B."""
    return _create("internimage_base", pretrained, **kwargs)


@register_model
def internimage_large(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-L."""
    return _create("internimage_large", pretrained, **kwargs)


@register_model
def internimage_xlarge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-XL."""
    return _create("internimage_xlarge", pretrained, **kwargs)


@register_model
def internimage_huge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-H."""
    return _create("internimage_huge", pretrained, **kwargs)


@register_model
def flash_internimage_tiny(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """FlashInternImage-T."""
    return _create("flash_internimage_tiny", pretrained, **kwargs)


@register_model
def flash_internimage_small(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """FlashInternImage-S."""
    return _create("flash_internimage_small", pretrained, **kwargs)


@register_model
def flash_internimage_base(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """FlashInternImage-B."""
    return _create("flash_internimage_base", pretrained, **kwargs)


@register_model
def flash_internimage_large(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """FlashInternImage-L."""
    return _create("flash_internimage_large", pretrained, **kwargs)
