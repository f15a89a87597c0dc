"""Runs of small detectors, on embedded scenes and on sets in COCO's format that are written for them."""

import json

import numpy as np
from PIL import Image
from tiny import TRAINER, checkpoints

from dcn_plugin.finetune.detection import write_scenes

BACKBONE = dict(
    name="resnet18_dcn", in_chans=1, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], stem_type="deep", stem_width=4,
)  # fmt: skip
FEW = dict(
    min_size=96, max_size=96, rpn_post_nms_top_n_train=30, rpn_post_nms_top_n_test=30, rpn_pre_nms_top_n_train=60,
    rpn_pre_nms_top_n_test=60, box_batch_size_per_image=16,
)  # fmt: skip
ANCHORS = [[16], [24], [32], [48]]
FASTER = dict(
    name="faster_rcnn", backbone=dict(BACKBONE, out_indices=[1, 2, 3]), fpn_channels=8,
    roi_pool=dict(type="MultiScaleDeformRoIPool", deform_fc_channels=8, output_size=3),
    box_head=dict(type="TwoMLPHead", representation_size=16), rpn_anchor_generator=dict(sizes=ANCHORS), **FEW,
)  # fmt: skip
RFCN = dict(
    name="rfcn", backbone=dict(BACKBONE, output_stride=8), deformable=True, group_size=3, conv_channels=8,
    rpn_anchor_generator=dict(sizes=[[16, 24, 32, 48]]), **FEW,
)  # fmt: skip
SCENES = dict(train=8, val=4, test=4, size=96, digit_size=[20, 34], digits=[2, 3])
IDS = [3, 7, 90]  # category ids, as sparse as COCO's own


CALLBACKS = checkpoints("val_map")


def scenes_in(root, batch_size=4, **changes):
    """Arguments of `CocoDataModule` for a small embedded set below `root`, which is written by whoever asks first."""
    return dict(name="digit_scenes", root=str(root), scenes=SCENES | changes, in_chans=1, batch_size=batch_size)


def splits_of(root, **counts):
    """Write small scenes; return the arguments for reading them back as any other set in COCO's format."""
    write_scenes(root, **counts)
    splits = ("train", "val", "test")
    parts = {s: dict(images=f"images/{s}", annotations=f"annotations/instances_{s}.json") for s in splits}
    return dict(name="coco", root=str(root), in_chans=1, batch_size=2, **parts)


def config(data, **changes):
    base = dict(module="DetectionModule", model=FASTER, data=data, callbacks=CALLBACKS, trainer=TRAINER, seed=0)
    return {**base, "logger": False, "optimizer": dict(opt="adamw", lr=1e-3), **changes}


def write_coco(root, annotations=None, images=4, name="train", **changes):
    """Write a set of `images` RGB images 40 wide and 30 high, and return the arguments for one split of it."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(images):
        pixels = np.full((30, 40, 3), (20 * i, 100, 50), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        entries.append(dict(id=100 - i, file_name=f"{i}.png", width=40, height=30))
    default = [
        dict(id=1, image_id=100, category_id=90, bbox=[2, 3, 10, 5], area=50, iscrowd=0),
        dict(id=2, image_id=100, category_id=3, bbox=[20, 10, 10, 15], area=140, iscrowd=0),
        dict(id=3, image_id=100, category_id=7, bbox=[0, 0, 39, 29], area=900, iscrowd=1),
        dict(id=4, image_id=99, category_id=7, bbox=[30, 20, 20, 5], area=100, iscrowd=0),  # half outside
        dict(id=5, image_id=99, category_id=7, bbox=[5, 5, 0, 9], area=0, iscrowd=0),  # no width
        dict(id=6, image_id=98, category_id=7, bbox=[1, 1, 20, 20], area=400, iscrowd=1),  # crowd alone
    ]
    whole = dict(
        images=entries,
        annotations=default if annotations is None else annotations,
        categories=[dict(id=i, name=f"kind{i}") for i in reversed(IDS)],
    )
    (root / f"{name}.json").write_text(json.dumps({**whole, **changes}))
    return dict(images=name, annotations=f"{name}.json")
