"""Runs of small segmenters, on embedded scenes and on folders of images and masks that are written for them."""

import numpy as np
from PIL import Image
from tiny import CLASSIFIER, TRAINER, checkpoints

SEGMENTER = dict(name="deeplab", backbone=CLASSIFIER, output_stride=8, head_channels=16)
SCENES = dict(train=8, val=4, test=4, size=64, digit_size=[20, 30], digits=[1, 2])
CALLBACKS = checkpoints("val_miou")


def scenes_in(root, batch_size=4, **changes):
    """Arguments of `SegmentationDataModule` for a small embedded set below `root`."""
    return dict(name="digit_scenes", root=str(root), scenes=SCENES | changes, in_chans=1, batch_size=batch_size)


def config(data, **changes):
    base = dict(module="SegmentationModule", model=SEGMENTER, data=data, callbacks=CALLBACKS, trainer=TRAINER, seed=0)
    return {**base, "logger": False, "optimizer": dict(opt="adamw", lr=1e-3), **changes}


def mask_of(number, height=30, width=40):
    """Class 1 in a corner as wide as the number says, class 2 in the last row, its first pixel ignored."""
    mask = np.zeros((height, width), np.uint8)
    mask[: 5 + number, : 10 + number] = 1
    mask[-1] = 2
    mask[0, 0] = 255
    return mask


def write_folders(root, images=4, name="train", suffix="png"):
    """Write RGB images 40 wide and 30 high, masks and a list, as PASCAL VOC's; return what names the split."""
    for folder in ("images", "masks", "lists"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{name}{i}" for i in range(images)]
    for i, one in enumerate(names):
        Image.fromarray(np.full((30, 40, 3), (20 * i, 100, 50), np.uint8)).save(root / f"images/{one}.{suffix}")
        Image.fromarray(mask_of(i)).save(root / f"masks/{one}.png")
    (root / f"lists/{name}.txt").write_text("\n".join(names) + "\n")
    return dict(images="images", masks="masks", list=f"lists/{name}.txt")
