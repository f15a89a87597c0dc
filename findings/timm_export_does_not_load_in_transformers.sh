#!/usr/bin/env bash
# A folder that timm's own save_for_hf writes does not load in transformers' AutoModelForImageClassification.
#
# Versions: timm 1.0.31, transformers 5.23.0, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: save_for_hf writes num_classes into config.json and again into its "model_args". transformers' TimmWrapper passes
#   the first by name and adds the second, so timm.create_model is given the argument twice.
# Expected: the logits of the model, as timm's "local-dir:" gives them; transformers documents timm checkpoints as supported.
# Seen: TypeError "... got multiple values for keyword argument 'num_classes'"; without the entry in model_args the same folder
#   loads with the model's logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
import pathlib
import sys

import timm
import torch
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

model = timm.create_model("resnet18", num_classes=3).eval()
image = torch.rand(1, 3, 64, 64)
save_for_hf(model, "exported", safe_serialization=True)


def read():
    try:
        with torch.no_grad():
            found = AutoModelForImageClassification.from_pretrained("exported").eval()(image).logits
            return f"largest difference {(found - model(image)).abs().max().item():.0e}"
    except TypeError as error:
        return f"TypeError: ...{str(error)[-60:]}"


first = read()
file = pathlib.Path("exported", "config.json")
config = json.loads(file.read_text())
config["model_args"].pop("num_classes")
file.write_text(json.dumps(config))
second = read()
print("as written:", first)
print("without num_classes in model_args:", second)
sys.exit(not ("multiple values" in first and "difference" in second))  # status 1: the behaviour has changed
PYTHON
