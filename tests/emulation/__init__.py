"""The CUDA operators on CPU tensors: the GPU's source, compiled for the host with an emulated thread block."""

import functools
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# What the sanitizers' run adds to the compiler's command (tests/ops/test_emulated_cuda.py).
FLAGS = "DCN_PLUGIN_EMULATION_FLAGS"


def build(flags: str = "") -> Path:
    """Compile the library if anything that it is made of has changed; processes that ask at once take turns."""
    import fcntl

    setup = runpy.run_path(str(ROOT / "setup.py"))
    found, compiler = setup["requirements"]()
    folder = ROOT / "build" / "-".join(["emulation", f"torch{found.version}", *flags.replace("=", "-").split()])
    folder.mkdir(parents=True, exist_ok=True)
    here = folder.relative_to(ROOT)
    ninja = setup["NinjaFile"]()
    floor = f"-DTORCH_TARGET_VERSION=0x{setup['TORCH_FLOOR'][0]:02x}{setup['TORCH_FLOOR'][1]:02x}000000000000"
    options = [setup["STANDARD"], "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", floor]
    options += ["-Icsrc", "-Itests/emulation", "-isystem", str(found.root / "include"), "-Wall", "-Wextra"]
    options += ["-Wno-unknown-pragmas", *shlex.split(flags)]
    compile_cpp = [*compiler.command, "-MD", "-MF", "$out.d", *options]
    ninja.rule("cxx", [*compile_cpp, "-c", "$in", "-o", "$out"], compiles=True)
    libraries = [f"-L{found.root / 'lib'}", "-ltorch_cpu"]
    ninja.rule(
        "link", [*compiler.command, "-shared", *shlex.split(flags), "$in", "-o", "$out", *libraries], compiles=False
    )
    compiled = ninja.build(f"{here}/library.o", "cxx", ["tests/emulation/library.cpp"])
    library = ninja.build(f"{here}/library.so", "link", [compiled])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = folder / "build.ninja"
        if not script.exists() or script.read_text() != ninja.text:
            script.write_text(ninja.text)
        command = [setup["find_ninja"](), "-f", str(here / "build.ninja"), library]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / library


def load() -> object:
    """Return the namespace of the emulated operators, or skip the calling test where they cannot be."""
    if sys.platform != "linux":
        pytest.skip("the emulated block needs Linux")
    trouble = load_once()
    assert trouble is None, trouble
    return torch.ops.dcn_plugin_emulated


@functools.cache
def load_once() -> str | None:
    """Return what the compiler said, if it failed: once for all tests."""
    try:
        torch.ops.load_library(str(build(os.environ.get(FLAGS, ""))))
    except AssertionError as error:
        return str(error)
    return None
