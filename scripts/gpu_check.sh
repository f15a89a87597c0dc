#!/usr/bin/env bash
# Checks the CUDA operators on this machine's GPU: compiles for it, runs the tests that need one, then the benchmark.
# Needs no network and no virtual environment, only a Python with torch, setuptools, ninja and pytest, and nvcc.
# PYTHON chooses the interpreter; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit("gpu_check.sh: %s has no torch (%s); set PYTHON to one that has." % (sys.executable, error))
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: torch %s finds no usable CUDA GPU on this machine." % torch.__version__)
print(";".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))')}
export TORCH_CUDA_ARCH_LIST

DCN_PLUGIN_CUDA=1 "$python" setup.py -q build_ext --inplace
"$python" -m dcn_plugin.collect_env
"$python" -m pytest -m cuda -p no:cacheprovider tests/ops tests/test_contracts.py tests/test_roi_layers.py tests/test_detection_models.py "$@"
"$python" benchmarks/run.py --device cuda
