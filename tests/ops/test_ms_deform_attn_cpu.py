"""The tuned CPU path of multi-scale attention: every width of its vectors, half values bit by bit, threads, memory."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_close, convert, ms_deform_attn_arguments, run
from conftest import PORTABLE, TUNED, cpu_kernels
from run_python import run_python
from test_cpu_memory import MB, peak_can_be_reset, status_bytes
from torch import Tensor

from dcn_plugin import reference
from dcn_plugin.ops import kernels_used, ms_deform_attn

HALVES = [torch.float16, torch.bfloat16]
# Blocks of 64, 32, 16 and 8 channels, and what they leave; points that fill a vector, and that do not.
WIDTHS = {
    1: dict(points=(1, 2)),
    3: dict(points=(3, 6), reference=2),
    7: dict(points=(16, 1), reference=4, softmax=True),
    8: dict(points=(4, 4)),
    15: dict(points=(1, 1), softmax=True),
    16: dict(points=(8, 9), reference=2, one_reference=True, softmax=True),
    20: dict(points=(3, 2), strided=True),
    31: dict(points=(17, 4), weights=False),
    32: dict(points=(4, 12), reference=4, one_reference=True, softmax=True),
    33: dict(points=(2, 1), weights=False, reference=2),
    64: dict(points=(5, 5), softmax=True),
    129: dict(points=(2, 3), reference=4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_equals_the_reference(width, dtype, vectors):
    torch.manual_seed(width)
    make = ms_deform_attn_arguments(shape=(2, 3, width), levels=((5, 6), (2, 3)), merged=True, **WIDTHS[width])
    arguments = convert(make(), dtype=dtype)
    if dtype in HALVES:  # positions in half precision are another matter
        arguments |= {k: v.float() for k, v in arguments.items() if isinstance(v, Tensor) and k != "value"}
    exact = convert(arguments, dtype=torch.float64)
    grad = torch.randn(2, 7, 3 * width, dtype=torch.float64).to(dtype)
    expected = run(reference.ms_deform_attn, exact, grad.double())
    for name, value in run(ms_deform_attn, arguments, grad).items():
        assert_close(value, expected[name], dtype, name)
    assert kernels_used()["ms_deform_attn_backward"].startswith("tuned")


def test_a_query_for_each_pixel(vectors):
    """Those are visited in strips, of which the maps' last ones are narrower."""
    levels = ((5, 37), (3, 16), (20, 1))
    queries = sum(h * w for h, w in levels)
    arguments = ms_deform_attn_arguments((2, 2, 4), levels, queries=queries, points=1)()
    expected = run(reference.ms_deform_attn, arguments)
    for name, value in run(ms_deform_attn, arguments).items():
        assert_close(value, expected[name], torch.float64, name)


# -- half values ------------------------------------------------------------------------------------------------------


def at_every_pixel(value: Tensor, weight: float, channels: int) -> Tensor:
    """A power of two of values, in pixels of `channels`, sampled at each pixel's centre and weighted."""
    pixels = value.numel() // channels
    centres = torch.stack([(torch.arange(pixels) + 0.5) / pixels, torch.full((pixels,), 0.5)], -1)
    locations = centres.view(1, pixels, 1, 1, 1, 2)
    weights = torch.full((1, pixels, 1, 1, 1), weight)
    return ms_deform_attn(value.view(1, pixels, 1, channels), [(1, pixels)], locations, weights).flatten()


@pytest.mark.parametrize("channels", [1, 8, 32])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_value_is_read_and_rounded_as_torch_does(dtype, channels, vectors):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    assert every.isnan().any() and every.isinf().any()
    for weight in (1.0, 0.7, 1.5, 2.0**-11, 3000.0):
        # To denormal numbers, to infinity, and to ties on the way.
        expected = (every.float() * weight).to(dtype)
        found = at_every_pixel(every, weight, channels)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_denormal_halves_count_where_denormals_are_flushed(vectors):
    tiny = torch.full((64,), 2.0**-24, dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = at_every_pixel(tiny, 1.0, 8)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, tiny)


