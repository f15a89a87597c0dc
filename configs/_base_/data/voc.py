# PASCAL VOC 2012 as it is distributed, below data/VOCdevkit/VOC2012; 20 classes and the background.
data = dict(
    name="folders",
    root="data/VOCdevkit/VOC2012",
    train=dict(images="JPEGImages", masks="SegmentationClass", list="ImageSets/Segmentation/train.txt"),
    val=dict(images="JPEGImages", masks="SegmentationClass", list="ImageSets/Segmentation/val.txt"),
    num_classes=21,
    augment=[
        dict(type="ScaleJitter", target_size=[480, 480], scale_range=[0.5, 2.0]),
        dict(type="RandomCrop", size=[480, 480], pad_if_needed=True),
        dict(type="RandomHorizontalFlip", p=0.5),
    ],
    batch_size=8,
    eval_batch_size=1,
    num_workers=8,
)
