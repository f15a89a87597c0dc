#!/usr/bin/env bash
# A Deformable DETR or a Grounding DINO with one decoder layer cannot be built.
#
# Versions: transformers 5.23.0, timm 1.0.31, torch 2.15.0, torchvision 0.29.2, Python 3.11.
# Behaviour: `decoder_layers=1` is a legal configuration. Their heads tie the boxes' heads of layers 1, 2, ... to that of layer 0 by
#   patterns of names; where there is no such layer, nothing matches, and the constructor takes that for a mistake in the pattern.
# Expected: a model of one decoder layer, as RT-DETR's class gives, and as a base model without a head (`DeformableDetrModel`) is.
# Seen: ValueError: There is an issue with your definition of `tie_weights_keys` for ^bbox_embed.0:^bbox_embed.(?![0])\d+.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 timm==1.0.31 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import transformers


def built(name, **layers):
    config = getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")(encoder_layers=1, **layers)
    try:
        getattr(transformers, name)(config)
    except ValueError as error:
        print(f"{name} {layers}: ValueError: {str(error)[:110]} ...")
        return False
    print(f"{name} {layers}: built")
    return True


one, two = dict(decoder_layers=1), dict(decoder_layers=2)
refused = [built(f"{name}ForObjectDetection", **one) for name in ("DeformableDetr", "GroundingDino")]
fine = [
    built("DeformableDetrForObjectDetection", **two), built("DeformableDetrModel", **one),
    built("RTDetrForObjectDetection", **one),
]  # fmt: skip
sys.exit(not (not any(refused) and all(fine)))  # status 1: the behaviour has changed
PYTHON