# -- softmax ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 5, 16, 33])
def test_softmax_of_any_logits(points, vectors):
    torch.manual_seed(0)
    logits = torch.randn(1, 40, 4, points)
    logits[:, :10] *= 30
    logits[:, 10:20] += 1e30
    logits[0, 20, 0, 0] = logits[0, 21, 1, -1] = -torch.inf
    logits[0, 22, 2, 0] = torch.inf
    logits[0, 23, 3, -1] = torch.nan
    value = torch.randn(1, 12, 4, 8)
    locations = torch.rand(1, 40, 4, points, 2) * 0.5 + 0.25
    found = ms_deform_attn(value, [(3, 4)], locations, logits, softmax=True, points=[points])
    expected = reference.ms_deform_attn(value, [(3, 4)], locations, logits, softmax=True, points=[points])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# -- threads, kernels, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(images, dtype):
    torch.manual_seed(0)
    make = ms_deform_attn_arguments((images, 5, 24), queries=60, points=3, reference=4, softmax=True)
    arguments = convert(make(), dtype=dtype)
    grad = torch.randn(images, 60, 5 * 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(threads)
            found.append(run(ms_deform_attn, arguments, grad))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(others[name], value) for name, value in found[0].items())


def test_which_kernels_serve():
    def served(points: int) -> str:
        ms_deform_attn(torch.zeros(1, 4, 1, 2), [(2, 2)], torch.zeros(1, 1, 1, points, 2), points=[points])
        return kernels_used()["ms_deform_attn"]

    assert served(1024).startswith("tuned") and served(1025) == "portable"
    with cpu_kernels(PORTABLE):
        assert served(4) == "portable"
    with cpu_kernels(TUNED):
        assert served(4).startswith("tuned")


SHAPES = [((40, 50), (20, 25)), ((80, 100), (40, 50))]
THREADS = 2


def print_extra_bytes(backward: bool) -> None:
    """Print, for each size, by how many bytes the peak of an encoder's call lies above its arguments and results."""
    torch.set_num_threads(THREADS)
    extra, before = [], 0
    for levels in [((8, 8), (4, 4)), *SHAPES]:  # the first loads code and tables, which are not scratch
        queries = sum(h * w for h, w in levels)
        arguments = convert(ms_deform_attn_arguments((1, 8, 32), levels, queries=queries)(), dtype=torch.float32)
        grad = torch.randn(1, queries, 256)
        Path("/proc/self/clear_refs").write_text("5")
        if backward:
            results = list(run(ms_deform_attn, arguments, grad).values())
        else:
            with torch.no_grad():
                results = [ms_deform_attn(**arguments)]
        known = [t for t in (*arguments.values(), grad, *results) if isinstance(t, Tensor)]
        extra.append(status_bytes("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in known))
        del arguments, grad, results, known
        before = before or status_bytes("VmRSS")
    print(json.dumps(extra[1:]))


def print_extra_bytes_of_both() -> None:
    for backward in (False, True):
        child = os.fork()
        if child == 0:
            print_extra_bytes(backward)
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, backward


@pytest.mark.skipif(not peak_can_be_reset(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_is_the_results_and_a_megabyte_for_each_thread(monkeypatch):
    # What is freed goes back to the system at once, so that later calls cannot take it unseen.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(MB // 8))
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {folders}; import {__name__} as t; t.print_extra_bytes_of_both()"
    printed = run_python(code, path=Path(__file__).parent)
    for line in printed.splitlines():
        for levels, extra in zip(SHAPES, json.loads(line), strict=True):
            allowed = THREADS * MB + 3 * MB // 2  # and what an allocator needs
            assert extra < allowed, f"{levels}: {extra / MB:.1f} MB, {allowed / MB:.1f} MB are allowed"
