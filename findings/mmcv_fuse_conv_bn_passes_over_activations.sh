#!/usr/bin/env bash
# mmcv's fuse_conv_bn folds a batch norm into the last convolution it saw, even where an activation stands between them.
#
# Versions: mmcv-lite 2.2.0, mmengine 0.10.7, torch 2.13.0, Python 3.11.
# Behaviour: fuse_conv_bn walks over children in order and folds a norm into the latest nn.Conv2d before it; modules of any other
#   class between the two are passed over. So conv -> ReLU -> norm, or conv -> layer of one's own -> norm, changes its output.
# Expected: the same outputs before and after, or the pair left alone; --fuse-conv-bn of the mm* packages calls this on whole models.
# Seen: outputs of conv -> ReLU -> norm differ by more than 0.5; those of conv -> norm -> ReLU agree to rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 mmcv-lite==2.2.0 mmengine==0.10.7 numpy==2.4.6 'setuptools<82'
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch
from mmcv.cnn.utils import fuse_conv_bn
from torch import nn

torch.manual_seed(0)
conv, norm, image = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.randn(1, 3, 8, 8)
norm.running_mean.normal_()
norm.running_var.uniform_(0.5, 2)


def difference(*layers):
    model = nn.Sequential(*copy.deepcopy(layers)).eval()
    with torch.no_grad():
        before = model(image)
        return (fuse_conv_bn(model)(image) - before).abs().max().item()


neighbours, apart = difference(conv, norm, nn.ReLU()), difference(conv, nn.ReLU(), norm)
print(f"conv -> norm -> ReLU: outputs differ by {neighbours:.1e}; conv -> ReLU -> norm: by {apart:.1e}")
sys.exit(not (neighbours < 1e-5 and apart > 0.5))  # status 1: the behaviour has changed
PYTHON
