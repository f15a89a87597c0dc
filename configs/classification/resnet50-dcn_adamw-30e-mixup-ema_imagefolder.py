_base_ = "resnet50-dcn_adamw-30e_imagefolder.py"
mixup = dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.8)
callbacks = dict(ema=dict(type="EMAWeightAveraging", decay=0.9998))
