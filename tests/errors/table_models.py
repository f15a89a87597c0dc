"""Backbones and detectors."""

import builtins
import importlib
import sys
from functools import partial

import timm
import torch
from torch import nn

from dcn_plugin.detection.backbone import _modules_up_to
from dcn_plugin.detection.faster_rcnn import build_detector, faster_rcnn
from dcn_plugin.mm import DCNResNet, TimmBackbone, build_dcn, build_dcnv2
from errors.case import Case

TINY = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
V2 = dict(type="DCNv2")


def resnet(**given):
    return lambda: timm.create_model("resnet18_dcn", device="meta", **given)


def pretrained_with_other_weights(tmp_path):
    torch.save(timm.create_model("resnet18", **TINY).state_dict(), tmp_path / "x.pth")
    made = partial(timm.create_model, "resnet18_dcn", pretrained=True, channels=TINY["channels"])
    made(layers=(2, 1, 1, 1), pretrained_cfg_overlay=dict(file=str(tmp_path / "x.pth")))


STAGES = "expected stages out of"
TIMM = [
    Case(resnet(dcn_stages=4), TypeError, "dcn_stages:", "expected a sequence such as (3, 4, 5)", "got 4"),
    Case(resnet(dcn_stages="layer4"), TypeError, "dcn_stages:", "expected a sequence such as (3, 4, 5)", "'layer4'"),
    Case(resnet(dcn_stages=(1,)), ValueError, "dcn_stages:", STAGES, "got 1 in (1,)"),
    Case(resnet(dcn_stages=("conv5",)), ValueError, "dcn_stages:", STAGES, "got 'conv5'"),
    Case(resnet(dcn_layer=3), TypeError, "dcn_layer:", "expected a layer name or dict(type=..., ...)", "got 3"),
    Case(resnet(dcn_layer="DCNv9"), ValueError, "dcn_layer:", "expected type out of ['DCNv1'", "got 'DCNv9'"),
    Case(resnet(dcn_layer="DeformConv2d"), ValueError, "dcn_layer:", "expected type out of", "got 'DeformConv2d'"),
    Case(resnet(dcn_layer=dict(offset_groups=2)), ValueError, "dcn_layer:", "expected type out of", "got None in {"),
    Case(
        resnet(dcn_layer=dict(type="DCNv2", offset_groups=2), offset_groups=4),
        ValueError, "offset_groups:", "expected one value", "got 2 and 4",
    ),
    Case(resnet(offset_groups=3), ValueError, "in_channels", "a multiple of offset_groups", "and 3"),
    Case(
        resnet(dcn_layer=dict(type="DCNv1", mask_activation="sigmoid")),
        TypeError, "DCNv1:", "options out of offset_groups, offset_bound", "got 'mask_activation'",
    ),
    Case(
        pretrained_with_other_weights,
        RuntimeError, "pretrained:", "the weights of resnet18_dcn's base", "missing keys ['layer1.1.conv1.weight'",
    ),
]  # fmt: skip


SMALL = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 1, 1, 1))


def internimage(**given):
    return lambda: timm.create_model("internimage_tiny", device="meta", **given)


