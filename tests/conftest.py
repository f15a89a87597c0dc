"""Devices and code paths that operator tests run over."""

import contextlib
import logging
import random
import re
import runpy
import sys
from pathlib import Path

import numpy
import pytest
import torch

import dcn_plugin  # noqa: F401  (registers operators, models and layers)

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# What may run at most on the CPU (csrc/runtime/kernels.h), for `cpu_kernels`.
PORTABLE, TUNED = "portable", "tuned"
BASELINE, V3, V4 = "tuned baseline", "tuned x86-64-v3", "tuned x86-64-v4"
PAIRS = "tuned bfloat16"  # products of pairs of bfloat16, by the processor's instruction where it has one


@contextlib.contextmanager
def cpu_kernels(most):
    """Let the CPU run these kernels at most."""
    before = torch.ops.dcn_plugin._choose_cpu_kernels(most)
    try:
        yield
    finally:
        torch.ops.dcn_plugin._choose_cpu_kernels(before)


def _devices() -> list:
    devices = [pytest.param(("cpu", TUNED), id="cpu"), pytest.param(("cpu", PORTABLE), id="cpu_portable")]
    if torch.cuda.is_available():
        devices.append(pytest.param(("cuda", TUNED), id="cuda", marks=[pytest.mark.cuda]))
    return devices


DEVICES = _devices()


def pytest_collection_modifyitems(config, items):
    """Side by side, the slow ones first: none is left to run alone at the end."""
    named_by_address = [item.nodeid for item in items if re.search(r"0x[0-9a-f]{6}", item.nodeid)]
    if named_by_address:  # side by side, each process would collect other tests and none would run
        raise pytest.UsageError(f"test names: expected the same in every process, got {named_by_address[0]}")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test draws the same numbers after whatever has run; before its fixtures, which draw as well."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device, and on the CPU both the tuned kernels and the portable bodies, whose arithmetic is CUDA's."""
    name, kernels = request.param
    with cpu_kernels(kernels):
        yield name


@pytest.fixture(autouse=True)
def float32_in_full(request):
    """On a GPU, float32 is compared with the CPU's: convolutions and products of torch's must not round to TF32."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    libraries = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    yield
    for library, allowed in zip(libraries, before, strict=True):
        library.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def root_logger():
    """A conversion that OpenVINO refuses leaves the root logger muted, and later tests would see no warning."""
    root = logging.getLogger()
    level, filters = root.level, list(root.filters)
    yield
    root.setLevel(level)
    root.filters[:] = filters


@pytest.fixture(params=[pytest.param(BASELINE, id="baseline"), pytest.param(V3, id="v3"), pytest.param(V4, id="v4")])
def vectors(request):
    """The tuned path with the vectors of older processors, too; on one that lacks the newer, the same again."""
    with cpu_kernels(request.param):
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Small problems: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_words():
    """Without Lightning's remarks on hardware and loaders."""
    from dcn_plugin.finetune.run import quiet  # which needs more than the operators do

    with quiet():
        yield


@pytest.fixture
def script(monkeypatch, capsys):
    def call(name, *arguments):
        """Run a script in this process; return its exit status, or what it says in place of one, and what it printed.

        A process of its own takes ten seconds to import everything.
        """
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def forks():
    """Interpreters for programs of others, which import much and must not see what an earlier test did."""
    from integrations.forked import Forks

    with Forks() as forks:
        yield forks


@pytest.fixture
def imports_everything():
    """For a test that imports every module of the package: one of them installs the stand-in as it is imported."""
    from dcn_plugin.integrations import mmcv

    yield
    mmcv.uninstall()
