# A ResNet-18 of a quarter of the width, at stride 8 as for dense prediction, for 48x48 gray images.
model = dict(
    name="resnet18",
    in_chans=1,
    num_classes=10,
    channels=(16, 32, 64, 128),
    stem_type="deep",
    stem_width=8,
    output_stride=8,
)
