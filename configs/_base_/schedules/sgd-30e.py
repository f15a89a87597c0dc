optimizer = dict(opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4, offset_lr_mult=0.1)
schedule = dict(sched="cosine", warmup_epochs=2, warmup_lr=1e-4)
label_smoothing = 0.1
trainer = dict(max_epochs=30, gradient_clip_val=5.0)
