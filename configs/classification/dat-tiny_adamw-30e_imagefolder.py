_base_ = [
    "../_base_/data/imagefolder.py",
    "../_base_/schedules/adamw-30e.py",
    "../_base_/default_runtime.py",
]
# The published weights have no link to fetch them by: put the file there.
model = dict(
    name="dat_tiny.in1k",
    pretrained=True,
    pretrained_cfg_overlay=dict(file="data/dat_tiny_in1k_224.pth"),
    drop_path_rate=0.2,
)
