"""The CPU operators under sanitizers: compile the library for them, below build/, and run tests against it.

    python scripts/sanitize.py           # AddressSanitizer and UndefinedBehaviorSanitizer: operator tests and fuzz
    python scripts/sanitize.py thread    # ThreadSanitizer: every parallel loop of the operators, on several threads
    DCN_PLUGIN_FUZZ_EXAMPLES=2000 python scripts/sanitize.py address tests/fuzz

The first argument chooses which, the others go to pytest; the first report ends the run. Needs g++ with its sanitizers'
libraries (Debian, Ubuntu: they come with it), torch, setuptools, ninja, pytest and hypothesis. What it does not see:
torch itself is not compiled that way, so memory is watched where our code touches it, whoever has allocated it. How
ThreadSanitizer learns what torch's threads do: tests/sanitizers/fork_join.h.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from toolchain import ROOT, Compiler, NinjaFile, Torch, add_libraries, fail, output_of

NO_RUNTIME = 3  # the exit status where the compiler lacks a sanitizer's library


class Kind(NamedTuple):
    runtimes: list[str]
    flags: list[str]
    environment: dict[str, str]
    tests: list[str]


def options(name: str, ours: str) -> dict[str, str]:
    """A sanitizer's variable; what it holds already comes last, and so counts."""
    return {name: f"{ours}:{os.environ.get(name, '')}"}


KINDS = {
    "address": Kind(
        # libstdc++ comes with them, since exceptions must be known to the sanitizer before torch brings its own.
        runtimes=["libasan.so", "libubsan.so", "libstdc++.so"],
        # Optimised, these take more than twice as long to compile.
        flags=["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        environment={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **options("ASAN_OPTIONS", "detect_leaks=0:detect_odr_violation=0"),
        },
        # Left out: tests of torch's compiler, which says nothing about this library, and takes most of the time; the
        # emulated CUDA kernels, which have a run of their own under sanitizers (tests/ops/test_emulated_cuda.py).
        tests=[
            *("tests/ops", "tests/test_contracts.py", "tests/fuzz"),
            *("-k", "not compile and not dynamic_graph and not emulated"),
        ],
    ),
    "thread": Kind(
        runtimes=["libtsan.so"],
        flags=["-O1", "-fsanitize=thread"],
        # What torch does with memory (its calls of memcpy, say) is left out: the order of its threads is not known.
        environment=options("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1"),
        tests=["tests/sanitizers/threads.py"],
    ),
}


def find_runtimes(kind: Kind, compiler: list[str]) -> str:
    """Return the sanitizer's libraries for LD_PRELOAD."""
    found = []
    for runtime in kind.runtimes:
        path = (output_of([*compiler, f"-print-file-name={runtime}"]) or "").strip()
        if not Path(path).is_absolute() or not Path(path).exists():
            print(f"sanitize.py: {compiler[0]} has no shared {runtime}. To mend it: install g++, and set CXX to it.")
            raise SystemExit(NO_RUNTIME)
        found.append(path)
    return " ".join(found)


def compiled(name: str, kind: Kind) -> Path:
    torch, compiler = Torch.find(), Compiler.find()
    ninja = NinjaFile(f"{name}-torch{torch.version}")
    cxxflags = ["-g1", "-w", "-include", "tests/sanitizers/fork_join.h", *kind.flags]
    without_cuda = "the CPU's library alone is compiled"
    libraries = add_libraries(ninja, torch, compiler, without_cuda, cxxflags=cxxflags, ldflags=kind.flags)
    if ninja.run(libraries, stdout=sys.stderr).returncode:
        fail("the compiler reported errors (above).", "correct them.", "the sanitizers' library cannot be built")
    return ROOT / libraries[0]


def copy_package(library: Path, to: Path) -> None:
    """Copy the package as it is, with that library in the place of its own, and what its tests read."""
    for folder in ("dcn_plugin", "tests", "scripts", "csrc"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("_C*.so"))
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / file, to)
    shutil.copy2(library, to / "dcn_plugin/_C.so")


def keep_addresses(kind: Kind) -> list[str]:
    """ThreadSanitizer's shadow memory needs addresses that newer kernels may give away."""
    setarch = ["setarch", "-R"]
    return setarch if kind is KINDS["thread"] and output_of([*setarch, "true"]) is not None else []


def main() -> int:
    name, *arguments = sys.argv[1:] or ["address"]
    if name not in KINDS:
        print(f"sanitize.py: the first argument is address or thread, not {name}.", file=sys.stderr)
        return 2
    kind = KINDS[name]
    os.environ["CXX"] = os.environ.get("CXX") or "g++"
    preload = find_runtimes(kind, shlex.split(os.environ["CXX"]))
    library = compiled(name, kind)
    with tempfile.TemporaryDirectory(prefix="checkout.", dir=library.parent) as copy:
        copy_package(library, Path(copy))
        print(f"== {library.parent.name}: the tests run against {library.relative_to(ROOT)}", flush=True)
        # A report is written past Python: captured otherwise, it would be lost with the process that ends there.
        pytest = [sys.executable, *"-m pytest -q -p no:cacheprovider -p no:xdist -x --capture=sys".split()]
        command = [*keep_addresses(kind), "env", f"LD_PRELOAD={preload}", *pytest, *(arguments or kind.tests)]
        environment = {**os.environ, **kind.environment, "PYTHONPATH": copy}
        status = subprocess.run(command, cwd=copy, env=environment).returncode
    return status if status >= 0 else 128 - status  # what a shell says of a process that a signal ended


if __name__ == "__main__":
    raise SystemExit(main())
