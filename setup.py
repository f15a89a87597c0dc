"""Put the two operator libraries into the package: what setuptools asks for. Mere metadata stands in pyproject.toml.

How they are compiled, and the environment variables that steer it, stand in scripts/toolchain.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))  # pip does not have this folder on its path

from toolchain import FILES, ROOT, Compiler, Torch, build_package, fail, wheel_platform  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools {setuptools.__version__} is too old to read pyproject.toml; 77.0.3 or newer is needed.",
        f"`{sys.executable} -m pip install -U setuptools ninja`, or leave --no-build-isolation out.",
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (the older ones do not have it)


class BuildLibraries(build_ext):
    """`build_ext` that hands the whole compilation to ninja and puts the libraries into the package."""

    def run(self) -> None:
        if sys.platform == "win32":
            fail("Windows is not supported natively.", "use Linux, macOS, or WSL 2 on Windows.")
        package = ROOT / "dcn_plugin" if self.inplace else Path(self.build_lib, "dcn_plugin")
        build_package(package, self.distribution.get_version())

    def get_outputs(self) -> list[str]:
        # In place, nothing is in build_lib: the files stand beside the Python sources.
        names = [] if self.inplace else FILES
        return [str(path) for name in names if (path := Path(self.build_lib, "dcn_plugin", name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel per platform, for every Python 3: the libraries are no Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", wheel_platform(platform.machine()) or super().get_tag()[2])


if __name__ == "__main__":
    if "dist_info" in sys.argv and not os.environ.get("WHEEL"):
        # pip asks for metadata before it downloads the dependencies and builds: say what is missing now, not then.
        # Libraries out of a wheel need neither.
        Torch.find()
        Compiler.find()
    setup(
        ext_modules=[Extension("dcn_plugin._C", sources=[])],  # says that the package is not pure Python
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
