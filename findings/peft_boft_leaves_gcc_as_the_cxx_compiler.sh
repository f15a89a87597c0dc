#!/usr/bin/env bash
# peft's BOFT leaves the environment variables CC and CXX at "gcc" in the process that used it.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11, on a machine without a CUDA compiler for this torch.
# Behaviour: the first BOFT layer tries to build a CUDA extension with CC=gcc and CXX=gcc set for the attempt. Where the attempt fails,
#   a warning says so and BOFT goes on without the extension, but the two variables are not put back.
# Expected: the environment as it was before. Whatever compiles C++ later in that process, or in one that it starts, links
#   with gcc, which leaves the C++ library out: "undefined reference to std::...".
# Seen: CXX is not set before, and "gcc" after get_peft_model(..., BOFTConfig(...)); outputs are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.23.0 numpy==2.4.6
env -u CC -u CXX TORCH_EXTENSIONS_DIR="$folder/extensions" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import sys

import torch
from peft import BOFTConfig, get_peft_model
from torch import nn

before = os.environ.get("CXX")
model = nn.Sequential(nn.Linear(8, 8))
image = torch.rand(2, 8)
expected = model(image)
adapted = get_peft_model(model, BOFTConfig(target_modules=["0"], boft_block_size=4))
print(f"CXX before: {before}, after: {os.environ.get('CXX')}; outputs differ by {(adapted(image) - expected).abs().max():.0e}")
sys.exit(not (before is None and os.environ.get("CXX") == "gcc"))  # status 1: the behaviour has changed
PYTHON
