callbacks = dict(
    best=dict(type="ModelCheckpoint", filename="best", monitor="val_top1", mode="max", enable_version_counter=False),
    last=dict(type="ModelCheckpoint", filename="last", enable_version_counter=False),
    lr=dict(type="LearningRateMonitor", logging_interval="step"),
    offsets=dict(type="OffsetMonitor", every_n_steps=50),
)
logger = dict(type="CSVLogger", name="logs")
seed = 0
