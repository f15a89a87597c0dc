_base_ = "resnet10-dcn_digits-warped.py"
data = dict(dataset=dict(warp=False))
