_base_ = "resnet50-dcn_adamw-30e_imagefolder.py"
# Shards with an _info.json, as timm writes and reads them; streams do not tell their number of classes.
data = dict(name="wds/", root="data/shards", val_split="validation", num_classes=1000)
