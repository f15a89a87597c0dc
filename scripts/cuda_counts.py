"""Count what the CUDA kernels do, without a GPU, beside torchvision's of the same jobs; compare with the last count.

    python scripts/cuda_counts.py                     # compare with csrc/cuda_counts.json; 1 if a kernel got worse
    python scripts/cuda_counts.py --write             # write that, and benchmarks/results/cuda_counts.md
    python scripts/cuda_counts.py --jobs conv --ptx   # print some jobs, interpreted alone: nothing else is compiled

Two sources: the PTX of nvcc, which tests/ptx interprets on stated problems (what warps issue, which addresses they ask
for), and the machine code for 8.0 and 9.0 (instructions, registers, shared memory). benchmarks/results/cuda_counts.md
explains the columns. torchvision's kernels come from its installed library, if that has any for CUDA. Needs nvcc,
cuobjdump and c++filt as scripts/cuda_compile_check.py does, and what the tests need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuda_compile_check import Tools, compiled, printed, short
from cuda_sass import ARCHS, PROCESSORS, Built
from toolchain import ROOT, fail

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TABLE, PAGE = ROOT / "csrc/cuda_counts.json", ROOT / "benchmarks/results/cuda_counts.md"
UNABLE = "the CUDA kernels cannot be counted"
# A metric that has grown by more than this share, and by more than its step, is worse.
MARGIN = 0.05
STEPS = {"instructions": 0.5, "longest": 50, "conversions64": 0.05, "divisions32": 0.05, "divisions64": 0.05,
         "sectors": 0.02, "wavefronts": 0.02, "sass": 16, "registers": 2, "stack": 0, "shared": 0}  # fmt: skip
Row = dict[str, Any]
Side = dict[str, dict[str, Row]]  # "forward", "backward" -> kernel -> what was counted


def interpreted(launches: Any, units: int) -> Row:
    """What the interpreter has counted of a kernel: a lane's instructions for each unit, accesses for each request."""
    counts = launches.counts
    issued = dict(counts.issued)

    def each_unit(pattern: str) -> float:
        return round(sum(n for opcode, n in issued.items() if re.match(pattern, opcode)) * 32 / units, 2)

    def each_request(number: int, requests: int) -> float:
        return round(number / max(1, requests), 2)

    return {
        "instructions": each_unit(""),
        "longest": counts.longest,
        "conversions64": each_unit(r"cvt\.(\w+\.)*(f\d+\.[su]64|[su]64\.f\d+)$"),
        "divisions32": each_unit(r"(div|rem)\.[su](16|32)"),
        "divisions64": each_unit(r"(div|rem)\.[su]64"),
        "requests": counts.requests,
        "sectors": each_request(counts.sectors, counts.requests),
        "fewest_sectors": each_request(counts.fewest_sectors, counts.requests),
        "shared_requests": counts.shared_requests,
        "wavefronts": each_request(counts.wavefronts, counts.shared_requests),
        "fewest_wavefronts": each_request(counts.fewest_wavefronts, counts.shared_requests),
        "threads": launches.threads,
        "shared": launches.dynamic_shared,
    }


def with_machine_code(row: Row, kernel: str, built: Built) -> Row:
    for arch in ARCHS:
        code, takes = built.code[arch][kernel], built.takes[kernel][arch]
        # From 9.0 on, what is told includes the 1 KiB that every block takes.
        static = takes.shared - 1024 if arch == "9.0" and takes.shared else takes.shared
        shared = row["shared"] + static
        row |= {
            f"sass {arch}": code.instructions, f"sass_conversions64 {arch}": code.conversions64,
            f"sass_divisions {arch}": code.divisions, f"sass_reciprocals {arch}": code.reciprocals,
            f"sass_calls {arch}": code.calls, f"registers {arch}": takes.registers, f"stack {arch}": takes.stack,
            f"resident {arch}": PROCESSORS[arch].resident_threads(row["threads"], takes.registers, shared),
        }  # fmt: skip
    return row


def rows(found: dict[str, dict[str, Any]], units: int, built: Built | None) -> Side:
    side: Side = {}
    for direction, kernels in found.items():
        side[direction] = {}
        for name, launches in kernels.items():
            row = interpreted(launches, units)
            side[direction][short(name)] = with_machine_code(row, short(name), built) if built else row
    return side


