_base_ = [
    "../_base_/data/imagefolder.py",
    "../_base_/schedules/adamw-30e.py",
    "../_base_/default_runtime.py",
]
model = dict(name="regnety_004.tv2_in1k", pretrained=True)
# The grouped 3x3 convolutions of the last two stages; a fresh replacement computes what the convolution computed.
rules = [dict(match="s[34].b*.conv2.conv", layer=dict(type="DCNv2"))]
