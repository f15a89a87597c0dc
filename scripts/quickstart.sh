#!/usr/bin/env bash
# The main job on a fresh machine: makes .venv with the tested versions, compiles the operators, trains a small ResNet on
# upright digits and fine-tunes it on warped ones, plain and deformable. Arguments go to scripts/digits_study.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec python scripts/digits_study.py "$@"
