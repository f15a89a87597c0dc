"""Small random models of every family of transformers that has multi-scale deformable attention, with their inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

SWIN = dict(
    image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
    drop_path_rate=0.0,
)  # fmt: skip
BERT = dict(
    model_type="bert", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32,
)  # fmt: skip
RESNET = dict(
    model_type="rt_detr_resnet", embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
    layer_type="basic", out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
RT_DETR = dict(
    encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], feat_strides=[8, 16, 32], encoder_layers=1,
    encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, num_queries=7, decoder_in_channels=[16, 16, 16],
    decoder_ffn_dim=16, num_feature_levels=3, decoder_layers=2, decoder_attention_heads=2, num_denoising=0,
    num_labels=3, hidden_expansion=0.5, freeze_backbone_batch_norms=False,
)  # fmt: skip
HGNET = dict(
    model_type="hgnet_v2", stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[8, 8, 8, 8],
    stage_out_channels=[8, 8, 16, 16], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
    stage_downsample=[False, True, True, True], stage_light_block=[False, False, False, False],
    stage_kernel_size=[3, 3, 3, 3], embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip


def swin(stages: str) -> Any:
    return transformers.SwinConfig(**SWIN, out_features=[f"stage{i}" for i in stages])


def pixels(size: tuple[int, int] = (64, 96), n: int = 2) -> Tensor:
    """Images of large spots: of fine noise, deep maps would be the same everywhere."""
    spots = torch.randn(n, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(spots, size, mode="bilinear")


def hidden_corner(x: Tensor) -> Tensor:
    """A mask that hides a part of the second image."""
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.long)
    mask[1, 40:] = mask[1, :, 70:] = 0
    return mask


def deformable_detr(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeformableDetrConfig(
        backbone_config=swin("234"), d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=7, num_labels=3,
        encoder_n_points=3, decoder_n_points=2, **options,
    )  # fmt: skip
    x = pixels()
    return transformers.DeformableDetrForObjectDetection(config), dict(pixel_values=x, pixel_mask=hidden_corner(x))


def deformable_detr_boxes() -> tuple[nn.Module, dict[str, Any]]:
    return deformable_detr(two_stage=True, with_box_refine=True, two_stage_num_proposals=7)


def rt_detr() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.RTDetrConfig(backbone_config=RESNET, **RT_DETR)
    return transformers.RTDetrForObjectDetection(config), dict(pixel_values=pixels())


def rt_detr_v2(method: str = "default") -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.RTDetrV2Config(
        backbone_config=RESNET, **RT_DETR, decoder_method=method, decoder_offset_scale=0.7
    )
    return transformers.RTDetrV2ForObjectDetection(config), dict(pixel_values=pixels())


def rt_detr_v2_discrete() -> tuple[nn.Module, dict[str, Any]]:
    return rt_detr_v2("discrete")


def d_fine(method: str = "default") -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DFineConfig(
        backbone_config=HGNET, **RT_DETR, decoder_n_points=[3, 5, 2], decoder_method=method, max_num_bins=8,
        lqe_hidden_dim=8,
    )  # fmt: skip
    return transformers.DFineForObjectDetection(config), dict(pixel_values=pixels())


def d_fine_discrete() -> tuple[nn.Module, dict[str, Any]]:
    return d_fine("discrete")


def deimv2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Deimv2Config(
        backbone_config=HGNET, **RT_DETR, decoder_n_points=[3, 5, 2], max_num_bins=8, lqe_hidden_dim=8
    )
    return transformers.Deimv2ForObjectDetection(config), dict(pixel_values=pixels())


GROUNDING = dict(
    text_config=BERT, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    encoder_attention_heads=2, decoder_attention_heads=2, num_queries=7, max_text_len=8,
)  # fmt: skip


def words() -> dict[str, Tensor]:
    ids = torch.tensor([[101 % 50, 5, 6, 12, 7, 2], [1, 8, 9, 12, 3, 2]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))


def grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GroundingDinoConfig(backbone_config=swin("234"), **GROUNDING)
    x = pixels()
    return transformers.GroundingDinoForObjectDetection(config), dict(
        pixel_values=x, pixel_mask=hidden_corner(x), **words()
    )


def mm_grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MMGroundingDinoConfig(backbone_config=swin("234"), **GROUNDING)
    x = pixels()
    return transformers.MMGroundingDinoForObjectDetection(config), dict(
        pixel_values=x, pixel_mask=hidden_corner(x), **words()
    )


def omdet_turbo() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OmDetTurboConfig(
        backbone_config=swin("234"),
        text_config=dict(
            model_type="clip_text_model", vocab_size=50, hidden_size=24, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=24,
            bos_token_id=0, eos_token_id=49,
        ),
        image_size=64, apply_layernorm_after_vision_backbone=False, num_queries=7, text_projection_in_dim=24,
        text_projection_out_dim=24, class_embed_dim=24,
        task_encoder_hidden_dim=16, encoder_hidden_dim=16, vision_features_channels=[16, 16, 16],
        encoder_in_channels=[16, 32, 64], encoder_dim_feedforward=16, decoder_hidden_dim=16,
        decoder_dim_feedforward=16, decoder_num_heads=2, encoder_attention_heads=2, decoder_num_layers=2,
        decoder_num_points=3, num_projection_layers=1,
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 6, 49], [1, 7, 8, 49], [1, 9, 9, 49], [1, 4, 3, 49]])
    return transformers.OmDetTurboForObjectDetection(config), dict(
        pixel_values=pixels((64, 64)), classes_input_ids=ids, classes_attention_mask=torch.ones_like(ids),
        tasks_input_ids=ids[:2], tasks_attention_mask=torch.ones_like(ids[:2]), classes_structure=torch.tensor([2, 2]),
    )  # fmt: skip


DETR_HEADS = dict(
    d_model=16, decoder_ffn_dim=16, decoder_layers=2, decoder_self_attention_heads=2, decoder_cross_attention_heads=2,
    num_queries=7, group_detr=1, num_labels=3, decoder_n_points=3, c2f_num_blocks=1,
)  # fmt: skip


def lw_detr() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LwDetrConfig(
        backbone_config=dict(
            model_type="lw_detr_vit", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=8, num_windows=4, pretrain_image_size=64, out_indices=[1, 2], window_block_indices=[1],
        ),
        projector_scale_factors=[2.0, 0.5], **DETR_HEADS,
    )  # fmt: skip
    return transformers.LwDetrForObjectDetection(config), dict(pixel_values=pixels((64, 64)))


def rf_detr() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.RfDetrConfig(
        backbone_config=dict(
            model_type="rf_detr_dinov2", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=8, num_windows=1, out_indices=[1, 2],
        ),
        **DETR_HEADS,
    )  # fmt: skip
    return transformers.RfDetrForObjectDetection(config), dict(pixel_values=pixels((64, 64)))


def pp_doclayout_v2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.PPDocLayoutV2Config(
        backbone_config=HGNET, **RT_DETR,
        reading_order_config=dict(
            hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, coordinate_size=3,
            shape_size=2, relation_bias_embed_dim=4, global_pointer_head_size=4, num_classes=3,
        ),
        class_thresholds=[0.0] * 3, class_order=[0, 1, 2],
    )  # fmt: skip
    return transformers.PPDocLayoutV2ForObjectDetection(config), dict(pixel_values=pixels())


def pp_doclayout_v3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.PPDocLayoutV3Config(
        backbone_config={**HGNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        **{**RT_DETR, "encoder_in_channels": [8, 16, 16]}, x4_feat_dim=8, mask_feature_channels=[8, 8],
        num_prototypes=4, global_pointer_head_size=4,
    )  # fmt: skip
    return transformers.PPDocLayoutV3ForObjectDetection(config), dict(pixel_values=pixels())


def pp_doclayout_v4() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.PPDocLayoutV4Config(
        backbone_config=HGNET, **RT_DETR, hidden_size=16, global_pointer_head_size=4
    )
    return transformers.PPDocLayoutV4ForObjectDetection(config), dict(pixel_values=pixels())


def mask2former() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin("1234"), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=2,
        decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16, num_queries=5,
        num_labels=3,
    )  # fmt: skip
    x = pixels()
    return transformers.Mask2FormerForUniversalSegmentation(config), dict(pixel_values=x, pixel_mask=hidden_corner(x))


def oneformer() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OneFormerConfig(
        backbone_config=swin("1234"), conv_dim=32, mask_dim=32, hidden_dim=32, encoder_layers=2, decoder_layers=2,
        num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16, num_queries=5, num_labels=3,
        task_seq_len=8, text_encoder_width=32, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=50, text_encoder_n_ctx=2, query_dec_layers=1, is_training=False,
    )  # fmt: skip
    x, task = pixels(), torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(2))
    return transformers.OneFormerForUniversalSegmentation(config), dict(pixel_values=x, task_inputs=task)


MODELS = {
    make.__name__: make
    for make in (
        deformable_detr, deformable_detr_boxes, rt_detr, rt_detr_v2, rt_detr_v2_discrete, d_fine, d_fine_discrete,
        deimv2, grounding_dino, mm_grounding_dino, omdet_turbo, lw_detr, rf_detr, pp_doclayout_v2, pp_doclayout_v3,
        pp_doclayout_v4, mask2former, oneformer,
    )
}  # fmt: skip


def stirred(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose samplers have a part in its results; as initialised, some pass on next to nothing."""
    model, inputs = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            elif "sampling_offsets" in place or "attention_weights" in place:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.ones_(norm.weight)
            norm.train().momentum = 1.0
        if norms:
            model(**inputs)
        for norm in norms:
            norm.eval()
    return model, inputs
