_base_ = "detector_resnet10-dcn.py"
model = dict(
    name="faster_rcnn",
    backbone=dict(out_indices=(1, 2, 3)),
    fpn_channels=48,
    rpn_anchor_generator=dict(sizes=((20,), (28,), (40,), (56,)), aspect_ratios=((1.0, 1.5, 2.2),) * 4),
    box_head=dict(type="TwoMLPHead", representation_size=128),
)
