#!/usr/bin/env bash
# Compiles the CUDA operators for every architecture of setup.py's default list, prints what each kernel takes there
# (registers of a thread; the most stack and shared memory) as a Markdown table, and compares with csrc/cuda_budget.json,
# or with the file named as the argument. Needs nvcc and cuobjdump (of the toolkit, or of the triton package beside
# torch), and no GPU. What setup.py has compiled for the same architectures is used as it is.
# PYTHON chooses the interpreter, one with torch, setuptools and ninja.
set -euo pipefail
budget=$(realpath "${1:-$(dirname "${BASH_SOURCE[0]}")/../csrc/cuda_budget.json}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset TORCH_CUDA_ARCH_LIST
exec "${PYTHON:-python3}" - "$budget" <<'END_OF_PYTHON'
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

setup = runpy.run_path("setup.py")
ROOT, fail = setup["ROOT"], setup["fail"]


def tool(names, folders, remedy):
    for path in [None, *folders]:
        for name in names:
            if found := shutil.which(name, path=path):
                return found
    fail(f"{' and '.join(names)} cannot be found.", remedy)


def printed(command, **how):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **how).stdout


def compiled(torch, compiler, nvcc):
    """Compile; return the objects, which hold the code for all architectures."""
    folder = setup["build_folder"](torch)
    script = folder / "build.ninja"
    if not script.exists() or " ".join(nvcc.flags) not in script.read_text():
        folder = folder.with_name(f"check-cuda-{folder.name}")
        folder.mkdir(parents=True, exist_ok=True)
    jobs = setup["compile_jobs"]()
    setup["write_ninja"](folder, torch, compiler, nvcc, jobs)
    ninja = [setup["find_ninja"](), "-f", str((folder / "build.ninja").relative_to(ROOT))]
    objects = printed([*ninja, "-t", "targets", "rule", "nvcc"]).split()
    if subprocess.run([*ninja, "-j", str(jobs), *objects], stdout=sys.stderr).returncode:
        fail("the compiler reported errors (above).", "correct them.")
    return objects


def used(objects, cuobjdump, demangle):
    """Kernel -> architecture -> registers, stack, shared memory."""
    found = {}
    for file in objects:
        dump = printed([cuobjdump, "--dump-resource-usage", file])
        arch = function = None
        for line in printed([demangle], input=dump).splitlines():
            if match := re.match(r"arch = sm_(\d+)(\d\w?)$", line):
                arch = f"{match[1]}.{match[2]}"
            elif match := re.match(r" Function (.+):$", line):
                function = short(match[1])
            elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) ", line):
                found.setdefault(function, {})[arch] = tuple(map(int, match.groups()))
    return found


def short(name):
    """A kernel's name without its arguments, which repeat the template's, and without namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |(?<=>) (?=>)", "", name)
    return name.partition("(")[0]


def table(kernels, archs):
    yield f"| kernel | {' | '.join(archs)} | stack | shared |"
    yield "|---" * (len(archs) + 3) + "|"
    for name, by_arch in sorted(kernels.items()):
        registers = " | ".join(str(by_arch[arch][0]) if arch in by_arch else "-" for arch in archs)
        stack, shared = (max(of[i] for of in by_arch.values()) for i in (1, 2))
        yield f"| {name} | {registers} | {stack} | {shared} |"


def complaints(kernels, archs, budgets):
    unused = {entry["kernel"] for entry in budgets if entry["kernel"]}
    for name, by_arch in sorted(kernels.items()):
        entry = next((entry for entry in budgets if re.search(entry["kernel"], name)), None)
        if entry is None:
            yield f"{name} has no entry"
            continue
        unused.discard(entry["kernel"])
        if missing := [arch for arch in archs if arch not in by_arch]:
            yield f"{name} is not compiled for {', '.join(missing)}"
        for arch, (registers, stack, _) in by_arch.items():
            for what, taken in (("registers", registers), ("stack", stack)):
                if taken > entry[what]:
                    yield f"{name} takes {taken} ({what}) on {arch}, over its budget of {entry[what]}"
    for pattern in sorted(unused):
        yield f"the entry {pattern!r} is for no kernel"


torch, compiler = setup["requirements"]()
nvcc = setup["Nvcc"].find(torch, compiler)
if isinstance(nvcc, str):
    fail(nvcc, "correct that.")
triton = importlib.util.find_spec("triton")
beside = [str(Path(place, "backends/nvidia/bin")) for place in (triton.submodule_search_locations if triton else [])]
home = str(Path(nvcc.path).resolve().parent)
cuobjdump = tool(["cuobjdump"], [home, *beside], "install it with the CUDA toolkit, or install triton.")
demangle = tool(["c++filt", "cu++filt"], [home], "install binutils.")
kernels = used(compiled(torch, compiler, nvcc), cuobjdump, demangle)
archs = [arch.removesuffix("+PTX") for arch in nvcc.architectures]
budget = Path(sys.argv[1])
print("\n".join(table(kernels, archs)), flush=True)
found = list(complaints(kernels, archs, json.loads(budget.read_text())["budgets"]))
for complaint in found:
    print(f"{budget.name}: {complaint}", file=sys.stderr)
raise SystemExit(bool(found) or not kernels)
END_OF_PYTHON
