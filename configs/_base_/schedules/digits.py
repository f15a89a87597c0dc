_base_ = "../default_runtime.py"
optimizer = dict(opt="adamw", lr=4e-3, weight_decay=0.05, offset_lr_mult=1.0)
schedule = dict(sched="cosine", warmup_epochs=1, warmup_lr=2e-4)
trainer = dict(
    max_epochs=8, gradient_clip_val=1.0, accelerator="cpu", devices=1, log_every_n_steps=10, enable_model_summary=False
)
# The maps are 6x6: that some points leave such a map is no cause for alarm yet.
callbacks = dict(offsets=dict(limit=3.0))
