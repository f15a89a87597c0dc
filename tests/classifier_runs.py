"""Runs of a small classifier on the embedded digits."""

from tiny import TRAINER, checkpoints

from dcn_plugin.finetune import FinetuneModule

TINY = dict(in_chans=1, layers=[1, 1, 1, 1], channels=[8, 8, 8, 16], stem_type="deep", stem_width=4)
MODEL = dict(name="resnet18_dcn", **TINY)
DATA = dict(
    name="digits", val_split="val", test_split="test", dataset=dict(warp=True, limit=32, size=32, digit_size=20),
    input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0, augment=dict(no_aug=True), batch_size=16,
)  # fmt: skip
CALLBACKS = checkpoints("val_top1")


def config(**changes):
    base = dict(model=MODEL, data=DATA, callbacks=CALLBACKS, trainer=TRAINER, logger=False, seed=0)
    base["optimizer"] = dict(opt="adamw", lr=1e-3, offset_lr_mult=0.1)
    return {**base, **changes}


def module(**changes):
    return FinetuneModule(**dict(dict(model=MODEL, num_classes=10), **changes))
