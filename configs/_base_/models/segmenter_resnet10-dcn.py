# A narrow ResNet of one basic block per stage at stride 8, for 128x128 gray images.
model = dict(
    backbone=dict(
        name="resnet18_dcn",
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=8,
        in_chans=1,
    ),
    output_stride=8,
)
