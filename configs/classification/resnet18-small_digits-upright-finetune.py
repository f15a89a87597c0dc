_base_ = "resnet18-small_digits-warped.py"
data = dict(dataset=dict(warp=False))
