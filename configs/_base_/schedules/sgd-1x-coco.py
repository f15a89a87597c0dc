# The usual "1x": 12 epochs, a tenth of the rate after 8 and 11, 500 steps of warm-up. For 16 images a step (8 devices
# with 2 each); scale lr with that number. timm's "momentum" is SGD without Nesterov's term.
optimizer = dict(opt="momentum", lr=0.02, momentum=0.9, weight_decay=1e-4, roi_offset_lr_mult=0.01)
schedule = dict(sched="multistep", decay_milestones=[8, 11], decay_rate=0.1, warmup_epochs=0.068, warmup_lr=2e-5)
trainer = dict(max_epochs=12)
