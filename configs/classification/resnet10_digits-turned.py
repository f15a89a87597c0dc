_base_ = "resnet10_digits-warped.py"
# Rotation and scale alone, so that either can be asked for at test time.
data = dict(dataset=dict(shear=0.0, translate=0.0))
# Tests are the study's own.
trainer = dict(max_epochs=3, limit_test_batches=0)
