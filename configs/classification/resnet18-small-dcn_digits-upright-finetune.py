_base_ = "resnet18-small-dcn_digits-warped.py"
data = dict(dataset=dict(warp=False))
