_base_ = "detector_resnet10-dcn.py"
model = dict(
    name="rfcn",
    backbone=dict(output_stride=8),
    group_size=5,
    conv_channels=128,
    rpn_anchor_generator=dict(sizes=((20, 28, 40, 56),), aspect_ratios=((1.0, 1.5, 2.2),)),
)
