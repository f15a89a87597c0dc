# Layer decay keeps pretrained features; conv_offset starts from zero, with a tenth of the rate as in the DCN papers.
optimizer = dict(opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75, offset_lr_mult=0.1)
schedule = dict(sched="cosine", warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-6)
label_smoothing = 0.1
trainer = dict(max_epochs=30, precision="16-mixed", gradient_clip_val=1.0)
