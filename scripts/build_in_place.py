"""Compile the operators into this checkout: `python setup.py build_ext --inplace`, without setuptools.

On a borrowed machine without a network, setuptools may be too old to read pyproject.toml. The environment variables are
those of scripts/toolchain.
"""

from __future__ import annotations

import runpy

from toolchain import ROOT, build_package

if __name__ == "__main__":
    version = runpy.run_path(str(ROOT / "dcn_plugin/_version.py"))["__version__"]
    build_package(ROOT / "dcn_plugin", version)
