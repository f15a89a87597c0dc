#!/usr/bin/env bash
# The CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer: compiles the library with both, below build/, and
# runs the operator tests and the fuzz against it; the first report of either ends the run. Arguments go to pytest:
#     bash scripts/sanitize.sh                                            # what is named below
#     DCN_PLUGIN_FUZZ_EXAMPLES=2000 bash scripts/sanitize.sh tests/test_fuzz.py
# Needs g++ with its sanitizers' libraries (Debian, Ubuntu: they come with it). PYTHON chooses the interpreter, one with
# torch, setuptools, ninja, pytest and hypothesis; MAX_JOBS the number of compilations at a time. What it does not see: torch
# itself is not compiled that way, so memory is watched where our code touches it, whoever has allocated it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
export CXX=${CXX:-g++} OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

preload=""
# libstdc++ comes with them, since exceptions must be known to the sanitizer before torch brings its own.
for library in libasan.so libubsan.so libstdc++.so; do
    path=$("$CXX" -print-file-name="$library")
    if [ ! -e "$path" ]; then
        printf '\n%s: %s has no shared %s.\n  To mend it: %s\n' "${0##*/}" "$CXX" "$library" "install g++, and set CXX to it." >&2
        exit 1
    fi
    preload+="${preload:+ }$path"
done

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Not -O3: lines and variables of a report stay recognisable.
export CXXFLAGS="-O1 -g1 -w $sanitize" LDFLAGS="$sanitize"
library=$("$python" - <<'END'
import re
import runpy
import subprocess
import sys

setup = runpy.run_path("setup.py")
torch, compiler = setup["requirements"]()
folder = setup["ROOT"] / "build" / re.sub(r"[^\w.+-]", "_", f"address-torch{torch.version}")
folder.mkdir(parents=True, exist_ok=True)
(library,) = setup["write_ninja"](folder, torch, compiler, "the CPU's library alone is compiled", 1)
ninja = [setup["find_ninja"](), "-f", str((folder / "build.ninja").relative_to(setup["ROOT"]))]
subprocess.run([*ninja, "-j", str(setup["compile_jobs"]()), library], check=True, stdout=sys.stderr)
print(setup["ROOT"] / library)
END
)

# The package as it is, with that library in the place of its own.
copy=$(dirname "$library")/checkout
rm -rf "$copy"
mkdir -p "$copy"
cp -r dcn_plugin tests pyproject.toml setup.py csrc "$copy/"
rm -f "$copy"/dcn_plugin/_C*.so
cp "$library" "$copy/dcn_plugin/_C.so"
cd "$copy"

# Left out: tests of torch's compiler, which says nothing about this library, and takes most of the time; the emulated CUDA
# kernels, which have a run of their own under sanitizers (tests/ops/test_emulated_cuda.py).
[ $# -gt 0 ] || set -- tests/ops tests/test_contracts.py tests/test_fuzz.py -k "not compile and not dynamic_graph and not emulated"
export PYTHONPATH=$copy ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
unset CXXFLAGS LDFLAGS
echo "== $(basename "$(dirname "$library")"): the tests run against ${library#"$root/"}"
exec env LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider -p no:xdist -x "$@"
