data = dict(
    name="digits",
    val_split="val",
    test_split="test",
    dataset=dict(size=48, warp=False, copies=1),
    input_size=(1, 48, 48),
    mean=(0.5,),
    std=(0.5,),
    crop_pct=1.0,
    augment=dict(no_aug=True),
    batch_size=64,
    eval_batch_size=200,
)
