#!/usr/bin/env bash
# The CPU operators under sanitizers: compiles the library for them, below build/, and runs tests against it; the first
# report ends the run. The first argument chooses which, the others go to pytest:
#     bash scripts/sanitize.sh                 # AddressSanitizer and UndefinedBehaviorSanitizer: operator tests and fuzz
#     bash scripts/sanitize.sh thread          # ThreadSanitizer: every parallel loop of the operators, on several threads
#     DCN_PLUGIN_FUZZ_EXAMPLES=2000 bash scripts/sanitize.sh address tests/fuzz
# Needs g++ with its sanitizers' libraries (Debian, Ubuntu: they come with it). PYTHON chooses the interpreter, one with
# torch, setuptools, ninja, pytest and hypothesis; MAX_JOBS the number of compilations at a time. What it does not see: torch
# itself is not compiled that way, so memory is watched where our code touches it, whoever has allocated it. How
# ThreadSanitizer learns what torch's threads do: tests/sanitizers/fork_join.h.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
export CXX=${CXX:-g++}

kind=${1:-address}
shift $(($# > 0))
run=()
case $kind in
address)
    # libstdc++ comes with them, since exceptions must be known to the sanitizer before torch brings its own.
    libraries=(libasan.so libubsan.so libstdc++.so)
    # Optimised, these take more than twice as long to compile.
    flags="-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1
    # Left out: tests of torch's compiler, which says nothing about this library, and takes most of the time; the emulated
    # CUDA kernels, which have a run of their own under sanitizers (tests/ops/test_emulated_cuda.py).
    tests=(tests/ops tests/test_contracts.py tests/fuzz -k "not compile and not dynamic_graph and not emulated")
    ;;
thread)
    libraries=(libtsan.so)
    flags="-O1 -fsanitize=thread"
    # What torch does with memory (its calls of memcpy, say) is left out, since the order of its threads is not known.
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:${TSAN_OPTIONS:-}
    tests=(tests/sanitizers/threads.py)
    # Its shadow memory needs addresses that newer kernels may give away.
    ! setarch -R true 2>/dev/null || run=(setarch -R)
    ;;
*)
    printf '%s: the first argument is address or thread, not %s.\n' "${0##*/}" "$kind" >&2
    exit 2
    ;;
esac
[ $# -gt 0 ] || set -- "${tests[@]}"

preload=""
for library in "${libraries[@]}"; do
    path=$("$CXX" -print-file-name="$library" 2>/dev/null || true)
    if [ ! -e "$path" ]; then
        printf '%s: %s has no shared %s. To mend it: %s\n' "${0##*/}" "$CXX" "$library" "install g++, and set CXX to it." >&2
        exit 3
    fi
    preload+="${preload:+ }$path"
done

library=$(CXXFLAGS="-g1 -w -include tests/sanitizers/fork_join.h $flags" LDFLAGS="$flags" "$python" - "$kind" <<'END'
import fcntl
import re
import runpy
import subprocess
import sys

setup = runpy.run_path("setup.py")
torch, compiler = setup["requirements"]()
folder = setup["ROOT"] / "build" / re.sub(r"[^\w.+-]", "_", f"{sys.argv[1]}-torch{torch.version}")
folder.mkdir(parents=True, exist_ok=True)
# Who comes second waits, and finds it done.
lock = (folder / "lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
(library,) = setup["write_ninja"](folder, torch, compiler, "the CPU's library alone is compiled", 1)
ninja = [setup["find_ninja"](), "-f", str((folder / "build.ninja").relative_to(setup["ROOT"]))]
subprocess.run([*ninja, "-j", str(setup["compile_jobs"]()), library], check=True, stdout=sys.stderr)
print(setup["ROOT"] / library)
END
)

# The package as it is, with that library in the place of its own.
copy=$(mktemp -d "$(dirname "$library")/checkout.XXXXXX")
trap 'rm -rf "$copy"' EXIT
cp -r dcn_plugin tests pyproject.toml setup.py csrc "$copy/"
rm -f "$copy"/dcn_plugin/_C*.so
cp "$library" "$copy/dcn_plugin/_C.so"
cd "$copy"

export PYTHONPATH=$copy
# --capture=sys: a report is written past Python, and must not be captured with the rest of a process that ends there.
echo "== $(basename "$(dirname "$library")"): the tests run against ${library#"$root/"}"
"${run[@]}" env LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider -p no:xdist -x --capture=sys "$@"
