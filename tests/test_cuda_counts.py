"""What the CUDA kernels do on stated problems is counted and committed, and no kernel does more than that says."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_counts import PAGE, TABLE, as_json, complaints, page
from cuda_sass import PROCESSORS
from ptx.jobs import JOBS
from toolchain import ROOT, Compiler, Nvcc, Torch

JOB = "conv float32"


@pytest.mark.slow
@pytest.mark.xdist_group("cuda_build")  # one process compiles for every architecture, once
def test_no_kernel_does_more_than_is_stated():
    nvcc = Nvcc.find(Torch.find(), Compiler.find())
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    command = [sys.executable, "scripts/cuda_counts.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "cuobjdump cannot be found" in done.stderr:
        pytest.skip("cuobjdump is neither on PATH nor beside nvcc or torch")
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(job in done.stdout for job in JOBS)


@pytest.fixture
def committed():
    return json.loads(TABLE.read_text())


def a_kernel(committed):
    return next(name for name in committed["jobs"][JOB]["ours"]["forward"] if "FillColumns" in name)


def changed(committed, direction, kernel, **metrics):
    jobs = copy.deepcopy(committed["jobs"])
    jobs[JOB]["ours"][direction][kernel] |= metrics
    return jobs


def test_what_got_worse_is_named(committed):
    stated, kernel = committed["jobs"], a_kernel(committed)
    row = stated[JOB]["ours"]["forward"][kernel]
    assert not list(complaints(stated, stated))
    more = row["instructions"] * 1.06 + 1
    assert list(complaints(changed(committed, "forward", kernel, instructions=more), stated)) == [
        f"{JOB}, forward: {kernel} has {more} instructions, {row['instructions']} are stated"
    ]
    # A little more is let pass, as is less.
    assert not list(
        complaints(changed(committed, "forward", kernel, instructions=row["instructions"] * 1.03, sectors=0), stated)
    )
    spilled = changed(committed, "forward", kernel)
    spilled[JOB]["ours"]["forward"][kernel] |= {"stack 9.0": 8, "resident 8.0": 256}
    assert len(list(complaints(spilled, stated))) == 2


def test_a_kernel_without_a_row_is_named(committed):
    stated, kernel = committed["jobs"], a_kernel(committed)
    new = copy.deepcopy(stated)
    new[JOB]["ours"]["forward"]["run_body<Newer>"] = new[JOB]["ours"]["forward"].pop(kernel)
    assert list(complaints(new, stated)) == [
        f"{JOB}, forward: run_body<Newer> has no row",
        f"{JOB}, forward: {kernel} has a row and is not launched",
    ]
    del new[JOB]
    assert list(complaints(new, stated)) == [f"{JOB}: the job has rows and is not run"]
    assert list(complaints(stated, new)) == [f"{JOB}: the job has no rows"]


def test_the_page_and_the_numbers_are_one_table(committed):
    assert PAGE.read_text() == "\n".join(page(committed)) + "\n"
    assert TABLE.read_text() == as_json(committed)
    assert list(committed["jobs"]) == list(JOBS)
    beside = [job for job, entry in committed["jobs"].items() if "torchvision" in entry]
    assert beside == ["conv float32", "roi_align float32", "ps_roi_pool float32"]
    assert {"version", "commit", "file", "source"} == set(committed["torchvision"])


@pytest.mark.parametrize("job", ["conv float32 channels_last", "attention float32 in order"])
def test_samples_at_one_place_cost_at_most_three_times_as_much(committed, job):
    """In all that warps issue, and in what the longest issue: processors of any width take a time between the two."""
    spread, collapsed = (committed["jobs"][name]["ours"]["backward"].values() for name in (job, f"{job}, one place"))
    for metric in ("instructions", "longest"):
        assert sum(row[metric] for row in collapsed) <= 3 * sum(row[metric] for row in spread)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "resident"),
    [
        # As NVIDIA's occupancy tables have them.
        ("8.0", 256, 32, 0, 2048),
        ("8.0", 256, 64, 0, 1024),
        ("8.0", 256, 65, 0, 768),
        ("8.0", 256, 128, 0, 512),
        ("9.0", 256, 255, 0, 256),
        ("9.0", 32, 16, 0, 1024),
        ("8.0", 256, 32, 99 << 10, 256),
        ("9.0", 256, 32, 99 << 10, 512),
    ],
)
def test_threads_of_a_multiprocessor(arch, threads, registers, shared, resident):
    assert PROCESSORS[arch].resident_threads(threads, registers, shared) == resident


def test_every_source_has_a_job():
    assert {job.source for job in JOBS.values()} == {
        str(path.relative_to(ROOT)) for path in Path(ROOT, "csrc/ops").glob("*/*.cu")
    }
