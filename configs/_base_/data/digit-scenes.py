# The embedded scenes: 128x128 gray canvases with three to six digits, written as a COCO set below the user's cache.
data = dict(
    name="digit_scenes",
    scenes=dict(train=200, val=50, test=100, size=128),
    in_chans=1,
    batch_size=8,
    eval_batch_size=25,
)
