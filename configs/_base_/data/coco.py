# COCO 2017 as it is distributed, below data/coco; the number of classes is read from it.
data = dict(
    name="coco",
    root="data/coco",
    train=dict(images="train2017", annotations="annotations/instances_train2017.json"),
    val=dict(images="val2017", annotations="annotations/instances_val2017.json"),
    augment=[dict(type="RandomHorizontalFlip", p=0.5)],
    empty_images="drop",
    batch_size=2,
    num_workers=4,
)
