_base_ = [
    "../_base_/models/resnet10-dcn.py",
    "../_base_/data/digits-warped.py",
    "../_base_/schedules/digits.py",
]
