#!/usr/bin/env bash
# A model of transformers can no longer be pickled, nor saved whole by torch.save, once it was asked for attention weights.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11.
# Behaviour: a fresh BertModel is pickled; after one call with output_attentions=True it is not, whatever is asked for later.
# Expected: what a call returns does not decide whether the model can be sent to another process or saved.
# Seen: the call leaves forward hooks on the layers, functions made inside of a function:
#   AttributeError: Can't pickle local object 'install_output_capuring_hook.<locals>.output_capturing_hook'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import pickle
import sys

import torch
from transformers import BertConfig, BertModel

config = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    attn_implementation="eager",
)
model, words = BertModel(config).eval(), torch.tensor([[1, 2, 3]])
model(words)
print(f"before: {len(pickle.dumps(model))} bytes")
model(words, output_attentions=True)
try:
    print(f"after: {len(pickle.dumps(model))} bytes")
except (AttributeError, pickle.PicklingError) as error:
    print(f"after: {type(error).__name__}: {error}")
    sys.exit(0 if "output_capturing_hook" in str(error) else 1)
sys.exit(1)  # the behaviour has changed
PYTHON
