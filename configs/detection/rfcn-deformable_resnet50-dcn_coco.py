_base_ = [
    "../_base_/data/coco.py",
    "../_base_/schedules/sgd-1x-coco.py",
    "../_base_/detection_runtime.py",
]
# Image size, proposals and sampling of the papers; stride 16, anchors of 64 to 512 pixels.
model = dict(
    name="rfcn",
    backbone=dict(name="resnet50_dcn.tv_in1k", pretrained=True),
    deformable=True,
    trainable_backbone_layers=3,
    norm_eval=True,
    min_size=600,
    max_size=1000,
    rpn_post_nms_top_n_test=300,
    box_batch_size_per_image=128,
)
