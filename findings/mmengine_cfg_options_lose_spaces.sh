#!/usr/bin/env bash
# MMEngine's DictAction, behind --cfg-options of every mm* script, removes the spaces inside values.
#
# Versions: mmengine 0.10.7, torch 2.13.0, Python 3.11.
# Behaviour: a quoted value with a space arrives without it, so a path below a folder with a space names another folder.
# Expected: the string as it was given.
# Seen: data.root="/data/my photos" arrives as "/data/myphotos".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 mmengine==0.10.7 numpy==2.4.6 'setuptools<82'
"$folder/venv/bin/python" - <<'PYTHON'
import argparse
import sys

from mmengine.config import DictAction

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-options", nargs="+", action=DictAction)
found = parser.parse_args(["--cfg-options", "data.root=/data/my photos"]).cfg_options
print(found)
sys.exit(found["data.root"] != "/data/myphotos")  # status 1: the behaviour has changed
PYTHON
