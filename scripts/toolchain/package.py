"""Putting the libraries into a package, for setup.py and for checkouts whose Python has no setuptools of today."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from .find import ROOT, Compiler, Torch, fail, find_cuda
from .glibc import oldest_glibc
from .libraries import add_libraries, build_info, build_name, digest_of_sources, this_platform
from .ninja_file import NinjaFile

FILES = ("_C.so", "_C_cuda.so", "_build_info.json")


def build_package(package: Path, version: str) -> None:
    """Compile what has changed, or take it from a wheel, and put it into the folder `package`."""
    if wheel := os.environ.get("WHEEL"):
        return take_from(Path(wheel), package, version)
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


def take_from(wheel: Path, package: Path, version: str) -> None:
    """Put a wheel's libraries into `package`, if they are of these sources and for this kind of machine."""
    mend = "make one with scripts/wheel.sh, or unset WHEEL to compile."
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            names = [name for name in FILES if f"dcn_plugin/{name}" in archive.namelist()]
            if missing := {"_C.so", "_build_info.json"}.difference(names):
                raise ValueError(f"it has no dcn_plugin/{min(missing)}")
            found = {name: Path(archive.extract(f"dcn_plugin/{name}", folder)) for name in names}
            info = json.loads(found["_build_info.json"].read_text())
            if not isinstance(info, dict):
                raise ValueError("its _build_info.json holds no names")
            wanted = dict(version=version, platform=this_platform(), sources=digest_of_sources())
            if glibc := oldest_glibc():
                wanted["glibc"] = glibc  # which the name of the new wheel promises
            for name, value in wanted.items():
                if info.get(name) != value:
                    fail(f"WHEEL: the {name} of {wheel} is {info.get(name)}, and here {value} is needed.", mend)
            put_into(package, found)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        fail(f"WHEEL: {wheel} is no wheel of dcn_plugin ({type(error).__name__}: {error}).", mend)


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
