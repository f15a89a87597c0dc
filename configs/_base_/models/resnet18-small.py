model = dict(
    name="resnet18", in_chans=1, num_classes=10, channels=(16, 32, 64, 128), stem_type="deep", stem_width=8
)
