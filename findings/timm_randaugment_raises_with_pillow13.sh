#!/usr/bin/env bash
# timm's usual RandAugment policy, 'rand-m9-mstd0.5-inc1', ends a training run at random beside Pillow 13.
#
# Versions: timm 1.0.31, Pillow 13.0.0, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: the magnitude is drawn from a normal distribution around 9 and cut at 10. With "inc1", 10 turns into posterizing to
#   0 bits. Pillow 12.3 answered with a black image; Pillow 13 raises ValueError.
# Expected: a policy that timm documents and its recipes use runs on every valid image.
# Seen: 31 of 20000 images raise "bits must be between or equal to 1 and 8".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import random
import sys

import numpy
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

policy = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
image = Image.new("RGB", (32, 32), (200, 100, 50))
random.seed(0)
numpy.random.seed(0)
said = []
for _ in range(20000):
    try:
        policy(image)
    except ValueError as error:
        said.append(str(error))
print(f"{len(said)} of 20000 images raise {sorted(set(said))}")
sys.exit(not said)  # status 1: the behaviour has changed
PYTHON
