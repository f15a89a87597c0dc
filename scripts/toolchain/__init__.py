"""What compiles `csrc/`, for setup.py, the checks beside this folder and the tests that compile. It imports no torch.

Environment:
    DCN_PLUGIN_CUDA        `auto` (default: the CUDA library is built when there is a usable nvcc), `1`, `0`
    TORCH_CUDA_ARCH_LIST   e.g. `"8.0;9.0+PTX"`; the default covers every GPU from 7.5 up that nvcc knows
    CUDA_HOME              toolkit to use; by default the nvcc on PATH
    CXX, CXXFLAGS, LDFLAGS, NVCC_FLAGS   compiler and additional flags
    DCN_PLUGIN_GLIBC       e.g. `2.28`: link for systems with that glibc (needs ziglang); the default is this machine's
    DCN_PLUGIN_ZIG         folder that ziglang is in, where the running Python has none
    WHEEL                  a wheel of this very source: its libraries are taken, and nothing is compiled
    MAX_JOBS               parallel compilations
"""

from .find import ROOT, TORCH_FLOOR, Compiler, Nvcc, Torch, fail, find_cuda, gencode, output_of
from .glibc import wheel_platform
from .libraries import (
    VISIBILITY,
    WARNINGS,
    add_libraries,
    build_info,
    build_name,
    compile_flags,
    cuda_flags,
    environment_flags,
    link_torch,
)
from .ninja_file import NinjaFile
from .package import FILES, build_package

__all__ = [
    "FILES",
    "ROOT",
    "TORCH_FLOOR",
    "VISIBILITY",
    "WARNINGS",
    "Compiler",
    "NinjaFile",
    "Nvcc",
    "Torch",
    "add_libraries",
    "build_info",
    "build_name",
    "build_package",
    "compile_flags",
    "cuda_flags",
    "environment_flags",
    "fail",
    "find_cuda",
    "gencode",
    "link_torch",
    "output_of",
    "wheel_platform",
]