def official(tmp_path, spoil):
    state = timm.create_model("internimage_tiny", **SMALL).state_dict()
    spoil(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    overlay = dict(file=str(tmp_path / "x.pth"))
    timm.create_model("internimage_tiny", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **SMALL)


def usual(model, *rates):
    """timm's usual arguments, of which its own models take any number."""
    yield Case(model(in_chans=0), ValueError, "in_chans:", "expected at least 1", "got 0")
    yield Case(model(in_chans=3.0), TypeError, "in_chans:", "expected an integer", "got 3.0")
    yield Case(model(num_classes=-1), ValueError, "num_classes:", "expected at least 0", "got -1")
    for name in rates:
        for value in (2.0, -0.1):
            yield Case(model(**{name: value}), ValueError, f"{name}:", "expected a part from 0 to 1", f"got {value}")
        yield Case(model(**{name: "0.1"}), TypeError, f"{name}:", "expected a number", "got '0.1'")


INTERNIMAGE = [
    Case(internimage(core_op="DCNv2"), ValueError, "core_op:", "expected 'DCNv3' or 'DCNv4'", "got 'DCNv2'"),
    Case(internimage(core_op=[]), ValueError, "core_op:", "expected 'DCNv3' or 'DCNv4'", "got []"),
    Case(internimage(groups=(1, 0, 1, 1)), ValueError, "groups:", "expected at least 1", "got 0"),
    Case(internimage(groups=4), ValueError, "groups:", "expected a number for each", "got 4"),
    *(
        Case(
            internimage(res_post_norm=True, **other),
            ValueError, "res_post_norm:", "expected False with post_norm or layer_scale", "got True",
        )
        for other in (dict(post_norm=True), dict(layer_scale=1.0))
    ),
    *(
        Case(
            internimage(depths=(1,) * depths, groups=groups),
            ValueError, "groups:", "expected a number for each of the levels", f"got {groups}",
        )
        for depths, groups in ((4, (4, 8, 16)), (2, (4, 8)))
    ),
    Case(internimage(channels=1), ValueError, "channels:", "expected at least 2", "got 1"),
    Case(internimage(depths=(1, 0, 1, 1)), ValueError, "depths:", "expected at least 1", "got 0"),
    Case(internimage(mlp_ratio=0), ValueError, "mlp_ratio:", "expected a positive finite number", "got 0"),
    Case(internimage(cls_scale=-1.0), ValueError, "cls_scale:", "expected a positive finite number", "got -1.0"),
    *usual(internimage, "drop_rate", "drop_path_rate", "proj_drop_rate"),
    Case(
        lambda: timm.create_model("internimage_tiny", **SMALL)(torch.zeros(1, 3, 0, 32)),
        ValueError, "x:", "expected at least 1 x 1 pixels", "got 0 x 32",
    ),
    Case(internimage(groups=(4, 8, 16, 30)), ValueError, "channels:", "a multiple of group", "got 512 and 30"),
    Case(
        internimage(global_pool=""), ValueError, "global_pool:", "expected some pooling in front of 1000 classes",
        "got ''",
    ),
    Case(
        internimage(use_clip_projector=True, global_pool="avg"),
        ValueError, "global_pool:", "expected 'map' or '' with use_clip_projector", "got 'avg'",
    ),
    Case(
        lambda: timm.create_model("internimage_tiny", **SMALL).forward_intermediates(
            torch.zeros(1, 3, 32, 32), output_fmt="NLC"
        ),
        ValueError, "output_fmt:", "expected 'NCHW' or 'NHWC'", "got 'NLC'",
    ),
    Case(
        lambda tmp_path: official(tmp_path, lambda state: state.pop("conv_head.0.weight")),
        RuntimeError, "pretrained:", "the weights of internimage_tiny", "missing keys ['conv_head.0.weight']",
    ),
    Case(
        lambda tmp_path: official(tmp_path, lambda state: state.update({"levels.0.blocks.0.gamma1": torch.ones(8)})),
        RuntimeError, "pretrained:", "with these arguments", "unexpected keys ['levels.0.blocks.0.gamma1']",
    ),
]  # fmt: skip


def dat(**given):
    return lambda: timm.create_model("dat_tiny", device="meta", **given)


def dat_features():
    model = timm.create_model("dat_tiny", dim=12, depths=(1,) * 4, spec=("L",) * 4, num_classes=0)
    model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")


def dat_weights(tmp_path):
    small = dict(dim=12, depths=(1,) * 4, spec=("L",) * 4)
    state = timm.create_model("dat_tiny", **small).state_dict()
    state.pop("cls_norm.norm.bias")
    torch.save({"model": state}, tmp_path / "x.pth")
    overlay = dict(file=str(tmp_path / "x.pth"))
    timm.create_model("dat_tiny", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **small)


FOUR = "expected one for each of 4 stages"
DATS = [
    Case(dat(depths=(2, 2)), ValueError, "depths:", FOUR, "got (2, 2)"),
    Case(dat(depths=2), ValueError, "depths:", FOUR, "got 2"),
    Case(dat(groups=3), ValueError, "groups:", FOUR, "got 3"),
    Case(dat(heads=(0, 6, 12, 24)), ValueError, "heads:", "expected at least 1", "got 0"),
    Case(dat(spec=(5,) * 4), ValueError, "spec:", "expected 1 to 4 stages", "got (5, 5, 5, 5)"),
    Case(dat(heads=(3,)), ValueError, "heads:", FOUR, "got (3,)"),
    Case(dat(groups=(3,)), ValueError, "groups:", FOUR, "got (3,)"),
    Case(dat(spec=("LS",) * 5), ValueError, "spec:", "expected 1 to 4 stages", "got ('LS', 'LS', 'LS', 'LS', 'LS')"),
    Case(dat(depths=(3, 2, 6, 2)), ValueError, "spec:", "expected 3 of L, S, N and D for a stage", "got 'LS'"),
    Case(dat(spec=("LX", "LS", "LD" * 3, "LD")), ValueError, "spec:", "expected 2 of L, S, N and D", "got 'LX'"),
    Case(dat(heads=(5, 6, 12, 24)), ValueError, "dims:", "expected a multiple of heads", "got 96 and 5"),
    Case(
        dat(heads=(5, 6, 12, 24), spec=("NN", "LS", "LD" * 3, "LD")),
        ValueError, "dims:", "expected a multiple of heads", "got 96 and 5",
    ),
    Case(dat(groups=(0, 0, 5, 6)), ValueError, "n_heads:", "expected a multiple of n_groups", "got 12 and 5"),
    Case(dat(window_size=1), ValueError, "window_size:", "expected at least 2 for windows that shift", "got 1"),
    Case(
        dat(window_size=6, spec=("NN", "LS", "LD" * 3, "LD")),
        ValueError, "window_size:", "expected an odd number for neighbourhoods", "got 6",
    ),
    Case(
        dat(global_pool=""), ValueError, "global_pool:", "expected some pooling in front of 1000 classes", "got ''",
    ),
    *usual(dat, "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    Case(dat(dim=1, heads=(1,) * 4), ValueError, "dim:", "expected at least 2", "got 1"),
    Case(dat(mlp_ratio=-4.0), ValueError, "mlp_ratio:", "expected a positive finite number", "got -4.0"),
    Case(dat(window_size=0), ValueError, "window_size:", "expected at least 1", "got 0"),
    *(
        Case(
            lambda size=size, call=call: call(timm.create_model("dat_tiny", dim=12, depths=(1,) * 4, spec=("L",) * 4))(
                torch.zeros(1, 3, *size)
            ),
            ValueError, "x:", "expected at least 32 x 32 pixels", f"got {size[0]} x {size[1]}",
        )
        for size in ((16, 16), (31, 64), (64, 0))
        for call in (lambda model: model, lambda model: model.forward_intermediates)
    ),
    Case(
        lambda: timm.create_model("dat_tiny", dim=12, depths=(1,) * 4, spec=("L",) * 4)(torch.zeros(3, 64, 64)),
        ValueError, "x:", "expected [N, C, H, W]", "got [3, 64, 64]",
    ),
    Case(dat(img_size=16), ValueError, "img_size:", "expected at least 32", "got 16"),
    Case(
        dat_weights,
        RuntimeError, "pretrained:", "the weights of dat_tiny", "missing keys ['cls_norm.norm.bias']",
    ),
    Case(dat_features, ValueError, "output_fmt:", "expected 'NCHW'", "got 'NHWC'"),
]  # fmt: skip


def mmdet(**given):
    return lambda: DCNResNet(**dict(depth=18, base_channels=8) | given)


PER_STAGE = "expected 4 values (num_stages)"
MMDET = [
    *(
        Case(
            partial(build, 4, 4, 3, deform_groups=2, deformable_groups=2),
            TypeError, "deform_groups:", "either it or deformable_groups", "got 2 and 2",
        )
        for build in (build_dcn, build_dcnv2)
    ),
    Case(mmdet(depth=20), ValueError, "depth:", "expected one of [18, 34, 50, 101, 152]", "got 20"),
    Case(mmdet(num_stages=5), ValueError, "num_stages:", "expected 1 to 4", "got 5"),
    Case(mmdet(num_stages=3), ValueError, "out_indices:", "expected stages out of 0..2", "got (0, 1, 2, 3)"),
    Case(mmdet(out_indices=()), ValueError, "out_indices:", "expected stages out of 0..3", "got ()"),
    Case(mmdet(out_indices=3), TypeError, "out_indices:", "expected a sequence of stages", "got 3"),
    Case(mmdet(num_stages=3, out_indices=(0,)), ValueError, "strides:", "expected 3 values", "got (1, 2, 2, 2)"),
    Case(mmdet(dilations=(1, 1)), ValueError, "dilations:", PER_STAGE, "got (1, 1)"),
    Case(mmdet(strides=2), TypeError, "strides:", PER_STAGE, "got 2"),
    Case(mmdet(dcn=V2, stage_with_dcn=(True,)), ValueError, "stage_with_dcn:", PER_STAGE, "got (True,)"),
    Case(
        mmdet(dcn=V2, stage_with_dcn=(False,) * 4),
        ValueError, "stage_with_dcn:", "expected a stage for dcn to apply to", "got (False, False, False, False)",
    ),
    Case(mmdet(style="tf"), ValueError, "style:", "expected 'pytorch' or 'caffe'", "got 'tf'"),
    Case(mmdet(frozen_stages=5), ValueError, "frozen_stages:", "expected -1 to 4", "got 5"),
    Case(mmdet(norm_cfg="BN"), TypeError, "norm_cfg:", "expected a dict or None", "got 'BN'"),
    Case(mmdet(norm_cfg=dict(type="LN")), ValueError, "norm_cfg:", "expected type out of", "got 'LN'"),
    Case(mmdet(dcn="DCNv2"), TypeError, "dcn:", "expected a dict or None", "got 'DCNv2'"),
    Case(mmdet(dcn=dict(type="DCNv9")), ValueError, "dcn:", "expected type out of", "got 'DCNv9'"),
    Case(mmdet(dcn=dict(deform_groups=1)), ValueError, "dcn:", "expected type out of", "got None"),
    Case(mmdet(dcn=V2 | dict(deformable=1)), TypeError, "DCNv2", "unexpected keyword argument", "'deformable'"),
    Case(mmdet(plugins=[]), TypeError, "DCNResNet", "unexpected keyword argument", "'plugins'"),
    Case(mmdet(init_cfg="x.pth"), TypeError, "init_cfg:", "one or more dict(type=..., ...)", "got 'x.pth'"),
]  # fmt: skip


def without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    TimmBackbone("resnet18")


BACKBONE = [
    Case(without_timm, ImportError, "TimmBackbone", "needs timm", "cannot be imported here"),
    Case(
        lambda: TimmBackbone("resnet18_dcn", features_only=False, out_indices=(1,)),
        ValueError, "out_indices:", "expected None with features_only=False", "got (1,)",
    ),
    Case(
        lambda: TimmBackbone("resnet18_dnc"),
        ValueError, "model_name:", "expected a timm model", "got 'resnet18_dnc'; close to it: resnet18",
    ),
    Case(
        lambda: TimmBackbone("resnet18_dcn", checkpoint_path="absent.pth"),
        FileNotFoundError, "checkpoint_path:", "expected a file", "got 'absent.pth'",
    ),
]  # fmt: skip
PLAIN = dict(name="resnet18", in_chans=1, **TINY)


def faster(**given):
    return lambda: build_detector(dict(name="faster_rcnn", num_classes=3, backbone=PLAIN, fpn_channels=8) | given)


def rfcn(**given):
    return lambda: build_detector(dict(name="rfcn", num_classes=3, backbone=PLAIN, conv_channels=8) | given)


def without_torchvision(monkeypatch):
    # None: an import of it fails; it may have been imported already.
    for name in [name for name in sys.modules if name.startswith("dcn_plugin.detection")]:
        monkeypatch.delitem(sys.modules, name)
    find = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("no such module", name="torchvision")
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    importlib.import_module("dcn_plugin.detection")


DETECTION = [
    Case(
        without_torchvision,
        ModuleNotFoundError, "dcn_plugin.detection", "pip install torchvision", "which is not installed",
    ),
    Case(lambda: build_detector(3), TypeError, "spec:", "expected dict(name=..., num_classes=..., ...)", "got 3"),
    Case(rfcn(name=None), ValueError, "name:", "expected a detector out of faster_rcnn, rfcn", "got None"),
    Case(rfcn(name="yolo"), ValueError, "name:", "expected a detector out of faster_rcnn, rfcn", "got 'yolo'"),
    Case(lambda: build_detector(dict(name="rfcn")), ValueError, "num_classes:", "counting the background", "got none"),
    Case(rfcn(num_classes=1), ValueError, "num_classes:", "expected at least 2", "got 1"),
    Case(faster(num_classes="3"), ValueError, "num_classes:", "expected at least 2", "got '3'"),
    Case(rfcn(group_size=0), ValueError, "group_size:", "expected a positive integer", "got 0"),
    Case(rfcn(conv_channels=0.5), ValueError, "conv_channels:", "expected a positive integer", "got 0.5"),
    Case(rfcn(box_roi_pool=1), TypeError, "rfcn:", "expected torchvision's options", "got 'box_roi_pool'"),
    Case(faster(box_scor_thresh=0), TypeError, "faster_rcnn:", "mean 'box_score_thresh'", "got 'box_scor_thresh'"),
    Case(faster(weights="DEFAULT"), TypeError, "faster_rcnn:", "load_checkpoint", "got 'weights'"),
    Case(rfcn(frozen_stages=1), TypeError, "rfcn:", "trainable_backbone_layers", "got 'frozen_stages'"),
    Case(faster(zzz=0), TypeError, "faster_rcnn:", "torchvision's options size_divisible", "got 'zzz'"),
    Case(rfcn(backbone=7), TypeError, "backbone:", "expected a timm model's name or dict(name=..., ...)", "got 7"),
    Case(faster(backbone=dict(in_chans=3)), TypeError, "backbone:", "expected a timm model's name", "got {"),
    Case(
        lambda: faster_rcnn(91, "internimage_tinny"),
        ValueError, "backbone:", "expected a timm model", "got 'internimage_tinny'; close to it: internimage_tiny",
    ),
    *(
        Case(
            make(backbone=backbone),
            ValueError, "backbone:", "expected a timm model", "got 'zzz'; timm.list_models() has their names",
        )
        for make in (faster, rfcn) for backbone in ("zzz", dict(name="zzz"))
    ),
    Case(faster(backbone=dict(PLAIN, in_chan=3)), TypeError, "ResNet", "unexpected keyword argument", "'in_chan'"),
    Case(
        faster(backbone=dict(PLAIN, features_only=True)),
        ValueError, "backbone:", "expected no features_only", "got True",
    ),
    Case(
        faster(backbone=dict(PLAIN, output_stride=8)),
        ValueError, "backbone:", "expected maps whose strides double", "got [4, 8, 8, 8] of resnet18",
    ),
    Case(faster(trainable_backbone_layers=6), ValueError, "trainable_backbone_layers:", "expected 0 to 5", "got 6"),
    Case(
        lambda: _modules_up_to(nn.ReLU(), "layer1"),
        ValueError, "trainable_backbone_layers:", "to freeze up to", "ReLU has no module 'layer1'",
    ),
    Case(rfcn(image_std=0.2), ValueError, "image_std:", "expected one number for each of 1 channels", "got 0.2"),
    Case(faster(image_mean=[0.1] * 3), ValueError, "image_mean:", "each of 1 channels", "got [0.1, 0.1, 0.1]"),
    Case(
        faster(rpn_anchor_generator=dict(size=((8,),))),
        TypeError, "rpn_anchor_generator:", "keys out of sizes, aspect_ratios", "got 'size'",
    ),
    Case(
        faster(rpn_anchor_generator=dict(sizes=((8,),))),
        ValueError, "rpn_anchor_generator:", "aspect_ratios for each of 5 maps", "got 1 and 1",
    ),
    Case(faster(roi_pool="RoIPool"), TypeError, "roi_pool:", "expected dict(type=..., ...)", "got 'RoIPool'"),
    Case(
        faster(roi_pool=dict(type="RoIPool")),
        ValueError, "roi_pool:", "type out of MultiScaleRoIAlign, MultiScaleDeformRoIPool", "got 'RoIPool'",
    ),
    Case(
        faster(roi_pool=dict(gamma=0.1)),
        TypeError, "roi_pool:", "arguments of MultiScaleRoIAlign (featmap_names", "got 'gamma'",
    ),
    Case(
        faster(roi_pool=dict(featmap_names=["p2"])),
        ValueError, "roi_pool:", "expected featmap_names out of ['0', '1', '2', '3', 'pool']", "got ['p2']",
    ),
    Case(
        faster(roi_pool={}, box_roi_pool=nn.ReLU()),
        TypeError, "roi_pool:", "expected None beside box_roi_pool", "got {}",
    ),
    Case(faster(box_head=dict(width=3)), TypeError, "box_head:", "TwoMLPHead (representation_size)", "got 'width'"),
    Case(
        faster(box_head=nn.Flatten()),
        ValueError, "box_predictor:", "expected a module", "Flatten does not end in a linear layer",
    ),
    Case(
        lambda: rfcn()().roi_heads.box_roi_pool.offsets({}, [], []),
        ValueError, "offsets:", "that was built with deformable=True", "got a plain one",
    ),
]  # fmt: skip
CASES = TIMM + INTERNIMAGE + DATS + MMDET + BACKBONE + DETECTION
