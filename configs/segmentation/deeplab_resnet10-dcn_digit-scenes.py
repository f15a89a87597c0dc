_base_ = [
    "../_base_/models/segmenter_resnet10-dcn.py",
    "../_base_/data/digit-masks.py",
    "../_base_/schedules/digit-masks.py",
]
model = dict(name="deeplab", head_channels=128)
