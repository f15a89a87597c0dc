"""No call leaves memory behind: 5,000 of each operator and layer, forward and backward, and threads that end."""

import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, deform_conv2d_arguments, run
from run_python import run_python
from torch import nn

from dcn_plugin.layers import DCNv2, DeformPSRoIPoolPack, ModulatedDeformRoIPoolPack
from dcn_plugin.ops import deform_conv2d

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells in /proc/self")
CALLS = 5_000
# 100 bytes a call; measured: a few pages that torch or Python take once.
BYTES = 500 << 10
# Python's objects beside them; one kept by each call would be 5,000.
OBJECTS = 500


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], object]) -> tuple[int, int]:
    """By how many bytes the process, by how many blocks of memory Python's objects grow over many calls."""
    # What the first calls keep, they keep for all.
    for _ in range(CALLS // 10):
        call()
    gc.collect()
    before = resident(), sys.getallocatedblocks()
    for _ in range(CALLS):
        call()
    gc.collect()
    return resident() - before[0], sys.getallocatedblocks() - before[1]


def in_fresh_process(body: str) -> dict[str, tuple[int, int]]:
    """What `{name: a call}`, an expression, grows by in a process of its own."""
    code = f"import json, torch, {__name__} as t; torch.set_num_threads(1); "
    code += f"print(json.dumps({{k: t.growth(c) for k, c in {body}.items()}}))"
    return json.loads(run_python(code, path=Path(__file__).parent))


def operator_calls() -> dict[str, Callable[[], object]]:
    def call(case):
        arguments = case.make(case.full, torch.float32)
        return lambda: run(case.function, arguments)

    return {case.name: call(case) for case in CASES}


def layer_calls() -> dict[str, Callable[[], object]]:
    rois = torch.tensor([[0, 1.0, 1.0, 4.0, 3.0], [0, 0.0, 1.0, 3.0, 4.0]])
    layers: dict[nn.Module, tuple] = {
        DCNv2(2, 2, 3): (),
        ModulatedDeformRoIPoolPack((1, 2), 2, 4, sampling_ratio=1): (rois,),
        DeformPSRoIPoolPack(2, 1, (1, 2), deform_fc_channels=4, modulated=True): (rois,),
    }
    image = torch.randn(1, 2, 5, 5)

    def call(layer, more):
        # Gradients of the calls before are let go, as optimizers do.
        return lambda: (layer.zero_grad(), layer(image, *more).sum().backward())

    return {type(layer).__name__: call(layer, more) for layer, more in layers.items()}


def leaking_calls() -> dict[str, Callable[[], object]]:
    """What the checks below have to notice."""
    kept: list = []
    allocate = ctypes.CDLL(None).malloc

    def keep_a_tensor():
        kept.append(torch.zeros(16))

    def keep_an_object():
        kept.append(object())

    def lose_memory():
        # Written to, for untouched memory is not resident.
        ctypes.memset(allocate(240), 1, 240)

    allocate.restype = ctypes.c_void_p
    ctypes.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    return {f.__name__: f for f in (keep_a_tensor, keep_an_object, lose_memory)}


@pytest.mark.parametrize("calls", [operator_calls, layer_calls], ids=["operators", "layers"])
def test_memory_does_not_grow_from_call_to_call(calls):
    found = in_fresh_process(f"t.{calls.__name__}()")
    assert found.keys() == calls().keys()
    for name, (more_bytes, more_objects) in found.items():
        assert more_bytes < BYTES and more_objects < OBJECTS, f"{name}: {more_bytes} bytes, {more_objects} objects more"


def test_a_call_that_leaves_memory_behind_is_noticed():
    found = in_fresh_process("t.leaking_calls()")
    assert found["keep_a_tensor"][0] > BYTES and found["keep_a_tensor"][1] > OBJECTS
    assert found["keep_an_object"][1] > OBJECTS
    assert found["lose_memory"][0] > BYTES and found["lose_memory"][1] < OBJECTS


def test_threads_that_end_leave_no_memory_behind():
    run_python(f"import {__name__} as t; t.call_on_many_threads()", path=Path(__file__).parent)


def call_on_many_threads() -> None:
    torch.set_num_threads(1)
    arguments = deform_conv2d_arguments((1, 64, 40, 40), out=64)()
    for calls in (4, 40):
        before = resident()
        for _ in range(calls):
            thread = threading.Thread(target=run, args=(deform_conv2d, arguments))
            thread.start()
            thread.join()
    assert resident() - before < 8 << 20, f"{resident() - before} bytes more"
