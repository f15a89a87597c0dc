_base_ = [
    "../_base_/models/resnet10.py",
    "../_base_/data/digits-warped.py",
    "../_base_/schedules/digits.py",
]
