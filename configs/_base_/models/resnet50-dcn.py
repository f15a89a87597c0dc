# ResNet-50 with DCNv2 in conv3_x to conv5_x, from timm's ImageNet weights of the plain ResNet-50.
model = dict(name="resnet50_dcn.a1_in1k", pretrained=True)
