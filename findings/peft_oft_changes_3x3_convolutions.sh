#!/usr/bin/env bash
# peft's OFT changes the output of a 3x3 convolution before anything is trained; for a 1x1 convolution it does not.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11.
# Behaviour: OFTConfig on an nn.Conv2d with kernel_size=3 and padding=1. The rotations are the identity at the start, and yet
#   the adapted module computes something else.
# Expected: as the documents say, an adapter starts with the outputs of the model.
# Seen: the output of the 1x1 convolution is unchanged (0); that of the 3x3 convolution is off by as much as its own size (about 5).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
image = torch.randn(2, 4, 9, 9)


def change(kernel_size):
    model = nn.Sequential(nn.Conv2d(4, 8, kernel_size, padding=kernel_size // 2)).eval()
    with torch.no_grad():
        before = model(image)
        adapted = get_peft_model(model, OFTConfig(target_modules=["0"], oft_block_size=4, r=0)).eval()
        return (adapted(image) - before).abs().max().item()


small, large = change(1), change(3)
print(f"OFT at its start changes the output of a 1x1 convolution by {small:.1e}, of a 3x3 convolution by {large:.1e}")
sys.exit(not (small < 1e-5 and large > 0.1))  # status 1: the behaviour has changed
PYTHON
