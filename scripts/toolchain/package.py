"""Putting the libraries into a package, for setup.py and for checkouts whose Python has no setuptools of today."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .find import ROOT, Compiler, Torch, fail, find_cuda
from .libraries import add_libraries, build_info, build_name
from .ninja_file import NinjaFile

FILES = ("_C.so", "_C_cuda.so", "_build_info.json")


def build_package(package: Path, version: str) -> None:
    """Compile what has changed, and put it into the folder `package`."""
    torch, compiler = Torch.find(), Compiler.find()
    nvcc = find_cuda(torch, compiler)
    ninja = NinjaFile(build_name(torch))
    libraries = add_libraries(ninja, torch, compiler, nvcc)
    info = build_info(version, torch, compiler, nvcc, len(libraries) == 2)
    info_file = ninja.folder / "_build_info.json"
    up_to_date = ninja.up_to_date(libraries)
    if not up_to_date or not info_file.exists() or info_file.read_text() != info:
        if isinstance(nvcc, str):
            libraries_of = f"the CPU alone, because {nvcc}"
        else:
            libraries_of = f"CUDA {nvcc.version} ({' '.join(nvcc.architectures)}) and the CPU"
        print(f"dcn_plugin: operators for {libraries_of}; torch {torch.version}, {compiler.version}", flush=True)
    if not up_to_date and ninja.run(libraries).returncode:
        without = " (DCN_PLUGIN_CUDA=0 builds without CUDA meanwhile)" if len(libraries) == 2 else ""
        fail("the compiler reported errors (above).", f"report the first of them, with its command{without}.")
    info_file.write_text(info)
    put_into(package, {path.name: path for path in [info_file, *(ROOT / library for library in libraries)]})


def put_into(package: Path, built: dict[str, Path]) -> None:
    package.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        target = package / name
        if name not in built:
            target.unlink(missing_ok=True)
            continue
        # Replaced, not overwritten: a process that has the old library mapped keeps it.
        shutil.copy2(built[name], target.with_name(name + ".new"))
        os.replace(target.with_name(name + ".new"), target)
