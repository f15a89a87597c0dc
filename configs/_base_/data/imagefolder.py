# One folder per class below data/images/train and data/images/val; the number of classes is read from it.
data = dict(
    name="",
    root="data/images",
    train_split="train",
    val_split="val",
    input_size=224,
    batch_size=64,
    num_workers=8,
    augment=dict(auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25, color_jitter=0.4),
)
