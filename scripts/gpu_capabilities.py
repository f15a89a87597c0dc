"""Print what TORCH_CUDA_ARCH_LIST must hold for this machine's GPUs, e.g. `8.0;9.0`; scripts/gpu_check.sh asks."""

from __future__ import annotations

import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check.sh: {sys.executable} has no torch ({error}); set PYTHON to one that has.")
if not torch.cuda.is_available():
    sys.exit(f"gpu_check.sh: torch {torch.__version__} finds no usable CUDA GPU on this machine.")
found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
print(";".join(sorted({f"{major}.{minor}" for major, minor in found})))
