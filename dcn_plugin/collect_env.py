"""Versions, libraries and devices for a bug report: `python -m dcn_plugin.collect_env`.

Works where the operators do not: a library that is missing, stale or broken is what such a report is often about.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "mmengine",
    "mmcv",
    "mmcv-lite",
    "pytorch-lightning",
    "torchmetrics",
    "numpy",
    "setuptools",
    "ninja",
)
VARIABLES = ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "DCN_PLUGIN_CUDA", "CXX", "CXXFLAGS", "LD_LIBRARY_PATH")


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[0]


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if path is None:
        return "not found"
    printed = subprocess.run([path, "--version"], text=True, capture_output=True).stdout
    release = next((line for line in printed.splitlines() if "release" in line), "does not run")
    return f"{release.split(',', 1)[-1].strip()} ({path})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _size(library: Path) -> str:
    return f"{library} ({library.stat().st_size / 1e6:.1f} MB)" if library.is_file() else f"{library} is missing"


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {platform.libc_ver()[0] or 'libc'} {platform.libc_ver()[1]}".rstrip(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "compiler": _first_line(*os.environ.get("CXX", "c++").split(), "--version"),
        "nvcc": _nvcc(),
        **{f"${name}": os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _torch() -> dict[str, str]:
    import torch

    facts = {
        "torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            facts[f"gpu {index}"] = (
                f"{device.name}, {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
            )
        facts["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        facts["gpu"] = "none that torch can use"
    return facts


def _operators() -> dict[str, str]:
    from . import _extension

    built = _extension.info()
    cuda = built.get("cuda")
    facts = {"cpu library": _size(_extension.CPU_LIBRARY), "cuda library": _size(_extension.CUDA_LIBRARY)}
    if built:
        facts["built for"] = f"dcn_plugin {built['version']} on torch {built['torch']} by {built['compiler']}"
        facts["built cuda"] = (
            f"{cuda['version']} for {' '.join(cuda['architectures'])}"
            if cuda
            else f"no: {built['without_cuda_because']}"
        )
        sources = [path for path in (_extension.PACKAGE.parent / "csrc").glob("**/*") if path.is_file()]
        if any(path.stat().st_mtime > _extension.BUILD_INFO.stat().st_mtime for path in sources):
            facts["stale"] = f"csrc is newer than the libraries; to compile it: {_extension.rebuild_command()}"
    _extension.load()
    facts["loaded"] = "yes"
    return facts


def report() -> str:
    """Return the report, one `name: value` per line; a section that fails holds its exception instead.

    >>> print(report())  # doctest: +ELLIPSIS
    dcn_plugin: ...
    """
    lines = [f"dcn_plugin: {_package_version()}"]
    sections: list[Callable[[], dict[str, str]]] = [_system, _packages, _torch, _operators]
    for section in sections:
        try:
            facts = section()
        except Exception as error:  # a report on a broken installation must not itself break
            facts = {f"{section.__name__.strip('_')} failed": f"{type(error).__name__}: {error}"}
        lines += [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines)


def _package_version() -> str:
    from ._version import __version__

    return f"{__version__} ({Path(__file__).resolve().parent})"


def _packages() -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES}


if __name__ == "__main__":
    print(report())
