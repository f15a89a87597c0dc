_base_ = "resnet18-small.py"
model = dict(name="resnet18_dcn")
