#!/usr/bin/env bash
# Forward mode through torchvision's deform_conv2d and roi_align gives a derivative of zero, without an error.
#
# Versions: torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Behaviour: both operators are registered with a formula for reverse mode alone. torch.func.jvp, and dual numbers, return a
#   tangent that is 0 everywhere; an operator of torch that lacks a formula for forward mode raises NotImplementedError.
# Expected: an error, or the derivative. Both operators are linear in the input, so along the input itself it is the output.
# Seen: norms of the outputs 41.3 and 3.4, of the tangents 0.0 and 0.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torchvision.ops import deform_conv2d, roi_align

torch.manual_seed(0)
image, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
offset, boxes = torch.randn(1, 18, 6, 6), torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]])
zero = True
for name, call in (
    ("deform_conv2d", lambda x: deform_conv2d(x, offset, weight)),
    ("roi_align", lambda x: roi_align(x, boxes, 4)),
):
    out, tangent = torch.func.jvp(call, (image,), (image,))
    print(f"{name}: norm of the output {out.norm():.1f}, of its derivative along the input {tangent.norm():.1f}")
    zero &= bool(out.norm() > 1) and not tangent.any()
sys.exit(not zero)  # status 1: the behaviour has changed
PYTHON
