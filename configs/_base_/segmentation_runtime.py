_base_ = "default_runtime.py"
module = "SegmentationModule"
callbacks = dict(best=dict(monitor="val_miou"))
