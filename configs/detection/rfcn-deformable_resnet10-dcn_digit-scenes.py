_base_ = "rfcn_resnet10-dcn_digit-scenes.py"
model = dict(deformable=True)
