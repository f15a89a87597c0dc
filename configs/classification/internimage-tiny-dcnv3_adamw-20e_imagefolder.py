_base_ = [
    "../_base_/data/imagefolder.py",
    "../_base_/schedules/adamw-20e-layer-decay.py",
    "../_base_/default_runtime.py",
]
model = dict(name="internimage_tiny.ogvl_in1k", pretrained=True, drop_path_rate=0.1)
data = dict(crop_pct=1.0)
