_base_ = [
    "../_base_/data/voc.py",
    "../_base_/schedules/sgd-poly-40e.py",
    "../_base_/segmentation_runtime.py",
]
# torchvision's: stride 8, an auxiliary head on conv4_x; all stages and batch norms train.
model = dict(
    name="deeplabv3",
    backbone=dict(name="resnet50_dcn.tv_in1k", pretrained=True),
    output_stride=8,
    aux_loss=True,
    trainable_backbone_layers=5,
    norm_eval=False,
)