def ours(chosen: str, tools: Tools, ptx_alone: bool) -> dict[str, dict[str, Any]]:
    from ptx import compile_ptx
    from ptx.jobs import JOBS, count

    jobs = {name: job for name, job in JOBS.items() if re.search(chosen, name)}
    built = None
    if not ptx_alone:
        if missing := set(ARCHS) - {arch.removesuffix("+PTX") for arch in tools.nvcc.architectures}:
            fail(f"nvcc compiles for no {' and '.join(sorted(missing))}.", "install another nvcc.", UNABLE)
        built = Built.of([ROOT / file for file in compiled(tools.torch, tools.compiler, tools.nvcc)], tools)
    sources = {job.operator: job.source for job in jobs.values()}
    texts = {
        operator: path.read_text() for operator, path in zip(sources, compile_ptx(list(sources.values())), strict=True)
    }
    return {
        name: {"what": job.what, "units": job.units, "ours": rows(count(job, texts[job.operator]), job.units, built)}
        for name, job in jobs.items()
    }


def torchvision_facts() -> tuple[dict[str, str], Path] | None:
    """Version, commit and library of an installed torchvision."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    library = next(iter(sorted(folder.glob("_C*.so"))), None)
    if library is None:
        return None
    stated = {
        "version": str(facts["__version__"]),
        "commit": str(facts["git_version"]),
        "file": f"torchvision/{library.name}",
    }
    return {**stated, "source": "torchvision/csrc/ops/cuda/ at that commit"}, library


def theirs(tools: Tools) -> tuple[dict[str, str], dict[str, Side]] | None:
    """torchvision's rows, if its library holds code for CUDA."""
    found = torchvision_facts()
    if found is None or ".ptx" not in printed([tools.cuobjdump, "-lptx", str(found[1])]):
        return None
    from ptx.jobs import JOBS
    from ptx.peers import count

    facts, library = found
    with tempfile.TemporaryDirectory() as folder:
        printed([tools.cuobjdump, "-xptx", "all", str(library)], cwd=folder)
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
    built = Built.of([library], tools)
    return facts, {job: rows(side, JOBS[job].units, built) for job, side in count(texts).items()}


def complaints(new: dict[str, Any], old: dict[str, Any]) -> Iterator[str]:
    """What has got worse than the committed table, or is not in it."""
    for job, entry in new.items():
        before = old.get(job)
        if before is None:
            yield f"{job}: the job has no rows"
            continue
        for direction, kernels in entry["ours"].items():
            for kernel, row in kernels.items():
                stated = before["ours"].get(direction, {}).get(kernel)
                if stated is None:
                    yield f"{job}, {direction}: {kernel} has no row"
                    continue
                for metric, value in row.items():
                    name, limit = metric.split()[0], stated.get(metric, 0)
                    if name in STEPS and value > limit * (1 + MARGIN) and value > limit + STEPS[name]:
                        yield f"{job}, {direction}: {kernel} has {value} {metric}, {limit} are stated"
                    elif name == "resident" and value < limit:
                        yield f"{job}, {direction}: {kernel} has {value} threads {metric}, {limit} are stated"
            for kernel in before["ours"].get(direction, {}).keys() - kernels.keys():
                yield f"{job}, {direction}: {kernel} has a row and is not launched"
    for job in old.keys() - new.keys():
        yield f"{job}: the job has rows and is not run"


def as_json(table: dict[str, Any]) -> str:
    """A line for each kernel, so that changes are read row by row."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\n\s+\"instructions\".*?\n\s+\}", lambda m: " ".join(m[0].split()), text, flags=re.S) + "\n"


def page(table: dict[str, Any]) -> Iterator[str]:
    yield HEAD.format(nvcc=table["nvcc"], **{f"tv_{k}": v for k, v in table["torchvision"].items()}).rstrip()
    for job, entry in table["jobs"].items():
        yield from ("", f"## {job}", "", f"{entry['what']}. {entry['units']:,} units.", "")
        yield from print_rows(entry)


def print_rows(entry: dict[str, Any]) -> Iterator[str]:
    yield (
        "| kernel | instructions | longest | 64-bit conv. | divisions | sectors | wavefronts | SASS | regs | shared "
        "| threads |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for whose in ("ours", "torchvision"):
        for direction, kernels in entry.get(whose, {}).items():
            for kernel, row in kernels.items():
                yield print_row(named(kernel, whose), row)
            total = sum(row["instructions"] for row in kernels.values())
            longest = sum(row["longest"] for row in kernels.values())
            touched = sum(row["sectors"] * row["requests"] for row in kernels.values())
            fewest = sum(row["fewest_sectors"] * row["requests"] for row in kernels.values())
            yield (
                f"| **{whose}, {direction}: all** | **{total:.2f}** | **{longest:,}** | | | {touched / 1000:.0f} k in "
                f"all, at least {fewest / 1000:.0f} k | | | | | |"
            )


def named(kernel: str, whose: str) -> str:
    """The body or block that a kernel of ours runs; torchvision's as it is."""
    body = re.fullmatch(r"run_(?:body|blocks)<(.*)>", kernel)
    return (body[1] if body else kernel) if whose == "ours" else f"torchvision: {kernel}"


