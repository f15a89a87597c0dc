#!/usr/bin/env bash
# Compiles the CPU operators with another compiler than this machine's own, with setup.py's flags and warnings as errors.
# Without an argument for 64-bit ARM (Debian, Ubuntu: `apt install g++-aarch64-linux-gnu`); an argument names any other
# compiler: `bash scripts/compile_check.sh clang++`. Nothing is linked or run, the objects lie below build/.
# PYTHON chooses the interpreter, one with torch, setuptools and ninja. CXXFLAGS adds flags: with -fopt-info-vec, GCC
# tells which loops became vector instructions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CXX=${1:-aarch64-linux-gnu-g++} CXXFLAGS="-Werror ${CXXFLAGS:-}"
if ! command -v "${CXX%% *}" >/dev/null 2>&1; then
    printf '\n%s: %s\n  To mend it: %s\n' "${0##*/}" "there is no ${CXX%% *} on PATH." \
        "install it (Debian, Ubuntu: 'apt install g++-aarch64-linux-gnu'), or name another compiler as the argument." >&2
    exit 1
fi
exec "${PYTHON:-python3}" - <<'END'
import os
import re
import runpy
import subprocess

setup = runpy.run_path("setup.py")
torch, compiler = setup["requirements"]()
folder = setup["ROOT"] / "build" / re.sub(r"[^\w.+-]", "_", f"check-{compiler.command[0]}-torch{torch.version}")
folder.mkdir(parents=True, exist_ok=True)
setup["write_ninja"](folder, torch, compiler, "objects alone are compiled", 1)
ninja = [setup["find_ninja"](), "-f", str((folder / "build.ninja").relative_to(setup["ROOT"]))]
listed = subprocess.run([*ninja, "-t", "targets", "rule", "cxx"], check=True, text=True, capture_output=True)
jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
print(f"{compiler.version}, torch {torch.version}'s headers", flush=True)
raise SystemExit(subprocess.run([*ninja, "-j", jobs, *listed.stdout.split()]).returncode)
END
