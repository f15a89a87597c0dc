"""Compile the CPU operators with another compiler than this machine's own; the toolchain's flags, warnings are errors.

    python scripts/compile_check.py            # for 64-bit ARM (Debian, Ubuntu: `apt install g++-aarch64-linux-gnu`)
    python scripts/compile_check.py clang++    # any other compiler

Nothing is linked or run, the objects lie below build/. Needs torch, setuptools and ninja. CXXFLAGS adds flags: with
-fopt-info-vec, GCC tells which loops became vector instructions.
"""

from __future__ import annotations

import argparse
import shlex
import shutil

from toolchain import Compiler, NinjaFile, Torch, add_libraries, environment_flags, fail


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CPU operators with another compiler, warnings as errors.")
    parser.add_argument("compiler", nargs="?", default="aarch64-linux-gnu-g++", help="(default: %(default)s)")
    named = parser.parse_args().compiler
    name = shlex.split(named)[0]
    if shutil.which(name) is None:
        fail(
            f"there is no {name} on PATH.",
            "install it (Debian, Ubuntu: `apt install g++-aarch64-linux-gnu`), or name another compiler.",
            unable="the operators cannot be compiled",
        )
    torch, compiler = Torch.find(), Compiler.find(named)
    ninja = NinjaFile(f"check-{compiler.command[0]}-torch{torch.version}")
    flags = ["-Werror", *environment_flags("CXXFLAGS")]
    add_libraries(ninja, torch, compiler, "objects alone are compiled", cxxflags=flags)
    print(f"{compiler.version}, torch {torch.version}'s headers", flush=True)
    return ninja.run(ninja.outputs["cxx"]).returncode


if __name__ == "__main__":
    raise SystemExit(main())
