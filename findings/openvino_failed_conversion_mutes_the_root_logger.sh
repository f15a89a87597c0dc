#!/usr/bin/env bash
# A conversion that fails leaves Python's root logger muted: warnings of every library are lost from then on.
#
# Versions: openvino 2026.4.0, torch 2.15.0, packaging 26.4, Python 3.11.
# Behaviour: openvino.convert_model sets the root logger to ERROR, gives it a handler and a filter, and takes all of that back
#   at its end, but not where it raises an error, as for an operator that it does not know.
# Expected: the root logger as it was, whether or not the conversion succeeds.
# Seen: (level, handlers, filters) (30, 0, 0) before, (30, 0, 0) after one that succeeds, (40, 1, 1) after one that fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.0 torch==2.15.0 numpy==2.4.6 packaging==26.4
cat > "$folder/look.py" <<'PYTHON'
import logging

import openvino
import torch


class Eigenvalues(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x)


def state():
    root = logging.getLogger()
    return root.level, len(root.handlers), len(root.filters)


example = (torch.eye(3),)
before = state()
openvino.convert_model(torch.export.export(torch.nn.ReLU(), example))
succeeded = state()
try:
    openvino.convert_model(torch.export.export(Eigenvalues(), example))
except Exception as error:
    print("failed:", type(error).__name__)
failed = state()
print("before", before, "succeeded", succeeded, "failed", failed)
assert (before, succeeded, failed) == ((30, 0, 0), (30, 0, 0), (40, 1, 1))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
