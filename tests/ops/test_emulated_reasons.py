"""Why a call is not served by the fused CUDA kernels: each reason, from sizes alone, and as `kernels_used` tells it."""

import re

import emulation
import pytest
import torch
from test_emulated_aggregation import Problem as Aggregation
from test_emulated_aggregation import of as aggregation
from test_emulated_attention import Problem as Attention
from test_emulated_cuda import FEW, SCHEDULES
from test_emulated_cuda import Problem as Convolution
from test_emulated_cuda import fused as fused  # every test here runs with it

from dcn_plugin.ops._kernels import latest

HALF = torch.bfloat16


def tensor(*shape, dtype=HALF):
    """Of any size, in the memory of one value: nothing here is run."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def of_conv(shape, weight, offset_groups=1, stride=(1, 1), backward=False, dtype=HALF):
    planes = offset_groups * weight[2] * weight[3]
    size = [(shape[i + 2] - weight[i + 2]) // stride[i] + 1 for i in range(2)]
    offset = tensor(shape[0], 2 * planes, *size, dtype=dtype)
    find = emulation.load().why_portable_conv
    return find(tensor(*shape, dtype=dtype), offset, tensor(*weight, dtype=dtype), stride, backward)


def of_attention(channels, dtype=HALF, heads=1, queries=1, level=(2, 2)):
    value, locations = (1, level[0] * level[1], heads, channels), (1, queries, heads, 1, 2)
    find = emulation.load().why_portable_attention
    return find(tensor(*value, dtype=dtype), tensor(*locations, dtype=dtype), level)


BOTH = {
    "input: expected Float, Half or BFloat16": dict(shape=(1, 8, 3, 3), weight=(8, 8, 3, 3), dtype=torch.float64),
    "offset: expected offset groups of a multiple of 4 channels in Float": dict(
        shape=(1, 6, 3, 3), weight=(8, 6, 3, 3), dtype=torch.float32
    ),
    "offset: expected offset groups of a multiple of 8 channels in Half or BFloat16": dict(
        shape=(1, 12, 3, 3), weight=(8, 12, 3, 3)
    ),
    "input: expected fewer than 2^29 rows and columns, with padding, and 2^30 outputs": dict(
        shape=(1, 8, 2**29, 1), weight=(8, 8, 1, 1), stride=(2**29, 1)
    ),
    "input: expected at most 2^24 channels": dict(shape=(1, 2**24 + 8, 1, 1), weight=(8, 2**24 + 8, 1, 1)),
    "weight: expected at most 2^24 taps": dict(shape=(1, 8, 4097, 4097), weight=(8, 8, 4097, 4097)),
    "offset: expected fewer than 2^31 channels": dict(
        shape=(1, 520, 4096, 4096), weight=(8, 520, 4096, 4096), offset_groups=65
    ),
    "input: expected Half or BFloat16 with one weight a channel": dict(
        shape=(1, 8, 3, 3), weight=(8, 1, 3, 3), dtype=torch.float32
    ),
    "weight: expected groups of a multiple of 4 channels in Float": dict(
        shape=(1, 16, 3, 3), weight=(8, 2, 1, 1), dtype=torch.float32
    ),
    "weight: expected groups of a multiple of 8 channels, or one channel and output": dict(
        shape=(1, 16, 3, 3), weight=(8, 4, 1, 1)
    ),
    "weight: expected at most 2^24 output channels": dict(shape=(1, 8, 1, 1), weight=(2**24 + 8, 8, 1, 1)),
}
FORWARD = {
    "input: expected images": dict(shape=(0, 8, 3, 3), weight=(8, 8, 3, 3)),
    "offset: expected at most 9 offset groups for a group": dict(
        shape=(1, 80, 3, 3), weight=(8, 80, 1, 1), offset_groups=10
    ),
    "weight: expected fewer than 2^25 values of an output": dict(shape=(1, 2**22, 3, 3), weight=(8, 2**22, 3, 3)),
    "input: expected tiles that read from fewer than 2^27 pixels": dict(
        shape=(1, 8, 2**14, 2**14), weight=(8, 8, 1, 1), stride=(64, 64)
    ),
    "input: expected Half or BFloat16, or Float where torch lets convolutions use TF32": dict(
        shape=(1, 8, 3, 3), weight=(8, 8, 3, 3), dtype=torch.float32
    ),
}
BACKWARD = {
    "offset: expected fewer than 2^31 samples of an image": dict(shape=(1, 8, 6700, 6700), weight=(8, 8, 7, 7)),
    "input: expected columns of an image of at most 2 GiB": dict(shape=(1, 1024, 400, 400), weight=(8, 1024, 3, 3)),
    "offset: expected at most 2^27 samples of an image": dict(shape=(1, 8, 5000, 5000), weight=(8, 1, 3, 3)),
}
ATTENTION = {
    "value: expected Float, Half or BFloat16": dict(channels=8, dtype=torch.float64),
    "value: expected a multiple of 4 channels of a head or group in Float": dict(channels=6, dtype=torch.float32),
    "value: expected a multiple of 8 channels of a head or group in Half or BFloat16": dict(channels=12),
    "value: expected a result that is not empty": dict(channels=8, queries=0),
    "value: expected at most 2^30 pixels": dict(channels=8, level=(2**15 + 1, 2**15)),
    "value: expected at most 2^28 channels of all heads or groups": dict(channels=2**25, heads=9),
}


@pytest.mark.parametrize("reason", BOTH)
def test_each_reason_of_a_convolution(reason):
    for backward in (False, True):
        assert of_conv(**BOTH[reason], backward=backward) == reason


@pytest.mark.parametrize("reason", FORWARD)
def test_each_reason_of_its_forward_alone(reason, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", "TF32" not in reason)
    assert of_conv(**FORWARD[reason]) == reason
    assert of_conv(**FORWARD[reason], backward=True) == ""


@pytest.mark.parametrize("reason", BACKWARD)
def test_each_reason_of_its_backward_alone(reason):
    assert of_conv(**BACKWARD[reason], backward=True) == reason
    assert of_conv(**BACKWARD[reason]) == ""


@pytest.mark.parametrize("reason", ATTENTION)
def test_each_reason_of_attention(reason):
    assert of_attention(**ATTENTION[reason]) == reason


def test_no_reason_is_without_a_test():
    """Every text of the plans stands above, or in the test of aggregation."""
    taps = (
        "stride: expected taps, without offsets, within 2^30 pixels",
        "kernel_size: expected at most 2^30 taps",
    )
    for path, told in {
        "ops/deform_conv2d/cuda/plan.h": {**BOTH, **FORWARD, **BACKWARD},
        "runtime/gpu_attention.h": ATTENTION,
        "ops/deform_aggregate2d/cuda/paths.h": taps,
    }.items():
        plan = (emulation.ROOT / "csrc" / path).read_text()
        for reason in told:
            assert f'"{reason}"' in plan
        assert len(set(re.findall(r'"(\w+: expected [^"]*)"', plan))) == len(told), path


PROBLEMS = {
    "deform_conv2d": lambda: Convolution((1, 16, 6, 6), 16),
    "ms_deform_attn": Attention,
    "deform_aggregate2d": lambda: Aggregation(aggregation()),
}


@pytest.mark.parametrize("operator", PROBLEMS)
def test_reasons_are_told(operator, monkeypatch):
    library = emulation.load()
    given = PROBLEMS[operator]()

    def told() -> dict[str, str]:
        given.check()  # right, whatever served it
        kernels = latest(library.kernels_used(), reasons=True)
        return {name: kernels[name] for name in (operator, f"{operator}_backward")}

    assert all(path.startswith("fused") for path in told().values())
    library.set_schedule(*SCHEDULES["up"], FEW, True, 1 << 10 if operator != "deform_conv2d" else 16 << 10)
    none = "portable (the GPU: expected shared memory for a block, and fewer than 2^31 blocks)"
    # The convolution's backward needs little.
    assert told() == {operator: none, f"{operator}_backward": "fused" if operator == "deform_conv2d" else none}
    library.set_old_processor(True)
    assert set(told().values()) == {"portable (the GPU: expected compute capability 8.0 or newer)"}
    library.set_old_processor(False)
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "portable")
    assert set(told().values()) == {"portable (DCN_PLUGIN_CUDA_KERNELS: expected 'fused')"}


def test_the_reason_of_a_call_is_told():
    Convolution((1, 20, 6, 6), 16).check()
    told = latest(emulation.load().kernels_used(), reasons=True)
    expected = "portable (offset: expected offset groups of a multiple of 8 channels in Half or BFloat16)"
    assert told["deform_conv2d"] == told["deform_conv2d_backward"] == expected
