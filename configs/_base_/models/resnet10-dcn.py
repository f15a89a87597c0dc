_base_ = "resnet10.py"
model = dict(name="resnet18_dcn")
