"""The two operator libraries: how their sources are compiled and linked.

`_C` (schemas and CPU kernels, from `csrc/**/*.cpp`) and `_C_cuda` (CUDA kernels, from `csrc/**/*.cu`) are plain shared
libraries on LibTorch's stable ABI. They hold no Python symbol, so one build serves every Python, and every torch from
the floor up.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from .find import ROOT, TORCH_FLOOR, Compiler, Nvcc, Torch, fail
from .glibc import link_flags, oldest_glibc
from .ninja_file import NinjaFile, compile_jobs

VISIBILITY = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# `#pragma omp simd` without an OpenMP library: it lets sums be reordered, which vectors need.
# Comparisons and square roots have no side effects here, so that loops with conditions become vectors too.
SIMD = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]


def build_name(torch: Torch) -> str:
    """Return the folder below build/ for objects, which outlives pip's own: `pip install -e .` compiles changes alone.

    One folder per torch: environments that share a checkout do not undo each other's work.
    """
    return f"{sys.platform}-{platform.machine()}-torch{torch.version}"


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def compile_flags(torch: Torch, *optimise: str) -> list[str]:
    """Return what every source of ours is compiled with, for the CPU and for CUDA."""
    floor = f"-DTORCH_TARGET_VERSION=0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"
    return ["-Icsrc", "-isystem", str(torch.root / "include"), "-std=c++17", *optimise, floor]


def cuda_flags(torch: Torch) -> list[str]:
    """Return what every CUDA source is compiled with, whatever it is compiled for."""
    return [*compile_flags(torch, "-O3", "-DNDEBUG"), "-DUSE_CUDA", "--expt-relaxed-constexpr"]


def link_torch(torch: Torch) -> list[str]:
    """The libraries name libtorch by its soname alone: whichever torch is loaded already satisfies that."""
    return [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]


def add_libraries(
    ninja: NinjaFile,
    torch: Torch,
    compiler: Compiler,
    nvcc: Nvcc | str,
    cxxflags: list[str] | None = None,
    ldflags: list[str] | None = None,
) -> list[str]:
    """Add the libraries to `ninja`, that of CUDA if there is an nvcc; return their paths.

    `cxxflags` and `ldflags` stand for those of the environment.
    """
    cpp = sources(".cpp")
    if not cpp:
        fail(f"there are no sources in {ROOT / 'csrc'}.", "use a complete checkout or source distribution.")
    cxxflags = environment_flags("CXXFLAGS") if cxxflags is None else cxxflags
    ldflags = environment_flags("LDFLAGS") if ldflags is None else ldflags
    flags = compile_flags(torch, "-O3", "-DNDEBUG")
    ninja.compiling("cxx", compiler.command, [*flags, *SIMD, *VISIBILITY, *WARNINGS, *cxxflags])
    # A symbol that nothing defines is an error here, not later on the user's machine.
    shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-Wl,-z,defs"]
    older = link_flags(ninja.folder, compiler)
    ninja.linking("link", [*compiler.command, *shared], [*older, *link_torch(torch), *ldflags])
    objects = [ninja.build(f"{source}.o", "cxx", [source]) for source in cpp]
    libraries = [ninja.build("_C.so", "link", objects)]
    if isinstance(nvcc, Nvcc) and sources(".cu"):
        libraries.append(add_cuda(ninja, torch, compiler, nvcc))
    return libraries


def add_cuda(ninja: NinjaFile, torch: Torch, compiler: Compiler, nvcc: Nvcc) -> str:
    cu = sources(".cu")
    host = ["-ccbin", compiler.host]
    passed_on = [f"-Xcompiler={flag}" for flag in VISIBILITY]
    own = ["--threads", str(max(1, compile_jobs() // len(cu))), *environment_flags("NVCC_FLAGS")]
    ninja.compiling("nvcc", [nvcc.path, *host], [*cuda_flags(torch), *nvcc.flags, *passed_on, *own])
    # cudart is linked statically, so that the file asks nothing of the machine but torch and a driver.
    link = [nvcc.path, *host, "-shared", "-cudart", "static", "-Xlinker=--exclude-libs,ALL"]
    older = [_through_nvcc(flag) for flag in link_flags(ninja.folder, compiler)]
    ninja.linking("nvlink", link, [*older, *cuda_libraries(ninja.folder, torch, compiler)])
    objects = [ninja.build(f"{source}.o", "nvcc", [source]) for source in cu]
    return ninja.build("_C_cuda.so", "nvlink", objects)


def _through_nvcc(flag: str) -> str:
    """Hand a flag on to the linker or to its driver; folders and objects are nvcc's own business."""
    if flag.startswith("-Wl,"):
        return f"-Xlinker={flag.removeprefix('-Wl,').replace(',', '=')}"
    return flag if flag.startswith("-L") or not flag.startswith("-") else f"-Xcompiler={flag}"


def cuda_libraries(folder: Path, torch: Torch, compiler: Compiler) -> list[str]:
    """Link flags for libtorch_cuda; beside a CPU-only torch, an empty library of that name stands in for it."""
    place = torch.root / "lib"
    if not (place / "libtorch_cuda.so").exists():
        place = folder / "stand_in"
        place.mkdir(parents=True, exist_ok=True)
        stand_in = ["-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libtorch_cuda.so", "-o"]
        subprocess.run([*compiler.command, *stand_in, str(place / "libtorch_cuda.so")], check=True)
    return [f"-L{torch.root / 'lib'}", f"-L{place}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]


def this_platform() -> str:
    return f"{sys.platform} {platform.machine()}"


def digest_of_sources() -> str:
    """Return what tells one state of `csrc/` from another."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("csrc/**/*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_info(version: str, torch: Torch, compiler: Compiler, nvcc: Nvcc | str, with_cuda: bool) -> str:
    """Return what `dcn_plugin._extension.info()` will tell about the libraries, as JSON."""
    cuda = {"version": nvcc.version, "architectures": nvcc.architectures} if isinstance(nvcc, Nvcc) else None
    info = {
        "version": version,
        "torch": torch.version,
        "torch_floor": ".".join(map(str, TORCH_FLOOR)),
        "compiler": compiler.version,
        "platform": this_platform(),
        "glibc": oldest_glibc(),
        "sources": digest_of_sources(),
        "cuda": cuda if with_cuda else None,
        "without_cuda_because": nvcc if isinstance(nvcc, str) else None,
    }
    return json.dumps(info, indent=2) + "\n"
