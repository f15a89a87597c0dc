_base_ = "digits-upright.py"
data = dict(dataset=dict(warp=True), train_dataset=dict(copies=4))
