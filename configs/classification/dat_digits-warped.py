_base_ = [
    "../_base_/data/digits-warped.py",
    "../_base_/schedules/digits.py",
]
# One block a stage, two of them deformable, for 48x48 gray images.
model = dict(
    name="dat_tiny",
    img_size=48,
    window_size=3,
    dim=16,
    depths=(1, 1, 1, 1),
    spec=("L", "S", "D", "D"),
    heads=(1, 2, 4, 8),
    groups=(0, 0, 2, 4),
    in_chans=1,
    num_classes=10,
)
