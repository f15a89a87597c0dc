_base_ = "resnet10_digits-warped.py"
data = dict(dataset=dict(warp=False))
