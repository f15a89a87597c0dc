#!/usr/bin/env bash
# A TimmBackbone of transformers does not load the folder that its own save_pretrained wrote.
#
# Versions: transformers 5.23.0, timm 1.0.31, safetensors 0.8.0, torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Behaviour: TimmBackbone.from_pretrained(folder) and AutoModel.from_pretrained(folder) take the folder's path for the name of a
#   model of timm's, and AutoBackbone.from_pretrained(folder) for an id of the hub; config.json and model.safetensors in it are not read.
# Expected: from_pretrained reads what save_pretrained wrote, as with every other model (with AutoConfig and load_state_dict by hand
#   the same two files give the same outputs).
# Seen: TimmBackbone: ValueError "has no source prefix but looks like a Hugging Face Hub repo id or a local path"; AutoModel: the
#   same; AutoBackbone: HFValidationError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 timm==1.0.31 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/saved" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, AutoModel, TimmBackbone, TimmBackboneConfig

saved = sys.argv[1]
config = TimmBackboneConfig(backbone="resnet18", use_pretrained_backbone=False, out_indices=(1, 2, 3, 4))
model = AutoBackbone.from_config(config).eval()
model.save_pretrained(saved)
refused = 0
for loader in (TimmBackbone, AutoModel, AutoBackbone):
    try:
        loader.from_pretrained(saved)
    except Exception as error:
        refused += 1
        print(f"{loader.__name__}: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        print(f"{loader.__name__}: loads")

by_hand = AutoBackbone.from_config(AutoConfig.from_pretrained(saved)).eval()
by_hand.load_state_dict(load_file(f"{saved}/model.safetensors"))
image = torch.rand(1, 3, 64, 64)
with torch.no_grad():
    pairs = zip(by_hand(image).feature_maps, model(image).feature_maps)
    print("by hand, the largest difference is", max(float((a - b).abs().max()) for a, b in pairs))
sys.exit(refused != 3)  # status 1: the behaviour has changed
PYTHON
