"""What scripts/gpu_check.sh asks about this machine's GPUs.

python scripts/gpu_capabilities.py             # what TORCH_CUDA_ARCH_LIST must hold, e.g. `8.0;9.0`
python scripts/gpu_capabilities.py --describe  # device, driver and versions, in a line
python scripts/gpu_capabilities.py --built     # fails where the operators in this checkout are not for these GPUs
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check.sh: {sys.executable} has no torch ({error}); set PYTHON to one that has.")


def architectures() -> list[str]:
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return sorted({f"{major}.{minor}" for major, minor in found})


def describe() -> str:
    from torch.utils import collect_env

    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    return f"{name}, capability {major}.{minor}, driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def check_built() -> None:
    """Machine code also runs on later minors of its major."""
    info = Path(__file__).resolve().parents[1] / "dcn_plugin/_build_info.json"
    built = (json.loads(info.read_text()).get("cuda") or {}).get("architectures", []) if info.exists() else []
    covered = [found.groups() for entry in built if (found := re.match(r"(\d+)\.(\d+)", entry))]
    for arch in architectures():
        major, minor = arch.split(".")
        if not any(major == has_major and int(has_minor) <= int(minor) for has_major, has_minor in covered):
            sys.exit(
                f"gpu_check.sh: the operators in this checkout are built for {', '.join(built) or 'no GPU'}, not for "
                f"{arch}; run `bash scripts/gpu_check.sh build`."
            )


if not torch.cuda.is_available():
    sys.exit(f"gpu_check.sh: torch {torch.__version__} finds no usable CUDA GPU on this machine.")
if "--built" in sys.argv:
    check_built()
else:
    print(describe() if "--describe" in sys.argv else ";".join(architectures()))
