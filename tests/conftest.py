"""Devices and code paths that operator tests run over."""

import pytest
import torch

import dcn_plugin  # noqa: F401  (registers operators, models and layers)


def _devices() -> list:
    devices = [pytest.param(("cpu", False), id="cpu"), pytest.param(("cpu", True), id="cpu_portable")]
    if torch.cuda.is_available():
        devices.append(pytest.param(("cuda", False), id="cuda", marks=[pytest.mark.cuda]))
    return devices


@pytest.fixture(params=_devices())
def device(request):
    """Each device, and on the CPU both the tuned kernels and the portable bodies, whose arithmetic is CUDA's."""
    name, portable = request.param
    before = torch.ops.dcn_plugin._set_portable(portable)
    yield name
    torch.ops.dcn_plugin._set_portable(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
