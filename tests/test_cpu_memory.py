"""The convolution's memory on the CPU: what it takes beside its arguments and results does not grow with the images."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import convert, deform_conv2d_arguments, run
from run_python import run_python
from torch import Tensor

from dcn_plugin.ops import deform_conv2d

MB = 1 << 20
CHANNELS, TAPS, THREADS = 64, 9, 2
SHAPES = [(1, CHANNELS, 200, 200), (1, CHANNELS, 400, 400), (4, CHANNELS, 200, 200)]
# Of offsets, in pixels; if they are far, whole images are copied. Apart: by a stride that leaves most of a map out.
SAMPLES = {"near": dict(spread=1.0), "far": dict(spread=30.0), "apart": dict(spread=1.0, stride=50)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WAYS = list(itertools.product([False, True], LAYOUTS, SAMPLES))


def peak_can_be_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not peak_can_be_reset(), reason="needs Linux's /proc/self/clear_refs")


def status_bytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def print_extra_bytes(backward: bool, layout: str, samples: str) -> None:
    """Print, for each shape, by how many bytes the peak of a call lies above its arguments and results."""
    torch.set_num_threads(THREADS)
    extra, before = [], 0
    # The first shape loads code and tables, which are not scratch; scratch kept from call to call counts for each.
    for shape in [(1, CHANNELS, 12, 12), *SHAPES]:
        arguments = convert(deform_conv2d_arguments(shape, out=CHANNELS, **SAMPLES[samples])(), dtype=torch.float32)
        arguments["input"] = arguments["input"].contiguous(memory_format=LAYOUTS[layout])
        grad = torch.randn(*shape[:2], *arguments["offset"].shape[2:]).contiguous(memory_format=LAYOUTS[layout])
        Path("/proc/self/clear_refs").write_text("5")
        if backward:
            results = list(run(deform_conv2d, arguments, grad).values())
        else:
            with torch.no_grad():
                results = [deform_conv2d(**arguments)]
        known = [t for t in (*arguments.values(), grad, *results) if isinstance(t, Tensor)]
        extra.append(status_bytes("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in known))
        del arguments, grad, results, known
        before = before or status_bytes("VmRSS")
    print(json.dumps(extra[1:]))


def print_extra_bytes_of_each_way() -> None:
    """Each in a process of its own, in which nothing has run yet: forks of this one, which has imported everything."""
    for way in WAYS:
        child = os.fork()
        if child == 0:
            print_extra_bytes(*way)
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, way


def test_scratch_does_not_grow_with_the_images(monkeypatch):
    # What is freed goes back to the system at once, so that later calls cannot take it unseen.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(MB // 8))
    printed = run_python(f"import {__name__}; {__name__}.print_extra_bytes_of_each_way()", path=Path(__file__).parent)
    for way, line in zip(WAYS, printed.splitlines(), strict=True):
        check_extra_bytes(*way, json.loads(line))


def check_extra_bytes(backward: bool, layout: str, samples: str, found: list[int]) -> None:
    for shape, extra in zip(SHAPES, found, strict=True):
        # Packed weights, 1 MB for each thread, and what an allocator needs.
        allowed = 4 * CHANNELS * CHANNELS * TAPS + THREADS * MB + 3 * MB // 2
        if backward:
            # Each thread's part of the gradients of offset and mask.
            allowed += THREADS * 4 * 3 * TAPS * shape[0] * shape[2] * shape[3]
        if samples == "far" and layout == "contiguous":
            # Copies of images, and in the backward their gradients.
            image = 4 * shape[1] * shape[2] * shape[3]
            allowed += (1 + backward) * min(shape[0] * image, max(image, 16 * MB))
        way = f"{'forward and backward' if backward else 'forward'}, {layout}, {samples}, {shape}"
        assert extra < allowed, f"{way}: {extra / MB:.1f} MB, {allowed / MB:.1f} MB are allowed"
