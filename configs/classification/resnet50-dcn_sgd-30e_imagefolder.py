_base_ = [
    "../_base_/models/resnet50-dcn.py",
    "../_base_/data/imagefolder.py",
    "../_base_/schedules/sgd-30e.py",
    "../_base_/default_runtime.py",
]
