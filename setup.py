"""Put the two operator libraries into the package: what setuptools asks for. Mere metadata stands in pyproject.toml.

How they are compiled, and the environment variables that steer it, stand in scripts/toolchain.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))  # pip does not have this folder on its path

from toolchain import (  # noqa: E402
    ROOT,
    Compiler,
    NinjaFile,
    Torch,
    add_libraries,
    build_info,
    build_name,
    fail,
    find_cuda,
)

if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools {setuptools.__version__} is too old to read pyproject.toml; 77.0.3 or newer is needed.",
        f"`{sys.executable} -m pip install -U setuptools ninja`, or leave --no-build-isolation out.",
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (the older ones do not have it)


class BuildLibraries(build_ext):
    """`build_ext` that hands the whole compilation to ninja and puts the libraries into the package."""

    FILES = ("_C.so", "_C_cuda.so", "_build_info.json")

    def run(self) -> None:
        if sys.platform == "win32":
            fail("Windows is not supported natively.", "use Linux, macOS, or WSL 2 on Windows.")
        torch, compiler = Torch.find(), Compiler.find()
        nvcc = find_cuda(torch, compiler)
        ninja = NinjaFile(build_name(torch))
        libraries = add_libraries(ninja, torch, compiler, nvcc)
        info = build_info(self.distribution.get_version(), torch, compiler, nvcc, len(libraries) == 2)
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
        self.put_into_package({path.name: path for path in [info_file, *(ROOT / library for library in libraries)]})

    def put_into_package(self, built: dict[str, Path]) -> None:
        package = ROOT / "dcn_plugin" if self.inplace else Path(self.build_lib, "dcn_plugin")
        package.mkdir(parents=True, exist_ok=True)
        for name in self.FILES:
            target = package / name
            if name not in built:
                target.unlink(missing_ok=True)
                continue
            # Replaced, not overwritten: a process that has the old library mapped keeps it.
            shutil.copy2(built[name], target.with_name(name + ".new"))
            os.replace(target.with_name(name + ".new"), target)

    def get_outputs(self) -> list[str]:
        # In place, nothing is in build_lib: the files stand beside the Python sources.
        names = [] if self.inplace else self.FILES
        return [str(path) for name in names if (path := Path(self.build_lib, "dcn_plugin", name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel per platform, for every Python 3: the libraries are no Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    if "dist_info" in sys.argv:
        # pip asks for metadata before it downloads the dependencies and builds: say what is missing now, not then.
        Torch.find()
        Compiler.find()
    setup(
        ext_modules=[Extension("dcn_plugin._C", sources=[])],  # says that the package is not pure Python
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
