#!/usr/bin/env bash
# deformops on the CPU weighs wrong what it reads from maps of more than 256 pixels, if values are bfloat16, whatever the locations are.
#
# Versions: deformops 3.0.1, torch 2.13.0, Python 3.12 (deformops asks for 3.12 or 3.13: have it as `python3`).
# Behaviour: `deformops.registry.msda` documents that locations may be of another floating type than values. With float32 locations
#   and bfloat16 values the position is computed in float32, but the whole part that is taken off it goes through bfloat16, which
#   holds whole numbers to 256 alone: from there on the fraction between two pixels is off by 1 and more, and is no fraction any more.
# Expected: what the same values give in float32 (they are whole multiples of 1/256 here, so nothing of them is rounded). At most
#   the results' own rounding, 0.4 %; and no sum of weights 1 larger than what is summed.
# Seen: mean difference, in parts of the mean result, 0.0 % to a width of 256, 31 % at 320, 68 % at 512, 150 % at 1024.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 deformops==3.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from deformops.registry import msda

torch.manual_seed(0)
locations, weights = torch.rand(1, 1000, 1, 1, 4, 2), torch.full((1, 1000, 1, 1, 4), 0.25)


def difference(width):
    shapes, start = torch.tensor([[4, width]]), torch.tensor([0])
    value = torch.randint(-256, 257, (1, 4 * width, 1, 32)) / 256
    half, single = (msda(value.to(t), shapes, start, locations, weights.to(t)).float() for t in (torch.bfloat16, torch.float32))
    print(
        f"width {width}: mean difference {(half - single).abs().mean() / single.abs().mean():.1%} of the mean result; "
        f"largest value {value.abs().max():.2f}, largest result in float32 {single.abs().max():.2f}, in bfloat16 {half.abs().max():.2f}"
    )
    return ((half - single).abs().mean() / single.abs().mean()).item()


found = [difference(width) for width in (128, 256, 320, 512, 1024)]
sys.exit(not (max(found[:2]) < 0.01 and min(found[2:]) > 0.1))  # status 1: the behaviour has changed
PYTHON
