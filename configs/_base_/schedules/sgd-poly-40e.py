# The usual polynomial decay, for 8 images a step: scale lr with that number. timm's "momentum" is SGD without
# Nesterov's term.
optimizer = dict(opt="momentum", lr=0.01, momentum=0.9, weight_decay=5e-4, offset_lr_mult=0.1)
schedule = dict(sched="poly", decay_rate=0.9, warmup_epochs=1, warmup_lr=1e-4)
trainer = dict(max_epochs=40)
