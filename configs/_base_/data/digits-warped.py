_base_ = "digits-upright.py"
data = dict(dataset=dict(warp=True, copies=4))
