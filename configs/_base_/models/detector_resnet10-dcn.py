# A narrow ResNet of one basic block per stage under small detectors: 128x128 gray images, objects of 15 to 60 pixels.
model = dict(
    backbone=dict(
        name="resnet18_dcn",
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=8,
        in_chans=1,
    ),
    min_size=128,
    max_size=128,
    rpn_pre_nms_top_n_train=400,
    rpn_pre_nms_top_n_test=200,
    rpn_post_nms_top_n_train=150,
    rpn_post_nms_top_n_test=75,
    rpn_batch_size_per_image=64,
    box_batch_size_per_image=64,
)
