# InternImage's own fine-tuning: a layer decay of 0.9 for each block; offsets have a tenth of the rate, which their
# layers say themselves. The rate is for a new head on some thousand images, and 64 images a step.
optimizer = dict(opt="adamw", lr=2e-4, weight_decay=0.05, layer_decay=0.9, offset_lr_mult=1.0)
schedule = dict(sched="cosine", warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-6)
label_smoothing = 0.1
trainer = dict(max_epochs=20, precision="16-mixed", gradient_clip_val=5.0)
