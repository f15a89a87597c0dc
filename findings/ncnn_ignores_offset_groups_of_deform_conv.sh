#!/usr/bin/env bash
# ncnn computes something else for a torchvision DeformConv2d with several offset groups, and no step on the way says so.
#
# Versions: pnnx 20261020, ncnn 1.0.20261020, torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Behaviour: pnnx.export turns torchvision.ops.DeformConv2d into ncnn's DeformableConv2D. With offsets of one group ncnn's output is
#   torchvision's. With offsets of two groups the file is written, loads, and runs; the output has the right shape.
# Expected: the same numbers, or a refusal: ncnn's layer has no parameter for offset groups, and pnnx sees their number.
# Seen: a difference of about 1e-6 of the largest output with one offset group, and of about its own size with two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 pnnx==20261020 ncnn==1.0.20261020
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import ncnn
import numpy as np
import pnnx
import torch
import torchvision
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)


class Deformed(nn.Module):
    def __init__(self, offset_groups):
        super().__init__()
        self.predict = nn.Conv2d(8, 2 * offset_groups * 9, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(8, 12, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.predict(x))


def difference(offset_groups):
    model, x = Deformed(offset_groups).eval(), torch.randn(1, 8, 16, 20)
    with torch.no_grad():
        wanted = model(x)
        pnnx.export(model, f"m{offset_groups}.pt", (x,), fp16=False)
    with ncnn.Net() as net:
        assert net.load_param(f"m{offset_groups}.ncnn.param") == 0 and net.load_model(f"m{offset_groups}.ncnn.bin") == 0
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x[0].numpy()).clone())
            status, out = extractor.extract("out0")
            assert status == 0
            found = torch.from_numpy(np.array(out))
    assert found.shape == wanted[0].shape
    return ((found - wanted[0]).abs().max() / wanted.abs().max()).item()


one, two = difference(1), difference(2)
print(f"difference, in parts of the largest output: one offset group {one:.1e}, two {two:.1e}")
sys.exit(not (one < 1e-3 and two > 0.1))  # status 1: the behaviour has changed
PYTHON
