# The embedded scenes with their masks: 128x128 gray canvases with three to six digits, 11 classes.
data = dict(
    name="digit_scenes",
    scenes=dict(train=600, val=50, test=200, size=128),
    in_chans=1,
    batch_size=8,
    eval_batch_size=25,
)
