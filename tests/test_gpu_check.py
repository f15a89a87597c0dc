"""scripts/gpu_check.sh without a GPU: its stages, limits and files, with stand-ins for whatever it runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toolchain import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")

STAGES = ["build", "tests", "bench", "memcheck", "racecheck"]
# In place of the interpreter. What it is asked to run says what it does: the text of SAY_<name>, and the status of
# STATUS_<name>, after SLEEP_<name> seconds.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *gpu_capabilities.py*) PYTHONPATH=$FAKE_TORCH exec "$REAL_PYTHON" "$@" ;;
    *import\\ xdist*) exit 1 ;;
    *build_in_place.py*) name=build; cp "$FAKE_TORCH/built.json" dcn_plugin/_build_info.json ;;
    *collect_env*) name=environment ;;
    *-m\\ pytest*) name=${TOOL:-tests_$GPU_CHECK_KERNELS} ;;
    *run.py*) name=$(sed 's/.*--family \\([a-z0-9_]*\\).*/bench_\\1/' <<<"$*") ;;
esac
echo "$name: ${DCN_PLUGIN_CUDA_KERNELS:-}: ${TORCH_CUDA_ARCH_LIST:-}: $*" >>"$RAN"
say=SAY_$name status=STATUS_$name sleep=SLEEP_$name
[ -z "${!say:-}" ] || echo "${!say}"
if [ -n "${!sleep:-}" ]; then
    [ -z "${GPU_CHECK_RUNNING:-}" ] || printf 'tests/a.py::slow' >"$GPU_CHECK_RUNNING"
    exec sleep "${!sleep}"
fi
exit "${!status:-0}"
"""
SANITIZER = """#!/usr/bin/env bash
export TOOL=$2
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: {available})
    device_count = staticmethod(lambda: 1)
    get_device_capability = staticmethod(lambda index=0: (9, 0))
    get_device_name = staticmethod(lambda: "NVIDIA H200")
class version:
    cuda = "13.0"
__version__ = "2.11.0+cu130"
"""
COLLECT_ENV = "run = None\ndef get_nvidia_driver_version(run): return '580.82'\n"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A checkout, and a machine that has a GPU as far as the script can see."""

    def __init__(self, folder: Path, available: bool = True, sanitizer: bool = True):
        self.checkout, self.out, self.ran = folder / "checkout", folder / "out", folder / "ran"
        for name in ("gpu_check.sh", "gpu_capabilities.py"):
            executable(self.checkout / "scripts" / name, (ROOT / "scripts" / name).read_text())
        (self.checkout / "dcn_plugin").mkdir()
        executable(folder / "bin/python", PYTHON)
        executable(folder / "bin/nvcc", "#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
        if sanitizer:
            executable(folder / "bin/compute-sanitizer", SANITIZER)
        fake = folder / "fake"
        executable(fake / "torch/__init__.py", TORCH.format(available=available))
        executable(fake / "torch/utils/__init__.py", "")
        executable(fake / "torch/utils/collect_env.py", COLLECT_ENV)
        (fake / "built.json").write_text(json.dumps({"cuda": {"architectures": ["9.0"]}}))
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "PYTHON": str(folder / "bin/python"),
            "REAL_PYTHON": sys.executable,
            "FAKE_TORCH": str(fake),
            "RAN": str(self.ran),
        }

    def built(self) -> "Machine":
        (self.checkout / "dcn_plugin/_build_info.json").write_text('{"cuda": {"architectures": ["9.0"]}}')
        return self

    def start(self, *arguments, **environment) -> subprocess.Popen:
        command = ["bash", str(self.checkout / "scripts/gpu_check.sh"), *arguments]
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return subprocess.Popen(command, env={**self.environment, **environment}, **how)

    def check(self, *arguments, **environment) -> tuple[int, str]:
        process = self.start(*arguments, str(self.out), **environment)
        printed = process.communicate(timeout=120)[0]
        return process.returncode, printed

    def runs(self) -> list[str]:
        """What was run, one after the other."""
        return [line.split(":")[0] for line in self.ran.read_text().splitlines()] if self.ran.exists() else []

    def log(self) -> str:
        return (self.out / "gpu-check.log").read_text()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


OF_STAGE = {
    "build": ["build", "environment"],
    "tests": ["tests_portable", "tests_fused"],
    "bench": [f"bench_{f}" for f in ("deform_conv2d", "ms_deform_attn", "deform_aggregate2d", "models", "roi_pool")],
    "memcheck": ["memcheck"],
    "racecheck": ["racecheck"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_alone(stage, machine):
    status, printed = machine.built().check(stage)
    assert status == 0, printed
    assert machine.runs() == OF_STAGE[stage]
    assert machine.log() == printed and printed.count(" passed ") == 2 * len(OF_STAGE[stage])  # as it comes, at the end
    about = "NVIDIA H200, capability 9.0, driver 580.82, torch 2.11.0+cu130, CUDA 13.0; release 13.0"
    assert about in printed and f"UTC: {stage}\n" in printed


def test_all_stages_in_a_row(machine):
    """What is built first serves the rest; each is given its kernels and its architecture."""
    status, printed = machine.check()
    assert status == 0, printed
    assert machine.runs() == [name for stage in STAGES for name in OF_STAGE[stage]]
    lines = machine.ran.read_text()
    assert "\nbuild: : 9.0: " in "\n" + lines
    assert "tests_portable: portable:" in lines and "tests_fused: fused:" in lines
    assert [line for line in lines.splitlines() if line.startswith("racecheck")][0].count("bfloat16") == 1
    assert "summary of build tests bench memcheck racecheck: NVIDIA H200" in printed


def test_calls_add_to_one_log(machine):
    machine.check("build")
    first = machine.log()
    machine.check("tests")
    assert machine.log().startswith(first) and machine.log().count("#####") == 2


def test_results_go_to_the_benchmarks_by_default(machine):
    assert machine.start("build").wait(60) == 0
    assert (machine.checkout / "benchmarks/results/gpu-check.log").exists()


def test_what_is_not_built_is_said(machine):
    status, printed = machine.check("tests")
    assert status == 1 and machine.runs() == []
    assert "built for no GPU, not for 9.0; run `bash scripts/gpu_check.sh build`" in printed
    (machine.checkout / "dcn_plugin/_build_info.json").write_text('{"cuda": {"architectures": ["8.0", "9.0a+PTX"]}}')
    assert machine.check("tests")[0] == 0
    (machine.checkout / "dcn_plugin/_build_info.json").write_text('{"cuda": null}')
    assert machine.check("memcheck")[0] == 1


def test_a_machine_without_a_gpu_is_named(tmp_path):
    machine = Machine(tmp_path, available=False)
    status, printed = machine.check("build")
    assert status == 1 and machine.runs() == []
    assert "torch 2.11.0+cu130 finds no usable CUDA GPU on this machine" in printed


@pytest.mark.parametrize(("stage", "step"), [(stage, step) for stage, steps in OF_STAGE.items() for step in steps])
def test_a_failure_of_any_step_is_the_exit_status(stage, step, machine):
    status, printed = machine.built().check(stage, **{f"STATUS_{step}": "1", f"SAY_{step}": "the last line"})
    assert status == 1 and printed.count(" FAILED ") == 2
    assert "the last line" in printed.split("=== summary")[1]
    # What does not depend on it runs all the same.
    expected = OF_STAGE[stage][:1] if step == "build" else OF_STAGE[stage]
    assert machine.runs() == expected


def test_benchmarks_go_on_with_portable_kernels_where_the_device_broke(machine):
    machine.check("build")
    assert machine.check("bench", STATUS_bench_deform_conv2d="70")[0] == 1
    lines = [line for line in machine.ran.read_text().splitlines() if line.startswith("bench")]
    assert len(lines) == 6 and "--kernels portable" in lines[1] and "deform_conv2d" in lines[1]
    assert all("--device cuda" in line and f"--out {machine.out}" in line for line in lines)


@pytest.mark.parametrize("stage", ["memcheck", "racecheck"])
def test_tools_that_are_missing_or_do_not_fit_are_left_out(stage, tmp_path):
    without = Machine(tmp_path / "without", sanitizer=False).built()
    status, printed = without.check(stage)
    assert status == 3 and without.runs() == [] and "compute-sanitizer is not on PATH" in printed
    unfit = Machine(tmp_path / "unfit").built()
    said = {f"SAY_{stage}": "========= Error: Device not supported.", f"STATUS_{stage}": "1"}
    status, printed = unfit.check(stage, **said)
    assert status == 3 and " skipped " in printed and "Device not supported" in printed.split("=== summary")[1]


@pytest.mark.parametrize(
    ("stage", "step", "verdict"),
    [("tests", "tests_portable", "FAILED"), ("bench", "bench_models", "FAILED"), ("memcheck", "memcheck", "skipped")],
)
def test_a_step_is_stopped_at_its_limit(stage, step, verdict, machine):
    begin = time.monotonic()
    status, printed = machine.built().check(stage, GPU_CHECK_SECONDS="15", **{f"SLEEP_{step}": "60"})
    assert time.monotonic() - begin < 40
    last = printed.split("=== summary")[1]
    assert status == {"FAILED": 1, "skipped": 3}[verdict]
    assert f" {verdict} " in last and ("was stopped after" in last or "was not done" in last)
    if stage != "bench":
        assert "in tests/a.py::slow" in last


def test_a_sanitizer_that_had_found_something_has_failed(machine):
    found = dict(SAY_racecheck="========= Error: Race reported between Write access", SLEEP_racecheck="60")
    status, printed = machine.built().check("racecheck", GPU_CHECK_SECONDS="12", **found)
    assert status == 1 and "FAILED" in printed.split("=== summary")[1]


def test_an_interrupted_stage_keeps_what_it_found(machine):
    process = machine.built().start("tests", str(machine.out), SLEEP_tests_fused="60", SAY_tests_portable="12 passed")
    running = machine.out / "running-tests.txt"
    for _ in range(300):
        if running.exists() and running.read_text():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert "tests, portable kernels  passed" in machine.log() and "12 passed" in machine.log()
    assert running.read_text() == "tests/a.py::slow" and (machine.out / "failed-tests.txt").read_text() == ""
    # And it may be run again.
    assert machine.check("tests")[0] == 0


# -- what pytest is given ---------------------------------------------------------------------------------------------

TESTS = """
import os, time, pytest

