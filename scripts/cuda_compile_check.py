"""Compile the CUDA operators for every architecture of the default list, and hold what each kernel takes to a budget.

    python scripts/cuda_compile_check.py [BUDGET.json]

It prints, as a Markdown table, what each kernel takes there (registers of a thread; the most stack and shared memory),
and compares with csrc/cuda_budget.json or the file named. Needs nvcc and cuobjdump (of the toolkit, or of the triton
package beside torch), torch, setuptools and ninja, and no GPU. What setup.py has compiled for the same architectures is
used as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolchain import ROOT, Compiler, NinjaFile, Nvcc, Torch, add_libraries, build_name, fail

UNABLE = "the CUDA kernels cannot be checked"


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int


Kernels = dict[str, dict[str, Usage]]  # kernel -> architecture -> what it takes


def tool(names: list[str], folders: list[str], remedy: str) -> str:
    for path in [None, *folders]:
        for name in names:
            if found := shutil.which(name, path=path):
                return found
    fail(f"{' and '.join(names)} cannot be found.", remedy, UNABLE)


def printed(command: list[str], **how: Any) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **how).stdout


def compiled(torch: Torch, compiler: Compiler, nvcc: Nvcc) -> list[str]:
    """Compile; return the objects, which hold the code for all architectures."""
    ninja = NinjaFile(build_name(torch))
    if " ".join(nvcc.flags) not in ninja.written():
        ninja = NinjaFile(f"check-cuda-{build_name(torch)}")
    add_libraries(ninja, torch, compiler, nvcc)
    objects = ninja.outputs["nvcc"]
    if ninja.run(objects, stdout=sys.stderr).returncode:
        fail("the compiler reported errors (above).", "correct them.", UNABLE)
    return objects


def used(objects: list[str], cuobjdump: str, demangle: str) -> Kernels:
    found: Kernels = {}
    for file in objects:
        dump = printed([cuobjdump, "--dump-resource-usage", str(ROOT / file)])
        arch = function = ""
        for line in printed([demangle], input=dump).splitlines():
            if match := re.match(r"arch = sm_(\d+)(\d\w?)$", line):
                arch = f"{match[1]}.{match[2]}"
            elif match := re.match(r" Function (.+):$", line):
                function = short(match[1])
            elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) ", line):
                found.setdefault(function, {})[arch] = Usage(*map(int, match.groups()))
    return found


def short(name: str) -> str:
    """A kernel's name without its arguments, which repeat the template's, and without namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |(?<=>) (?=>)", "", name)
    return name.partition("(")[0]


def table(kernels: Kernels, archs: list[str]) -> Iterator[str]:
    yield f"| kernel | {' | '.join(archs)} | stack | shared |"
    yield "|---" * (len(archs) + 3) + "|"
    for name, by_arch in sorted(kernels.items()):
        registers = " | ".join(str(by_arch[arch].registers) if arch in by_arch else "-" for arch in archs)
        stack, shared = max(of.stack for of in by_arch.values()), max(of.shared for of in by_arch.values())
        yield f"| {name} | {registers} | {stack} | {shared} |"


def complaints(kernels: Kernels, archs: list[str], budgets: list[dict[str, Any]]) -> Iterator[str]:
    unused = {entry["kernel"] for entry in budgets if entry["kernel"]}
    for name, by_arch in sorted(kernels.items()):
        entry = next((entry for entry in budgets if re.search(entry["kernel"], name)), None)
        if entry is None:
            yield f"{name} has no entry"
            continue
        unused.discard(entry["kernel"])
        if missing := [arch for arch in archs if arch not in by_arch]:
            yield f"{name} is not compiled for {', '.join(missing)}"
        for arch, takes in by_arch.items():
            for what in ("registers", "stack"):
                if getattr(takes, what) > entry[what]:
                    yield f"{name} takes {getattr(takes, what)} ({what}) on {arch}, over its budget of {entry[what]}"
    for pattern in sorted(unused):
        yield f"the entry {pattern!r} is for no kernel"


class Tools(NamedTuple):
    torch: Torch
    compiler: Compiler
    nvcc: Nvcc
    cuobjdump: str
    demangle: str

    @classmethod
    def find(cls, unable: str = UNABLE) -> Tools:
        torch, compiler = Torch.find(), Compiler.find()
        nvcc = Nvcc.find(torch, compiler)
        if isinstance(nvcc, str):
            fail(nvcc, "correct that.", unable)
        triton = importlib.util.find_spec("triton")
        places = (triton.submodule_search_locations if triton else None) or []
        beside = [str(Path(place, "backends/nvidia/bin")) for place in places]
        home = str(Path(nvcc.path).resolve().parent)
        cuobjdump = tool(["cuobjdump"], [home, *beside], "install it with the CUDA toolkit, or install triton.")
        return cls(torch, compiler, nvcc, cuobjdump, tool(["c++filt", "cu++filt"], [home], "install binutils."))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA operators and compare what each kernel takes.")
    parser.add_argument("budget", nargs="?", type=Path, default=ROOT / "csrc/cuda_budget.json")
    budget = parser.parse_args().budget
    budgets = json.loads(budget.read_text())["budgets"]
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    tools = Tools.find()
    kernels = used(compiled(tools.torch, tools.compiler, tools.nvcc), tools.cuobjdump, tools.demangle)
    archs = [arch.removesuffix("+PTX") for arch in tools.nvcc.architectures]
    print("\n".join(table(kernels, archs)), flush=True)
    found = list(complaints(kernels, archs, budgets))
    for complaint in found:
        print(f"{budget.name}: {complaint}", file=sys.stderr)
    return int(bool(found) or not kernels)


if __name__ == "__main__":
    raise SystemExit(main())
