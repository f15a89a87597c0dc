_base_ = "internimage-tiny-dcnv3_adamw-20e_imagefolder.py"
model = dict(name="flash_internimage_tiny.ogvl_in1k")
