_base_ = "../segmentation_runtime.py"
optimizer = dict(opt="adamw", lr=4e-3, weight_decay=0.05, offset_lr_mult=0.1)
schedule = dict(sched="poly", warmup_epochs=1, warmup_lr=1e-4)
trainer = dict(
    max_epochs=8, gradient_clip_val=5.0, accelerator="cpu", devices=1, log_every_n_steps=10, enable_model_summary=False
)
# The maps are small: that some points leave one is no cause for alarm yet.
callbacks = dict(offsets=dict(limit=3.0))
