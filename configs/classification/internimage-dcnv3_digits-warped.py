_base_ = [
    "../_base_/data/digits-warped.py",
    "../_base_/schedules/digits.py",
]
# One block a level, for 48x48 gray images.
model = dict(
    name="internimage_tiny",
    channels=16,
    depths=(1, 1, 1, 1),
    groups=(1, 2, 4, 8),
    in_chans=1,
    num_classes=10,
)
