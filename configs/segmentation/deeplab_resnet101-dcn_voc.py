_base_ = [
    "../_base_/data/voc.py",
    "../_base_/schedules/sgd-poly-40e.py",
    "../_base_/segmentation_runtime.py",
]
# The paper's: stride 16, conv5_x dilated and deformable (v1), the first two stages and all batch norms as they were.
model = dict(
    name="deeplab",
    backbone=dict(name="resnet101_dcnv1.tv_in1k", pretrained=True, dcn_stages=(5,)),
    output_stride=16,
)
