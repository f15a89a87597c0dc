_base_ = "default_runtime.py"
module = "DetectionModule"
callbacks = dict(best=dict(monitor="val_map"))
