"""Devices and code paths that operator tests run over."""

import contextlib

import pytest
import torch

import dcn_plugin  # noqa: F401  (registers operators, models and layers)

# What may run at most on the CPU (csrc/runtime/kernels.h), for `cpu_kernels`.
PORTABLE, TUNED = "portable", "tuned"
BASELINE, V3 = "tuned baseline", "tuned x86-64-v3"


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


@pytest.fixture(params=_devices())
def device(request):
    """Each device, and on the CPU both the tuned kernels and the portable bodies, whose arithmetic is CUDA's."""
    name, kernels = request.param
    with cpu_kernels(kernels):
        yield name


@pytest.fixture(params=[pytest.param(BASELINE, id="baseline"), pytest.param(V3, id="v3"), pytest.param(TUNED, id="v4")])
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