def test_good(): pass
def test_bad(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_broken(broken): pass
@pytest.mark.parametrize("kernels", ["portable", "fused"])
@pytest.mark.parametrize("problem", ["c64", "roi"])
def test_kernels(problem, kernels): pass
def test_last():
    time.sleep(float(os.environ.get("LAST", 0)))
"""


def start_pytest(folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    (folder / "test_cuda.py").write_text(TESTS)
    path = os.pathsep.join(str(ROOT / name) for name in (".", "scripts", "tests"))
    files = {f"GPU_CHECK_{name.upper()}": str(folder / name) for name in ("failed", "running")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu_check_tests", *options]
    # It may be started by one of several processes itself, whose name it must not take for its own.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": path, **files, **environment}
    return subprocess.Popen([*command, str(folder)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_failed_tests_are_named_while_others_run(options, tmp_path):
    if options:
        pytest.importorskip("xdist")
    process = start_pytest(tmp_path, *options, LAST="60", DCN_PLUGIN_CUDA_KERNELS="fused")
    named, running = tmp_path / "failed", tmp_path / "running"
    for _ in range(600):
        done = named.exists() and len(named.read_text().splitlines()) == 2
        if done and any(line.endswith("::test_last") for line in running.read_text().splitlines()):
            break
        time.sleep(0.1)
    process.kill()  # no end of the session, which would tell
    process.communicate()
    failed = {line.split("::")[1] for line in named.read_text().splitlines()}
    assert failed == {"test_bad  # fused kernels", "test_broken  # fused kernels"}
    assert "test_last" in [line.split("::")[1] for line in running.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kernels", "chosen"),
    [
        ("", ["good", "bad", "broken", "kernels[c64-portable]", "kernels[c64-fused]", "kernels[roi-portable]",
              "kernels[roi-fused]", "last"]),
        ("portable", ["good", "bad", "broken", "kernels[c64-portable]", "kernels[roi-portable]", "last"]),
        ("fused", ["good", "bad", "broken", "kernels[c64-fused]", "last"]),
    ],
)  # fmt: skip
def test_regions_are_tested_once(kernels, chosen, tmp_path):
    printed = start_pytest(tmp_path, "--collect-only", "-q", GPU_CHECK_KERNELS=kernels).communicate()[0]
    names = [line.split("::test_")[1] for line in printed.splitlines() if "::test_" in line]
    assert sorted(names) == sorted(chosen)


def test_building_needs_no_setuptools(tmp_path):
    (tmp_path / "setuptools.py").write_text("raise ImportError('this machine has an old one')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, str(ROOT / "scripts/build_in_place.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "CXX is 'no-such-compiler', which does not run" in done.stderr
