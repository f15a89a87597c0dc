_base_ = [
    "../_base_/models/resnet10.py",
    "../_base_/data/digits-upright.py",
    "../_base_/schedules/digits.py",
]
trainer = dict(max_epochs=12)
