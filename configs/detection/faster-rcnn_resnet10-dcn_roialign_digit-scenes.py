_base_ = [
    "../_base_/models/faster-rcnn_resnet10-dcn.py",
    "../_base_/data/digit-scenes.py",
    "../_base_/schedules/digit-scenes.py",
]
