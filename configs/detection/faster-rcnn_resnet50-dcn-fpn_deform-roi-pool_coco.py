_base_ = [
    "../_base_/data/coco.py",
    "../_base_/schedules/sgd-1x-coco.py",
    "../_base_/detection_runtime.py",
]
# Stem and first stage stay as they are, and so do all batch norms' statistics, as is usual for two images a device.
model = dict(
    name="faster_rcnn",
    backbone=dict(name="resnet50_dcn.tv_in1k", pretrained=True),
    roi_pool=dict(type="MultiScaleDeformRoIPool"),
    trainable_backbone_layers=3,
    norm_eval=True,
    min_size=800,
    max_size=1333,
)
