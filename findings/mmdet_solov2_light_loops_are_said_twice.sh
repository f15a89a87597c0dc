#!/usr/bin/env bash
# mmdet's published configurations of light SOLOv2 cannot be run by MMEngine's Runner: they say `by_epoch` beside an inherited `type`.
#
# Versions: mmdet 3.3.0, mmengine 0.10.7, torch 2.13.0, Python 3.11.
# Behaviour: they set train_cfg = dict(by_epoch=True, ...) over a base whose train_cfg has a type.
#   Config.fromfile merges the two dicts, and Runner.build_train_loop takes one of the two keys only.
# Expected: a configuration of the release builds its training loop.
# Seen: RuntimeError "Only one of `type` or `by_epoch` can exist in `loop_cfg`." for each of them; without by_epoch it builds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 mmengine==0.10.7 numpy==2.4.6 'setuptools<82'
"$folder/venv/bin/pip" install -q --no-deps mmdet==3.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

configs = Path(find_spec("mmdet").submodule_search_locations[0], ".mim", "configs")
said_twice, refused = [], []
for file in sorted(configs.glob("solov2/*.py")):
    loop = Config.fromfile(file).train_cfg
    if "type" in loop and "by_epoch" in loop:
        said_twice.append(file.relative_to(configs).as_posix())
        try:
            Runner.build_train_loop(None, loop)
        except RuntimeError as error:
            refused.append(str(error))
print(f"{len(said_twice)} configurations, {len(refused)} refused: {sorted(set(refused))}")
print(*said_twice, sep="\n")
sys.exit(not (said_twice and len(refused) == len(said_twice)))  # status 1: the behaviour has changed
PYTHON