def print_row(kernel: str, row: Row) -> str:
    def both(metric: str) -> str:
        values = [str(row[f"{metric} {arch}"]) for arch in ARCHS if f"{metric} {arch}" in row]
        return " / ".join(values if len(set(values)) > 1 else values[:1])

    wavefronts = f"{row['wavefronts']} ({row['fewest_wavefronts']})" if row["shared_requests"] else ""
    stack = f" + {both('stack')} B" if any(row.get(f"stack {arch}") for arch in ARCHS) else ""
    cells = [
        kernel, f"{row['instructions']:.2f}", f"{row['longest']:,}",
        f"{row['conversions64']:g}", f"{row['divisions32']:g} + {row['divisions64']:g}",
        f"{row['sectors']} ({row['fewest_sectors']})", wavefronts, both("sass"), both("registers") + stack,
        str(row["shared"] or ""), both("resident"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD = """\
# CUDA kernels, counted

Written by `python scripts/cuda_counts.py --write` with nvcc {nvcc}; as numbers in
[csrc/cuda_counts.json](../../csrc/cuda_counts.json). Nothing here was timed, and nothing of it has run on a GPU.
torchvision {tv_version} (commit {tv_commit}): the kernels within its published
library {tv_file}, from {tv_source}.

| column | is |
|---|---|
| instructions | PTX that warps issue, times 32 lanes, for each unit: idle lanes count, a 64-bit operation counts once |
| longest | PTX that the warp issues which issues most: no processor, however wide, makes a launch shorter than this |
| 64-bit conv. | of these, conversions between 64-bit integers and floats |
| divisions | of these, integer divisions and remainders: in 32 bits + in 64 bits, each many machine instructions |
| sectors | of 32 bytes, for each request of a warp to global memory (as few as could hold the bytes) |
| wavefronts | rounds over the banks of shared memory, for each request (without bank conflicts) |
| SASS | machine instructions of the whole kernel, for 8.0 / 9.0 |
| regs | registers of a thread, and bytes of stack if any |
| shared | bytes of shared memory a block asks for at launch |
| threads | that a multiprocessor holds at once, of 2048, for 8.0 / 9.0 |

Unless a job says otherwise a unit is one channel of one sample: one tap of one output pixel, one sampling point of a
bin or query; every kernel of a job is divided by the job's units. Addresses and branches are those of the stated
problem, interpreted from the PTX for compute_90 (torchvision's: for compute_120, the only PTX that it has). Not seen:
what ptxas reorders, caches, latencies, concurrent blocks, cuBLAS (the matrix products of the portable convolution),
launches. Conversions, divisions, reciprocals and calls as they stand in the machine code are in the JSON.
"""
ABOUT = (
    "What each CUDA kernel does on a stated problem, and what its machine code takes; "
    "benchmarks/results/cuda_counts.md explains the columns. Written by scripts/cuda_counts.py --write, which also "
    "compares (tests/test_cuda_counts.py)."
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what the CUDA kernels do, and compare with what is committed.")
    parser.add_argument("--write", action="store_true", help="write the table in place of comparing with it")
    parser.add_argument("--jobs", default="", metavar="PATTERN", help="only jobs whose names have this; prints them")
    parser.add_argument("--ptx", action="store_true", help="interpret alone: no machine code, nothing compared")
    chosen = parser.parse_args()
    if chosen.write and (chosen.jobs or chosen.ptx):
        parser.error("--write: expected to be alone")
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # what is committed is of stated architectures
    tools = Tools.find(UNABLE)
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"torchvision": {}, "jobs": {}}
    jobs = ours(chosen.jobs, tools, chosen.ptx)
    peers = {job: entry["torchvision"] for job, entry in committed["jobs"].items() if "torchvision" in entry}
    facts = committed["torchvision"]
    if chosen.write and (found := theirs(tools)):
        facts, peers = found
    for job, side in peers.items():
        if job in jobs:
            jobs[job]["torchvision"] = side
    if chosen.write:
        table = {"about": ABOUT, "nvcc": tools.nvcc.version, "torchvision": facts, "jobs": jobs}
        TABLE.write_text(as_json(table))
        PAGE.write_text("\n".join(page(table)) + "\n")
        return 0
    for job, entry in jobs.items():
        print("\n".join([f"\n{job}: {entry['what']}", *print_rows(entry)]), flush=True)
    if chosen.ptx:
        return 0
    stated = {job: entry for job, entry in committed["jobs"].items() if re.search(chosen.jobs, job)}
    found_worse = list(complaints(jobs, stated))
    for complaint in found_worse:
        print(f"{TABLE.name}: {complaint}", file=sys.stderr)
    return int(bool(found_worse))


if __name__ == "__main__":
    raise SystemExit(main())
