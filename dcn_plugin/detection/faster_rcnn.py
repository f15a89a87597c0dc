"""torchvision detectors on timm backbones, with plain or deformable RoI pooling.

`faster_rcnn` and `rfcn` return torchvision's own kinds of models: `model(images, targets)` takes and gives what
torchvision's detectors do. `build_detector` makes one from a dict, for configs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from .backbone import DetectionBackbone
from .heads import box_heads
from .options import OPTIONS, check_options, choose, fill_in
from .rfcn import FirstMapRPN, ForEachClass, PSRoIMaps, Vote
from .roi_pool import MultiScaleDeformRoIPool

__all__ = ["DETECTORS", "build_detector", "faster_rcnn", "rfcn"]


def _roi_pool(roi_pool: Mapping[str, Any] | None, backbone: DetectionBackbone) -> MultiScaleRoIAlign:
    kinds = {"MultiScaleRoIAlign": MultiScaleRoIAlign, "MultiScaleDeformRoIPool": MultiScaleDeformRoIPool}
    kind, arguments = choose("roi_pool", roi_pool or {}, kinds)
    own = {"featmap_names": [str(i) for i in range(len(backbone.strides))], "output_size": 7, "sampling_ratio": 2}
    if kind is not MultiScaleRoIAlign:
        own["in_channels"] = backbone.out_channels
    pool = kind(**{**own, **arguments})
    of_map = {str(i): stride for i, stride in enumerate(backbone.strides)} | {"pool": 2 * backbone.strides[-1]}
    unknown = [name for name in pool.featmap_names if name not in of_map]
    if unknown or not pool.featmap_names:
        raise ValueError(f"roi_pool: expected featmap_names out of {list(of_map)}, got {pool.featmap_names}")
    # torchvision guesses the strides from the first batch, and wrongly where its images are small and padded.
    strides = [of_map[name] for name in pool.featmap_names]
    pool.scales = [1 / stride for stride in strides]
    finest, coarsest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    pool.map_levels = initLevelMapper(
        finest, coarsest, canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level
    )
    return pool


def _box_head(box_head: Mapping[str, Any] | None, channels: int, size: tuple[int, int]) -> nn.Module:
    def convolutions(conv_layers: Sequence[int], fc_layers: Sequence[int] = (1024,)) -> nn.Module:
        return FastRCNNConvFCHead((channels, *size), list(conv_layers), list(fc_layers), norm_layer=nn.BatchNorm2d)

    def linear(representation_size: int = 1024) -> nn.Module:
        return TwoMLPHead(channels * size[0] * size[1], representation_size)

    kind, arguments = choose("box_head", box_head or {}, {"TwoMLPHead": linear, "FastRCNNConvFCHead": convolutions})
    return kind(**arguments)


def _box_predictor(head: nn.Module, num_classes: int) -> nn.Module:
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"box_predictor: expected a module, as {type(head).__name__} does not end in a linear layer")
    return FastRCNNPredictor(linear[-1].out_features, num_classes)


def faster_rcnn(
    num_classes: int,
    backbone: str | Mapping[str, Any] = "resnet50_dcn",
    *,
    roi_pool: Mapping[str, Any] | None = None,
    box_head: Mapping[str, Any] | nn.Module | None = None,
    box_predictor: nn.Module | None = None,
    fpn_channels: int = 256,
    trainable_backbone_layers: int | None = None,
    norm_eval: bool | None = None,
    **options: Any,
) -> FasterRCNN:
    """Return torchvision's Faster R-CNN on a feature pyramid over a timm model.

    `model(images, targets)` gives torchvision's four losses in training mode, and in evaluation mode a dict of
    `boxes` [L, 4] (x1, y1, x2, y2 in pixels), `labels` and `scores` for each image. Images are a list of
    [C, H, W] in 0..1, of any sizes. A training batch that leaves the heads nothing, without boxes and with every
    proposal fallen away, has losses of 0 there, where torchvision's are NaN.

    Args:
        num_classes: classes with the background, which is class 0.
        backbone: name of a timm model, or `dict(name=..., **arguments)` such as `pretrained=True`,
            `checkpoint_path=...`, `in_chans=1`, `out_indices` (default: the last four maps), `dcn_stages`.
        roi_pool: `dict(type="MultiScaleRoIAlign" | "MultiScaleDeformRoIPool", output_size=7, sampling_ratio=2, ...)`.
        box_head: `dict(type="TwoMLPHead", representation_size=1024)`, which is the default, or
            `dict(type="FastRCNNConvFCHead", conv_layers=(256, 256, 256, 256), fc_layers=(1024,))`, or a module.
        box_predictor: a module instead of torchvision's `FastRCNNPredictor` on the head's last linear layer.
        fpn_channels: channels of the pyramid.
        trainable_backbone_layers: how many stages of the backbone train, counted from the last; the default is
            torchvision's 3 for a pretrained backbone and all for another.
        norm_eval: keep the backbone's batch norms at their stored statistics; by default for a pretrained backbone.
        options: torchvision's, by its names: `min_size`, `max_size`, `image_mean`, `image_std`, `rpn_*`,
            `box_*`, `bbox_reg_weights`, `size_divisible`, `fixed_size`. `rpn_anchor_generator` may also be
            `dict(sizes=..., aspect_ratios=...)`. Mean and standard deviation default to the backbone's, anchors to
            one size of 8 strides for each map.

    Raises:
        TypeError, ValueError: an unknown option, or a wrong value, by name.

    Example:
        >>> import torch
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
        >>> pool = dict(type="MultiScaleDeformRoIPool", deform_fc_channels=64)
        >>> model = faster_rcnn(3, tiny, roi_pool=pool, fpn_channels=16, min_size=64).eval()
        >>> sorted(model([torch.rand(3, 64, 80)])[0])
        ['boxes', 'labels', 'scores']

    Sources: https://arxiv.org/abs/1506.01497, https://arxiv.org/abs/1612.03144.
    """
    check_options("faster_rcnn", num_classes, options, list(OPTIONS))
    arguments = {"name": backbone} if isinstance(backbone, str) else backbone
    if isinstance(arguments, Mapping):
        arguments = {"out_indices": (-4, -3, -2, -1), **arguments}
    body = DetectionBackbone(arguments, fpn_channels, trainable_backbone_layers, norm_eval)
    if options.get("box_roi_pool") is None:
        options["box_roi_pool"] = _roi_pool(roi_pool, body)
    elif roi_pool is not None:
        raise TypeError(f"roi_pool: expected None beside box_roi_pool, which is the module itself, got {roi_pool!r}")
    fill_in(body, options, [(8 * stride,) for stride in (*body.strides, 2 * body.strides[-1])])
    if not isinstance(box_head, nn.Module):
        box_head = _box_head(box_head, body.out_channels, options["box_roi_pool"].output_size)
    if box_predictor is None:
        box_predictor = _box_predictor(box_head, num_classes)
    model = FasterRCNN(body, box_head=box_head, box_predictor=box_predictor, **options)
    model.roi_heads = box_heads(options["box_roi_pool"], box_head, box_predictor, {**OPTIONS, **options})
    return model


def rfcn(
    num_classes: int,
    backbone: str | Mapping[str, Any] = "resnet50_dcn",
    *,
    deformable: bool = False,
    group_size: int = 7,
    conv_channels: int = 1024,
    class_agnostic: bool = True,
    class_aware_offsets: bool = True,
    samples_per_part: int = 4,
    offset_scale: float = 0.1,
    trainable_backbone_layers: int | None = None,
    norm_eval: bool | None = None,
    **options: Any,
) -> GeneralizedRCNN:
    """Return an R-FCN over a timm model: all layers with weights run on the whole image, RoIs only vote.

    Takes and gives what `faster_rcnn` does. The proposal network reads the first map of the backbone, the
    position-sensitive maps (see `PSRoIMaps`) come from the last: by default the last two at stride 16, as in the paper.

    Args:
        num_classes: classes with the background, which is class 0.
        backbone: as in `faster_rcnn`; by default with `output_stride=16` (`None` for models without that argument)
            and `out_indices=(-2, -1)`.
        deformable: shift the bins of every RoI by learnt offsets. The plain form takes the mean of whole pixels, the
            deformable one of `samples_per_part**2` bilinear samples.
        group_size: bins along a side, k.
        conv_channels: channels of the 1x1 convolution after the backbone.
        class_agnostic: one box for all classes; otherwise one for each.
        class_aware_offsets: offsets of the scores' bins for each class, as in the original: many maps for many
            classes (`2 * k * k * num_classes`). Otherwise the classes share them.
        samples_per_part: samples along a side of a bin.
        offset_scale: RoI sizes that an offset of 1 is.
        trainable_backbone_layers, norm_eval, options: as in `faster_rcnn`, without `box_roi_pool`. Default anchors
            have 4, 8, 16 and 32 strides.

    Example:
        >>> import torch
        >>> tiny = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
        >>> model = rfcn(3, tiny, deformable=True, group_size=3, conv_channels=32, min_size=64)
        >>> target = dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([2]))
        >>> sorted(model([torch.rand(3, 64, 80)], [target]))
        ['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg']

    Sources: https://arxiv.org/abs/1605.06409, https://arxiv.org/abs/1703.06211 (section 2.2 and figure 4).
    """
    check_options("rfcn", num_classes, options, [key for key in OPTIONS if key != "box_roi_pool"])
    for key, value in (("group_size", group_size), ("conv_channels", conv_channels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: expected a positive integer, got {value!r}")
    arguments = {"name": backbone} if isinstance(backbone, str) else backbone
    if isinstance(arguments, Mapping):
        arguments = {"output_stride": 16, "out_indices": (-2, -1), **arguments}
        if arguments["output_stride"] is None:
            del arguments["output_stride"]
    body = DetectionBackbone(arguments, None, trainable_backbone_layers, norm_eval)
    fill_in(body, options, [tuple(n * body.strides[0] for n in (4, 8, 16, 32))])
    o = {**OPTIONS, **options}
    anchors = o["rpn_anchor_generator"]
    rpn = FirstMapRPN(
        anchors,
        o["rpn_head"] or RPNHead(body.channels[0], anchors.num_anchors_per_location()[0]),
        o["rpn_fg_iou_thresh"],
        o["rpn_bg_iou_thresh"],
        o["rpn_batch_size_per_image"],
        o["rpn_positive_fraction"],
        dict(training=o["rpn_pre_nms_top_n_train"], testing=o["rpn_pre_nms_top_n_test"]),
        dict(training=o["rpn_post_nms_top_n_train"], testing=o["rpn_post_nms_top_n_test"]),
        o["rpn_nms_thresh"],
        score_thresh=o["rpn_score_thresh"],
    )
    pool = PSRoIMaps(
        body.channels[-1],
        num_classes,
        body.strides[-1],
        group_size,
        conv_channels,
        1 if class_agnostic else num_classes,
        deformable,
        class_aware_offsets,
        samples_per_part,
        offset_scale,
    )
    roi_heads = box_heads(pool, Vote(), ForEachClass(), o)
    transform = GeneralizedRCNNTransform(
        o["min_size"], o["max_size"], o["image_mean"], o["image_std"], o["size_divisible"], o["fixed_size"]
    )
    return GeneralizedRCNN(body, rpn, roi_heads, transform)


DETECTORS: dict[str, Callable[..., GeneralizedRCNN]] = {"faster_rcnn": faster_rcnn, "rfcn": rfcn}
"""What `build_detector` builds, by name."""


def build_detector(spec: Mapping[str, Any]) -> GeneralizedRCNN:
    """Return the detector of `dict(name="faster_rcnn" | "rfcn", num_classes=..., **its arguments)`.

    Raises:
        TypeError, ValueError: no such detector or argument, by name.

    Example:
        >>> tiny = dict(name="resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
        >>> type(build_detector(dict(name="faster_rcnn", num_classes=3, backbone=tiny))).__name__
        'FasterRCNN'
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec: expected dict(name=..., num_classes=..., ...), got {spec!r}")
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if name not in DETECTORS:
        raise ValueError(f"name: expected a detector out of {', '.join(DETECTORS)}, got {name!r}")
    if "num_classes" not in arguments:
        raise ValueError(f"num_classes: expected a number for {name}, counting the background, got none")
    return DETECTORS[name](**arguments)
