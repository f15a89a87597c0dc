_base_ = "faster-rcnn_resnet10-dcn_roialign_digit-scenes.py"
model = dict(roi_pool=dict(type="MultiScaleDeformRoIPool", deform_fc_channels=128))
