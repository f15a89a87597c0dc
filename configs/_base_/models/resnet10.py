# A narrow ResNet of one basic block per stage, at stride 8 as for dense prediction, for 48x48 gray images.
model = dict(
    name="resnet18",
    layers=(1, 1, 1, 1),
    channels=(16, 32, 64, 128),
    stem_type="deep",
    stem_width=8,
    output_stride=8,
    in_chans=1,
    num_classes=10,
)
