"""The fused CUDA kernels of deform_conv2d, thread block by thread block on the CPU, against the reference."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from cases import CASES, convert
from coverings import pairwise, word

from dcn_plugin import reference
from dcn_plugin.ops._kernels import latest
from dcn_plugin.ops._layout import new_image
from dcn_plugin.ops._operator import WANTED

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
# Rounding of one value, of products of rounded values.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# Order of threads (up, down, random), whether copies arrive as late as they may, whether blocks run backwards.
SCHEDULES = {
    "up": (0, False, False),
    "down": (1, True, True),
    "random": (2, True, False),
    "random_early": (2, False, True),
}
GRADIENTS = [WANTED[name] for name in ("input", "offset", "weight", "mask")]
EVERYTHING = sum(GRADIENTS)
FEW, MANY = 0, 1000  # multiprocessors: tiles are chosen by how many there are to keep busy


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "fused")
    schedule()


def schedule(name="up", multiprocessors=FEW):
    emulation.load().set_schedule(*SCHEDULES[name], multiprocessors)


def used(operator: str = "deform_conv2d") -> dict[str, str]:
    """What served the last calls of one operator; other tests of the process may have called others."""
    kernels = latest(emulation.load().kernels_used())
    return {name: path for name, path in kernels.items() if name.startswith(operator)}


class Problem:
    """Arguments of a call in a half type, a gradient of its result, and what the reference makes of them in float64."""

    def __init__(
        self, shape, out, kernel=3, stride=1, padding=(1, 1, 1, 1), dilation=1, groups=1, offset_groups=1,
        mask=True, bias=True, spread=2.0, dtype=torch.bfloat16, layout=torch.channels_last, offset_dtype=torch.float32,
    ):  # fmt: skip
        torch.manual_seed(0)
        n, c, h, w = shape
        top, left, bottom, right = padding
        self.how = ([stride] * 2, list(padding), [dilation] * 2)
        size = [(s - dilation * (kernel - 1) - 1) // stride + 1 for s in (h + top + bottom, w + left + right)]
        planes = offset_groups * kernel**2
        self.input = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        self.offset = (torch.randn(n, 2 * planes, *size) * spread).to(offset_dtype)
        self.weight = (torch.randn(out, c // groups, kernel, kernel) / (kernel**2 * c / groups) ** 0.5).to(dtype)
        self.bias = torch.randn(out).to(dtype) if bias else None
        self.mask = torch.rand(n, planes, *size).to(offset_dtype) if mask else None
        self.grad = torch.randn(n, out, *size).to(dtype).contiguous(memory_format=layout)

    def forward(self):
        op = emulation.load().deform_conv2d
        return op(self.input, self.offset, self.weight, self.bias, self.mask, *self.how)

    def backward(self, wanted=EVERYTHING):
        op = emulation.load().deform_conv2d_backward
        return op(self.grad, self.input, self.offset, self.weight, self.mask, *self.how, wanted)

    def truth(self):
        names = ["input", "offset", "weight", *(["mask"] if self.mask is not None else [])]
        exact = {name: getattr(self, name).double().requires_grad_() for name in names}
        bias = None if self.bias is None else self.bias.double()
        stride, padding, dilation = (tuple(v) for v in self.how)
        out = reference.deform_conv2d(
            exact["input"], exact["offset"], exact["weight"], bias, stride, padding, dilation, mask=exact.get("mask")
        )
        return out.detach(), torch.autograd.grad(out, list(exact.values()), self.grad.double())

    def check(self):
        """Compare everything, and return which kernels ran."""
        out, gradients = self.truth()
        found = self.forward()
        close(found, out, self.input.dtype)
        assert found.stride() == new_image(self.input, found.shape).stride()
        for mine, its in zip(self.backward(), gradients, strict=False):
            close(mine, its, self.input.dtype)
        return used()


def close(found, truth, dtype):
    limit = LIMITS[dtype] * truth.abs().max()
    error = (found.double() - truth).abs().max()
    assert error <= limit, f"off by {error:.2g}, {limit:.2g} allowed"


FORMS = {
    "one_tile": dict(shape=(1, 64, 8, 8), out=64),
    "images_across_tiles": dict(shape=(3, 16, 9, 7), out=24),
    "all_tile_widths": dict(shape=(1, 32, 11, 13), out=200),
    "more_outputs_than_a_tile": dict(shape=(1, 16, 5, 6), out=300),
    "channels_in_several_turns": dict(shape=(1, 256, 5, 5), out=24),
    "turns_of_a_group": dict(shape=(1, 256, 9, 4), out=16, groups=2, offset_groups=4),
    "odd_outputs": dict(shape=(2, 8, 6, 7), out=13),
    "groups": dict(shape=(2, 64, 9, 7), out=48, groups=4, offset_groups=2),
    "offset_groups_within_groups": dict(shape=(1, 64, 7, 7), out=16, groups=2, offset_groups=4),
    "offset_groups_across_groups": dict(shape=(1, 48, 9, 7), out=32, groups=2, offset_groups=3),
    "most_offset_groups": dict(shape=(1, 72, 6, 7), out=40, offset_groups=9),
    "strided": dict(shape=(2, 24, 13, 11), out=16, stride=2, padding=(0, 1, 2, 3), dilation=2),
    "large_kernel": dict(shape=(1, 16, 9, 8), out=16, kernel=5, padding=(2, 2, 2, 2)),
    "pointwise": dict(shape=(2, 40, 6, 5), out=16, kernel=1, padding=(0, 0, 0, 0)),
    "v1": dict(shape=(1, 24, 9, 9), out=32, mask=False, bias=False),
    "far": dict(shape=(1, 16, 9, 7), out=16, spread=20.0),
    "half_offsets": dict(shape=(1, 16, 9, 7), out=16, spread=0.5, offset_dtype=None),
}  # fmt: skip


@pytest.mark.parametrize(("form", "dtype", "layout"), pairwise(list(FORMS), list(LIMITS), list(FORMATS)), ids=word)
def test_results_and_gradients(form, dtype, layout):
    how = dict(FORMS[form], dtype=dtype, layout=FORMATS[layout])
    how["offset_dtype"] = how.get("offset_dtype", torch.float32) or dtype
    ran = Problem(**how).check()
    assert ran["deform_conv2d"].startswith("fused ") and ran["deform_conv2d_backward"] == "fused"


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(seed):
    """Sizes that nobody chose: groups, offset groups, kernels, strides, paddings and layouts at random."""
    draw = random.Random(seed)
    groups, pieces = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3, 5, 9])
    whole = groups * pieces
    kernel, dilation, stride = draw.choice([1, 2, 3, 3, 4]), draw.choice([1, 1, 2]), draw.choice([1, 1, 2, 3])
    schedule(draw.choice(list(SCHEDULES)), draw.choice([FEW, 3, MANY]))
    problem = Problem(
        (draw.randint(1, 3), 8 * whole, draw.randint(4, 12), draw.randint(4, 12)),
        groups * draw.randint(1, 90),
        kernel,
        stride,
        [(kernel - 1) * dilation // 2 + draw.randint(0, 2) for _ in range(4)],
        dilation,
        groups,
        draw.choice([d for d in range(1, 10) if whole % d == 0]),
        mask=draw.random() < 0.7,
        bias=draw.random() < 0.7,
        spread=draw.choice([0.0, 1.0, 4.0]),
        dtype=draw.choice(list(LIMITS)),
        layout=draw.choice(list(FORMATS.values())),
    )
    assert problem.check()["deform_conv2d"].startswith("fused ")


@pytest.mark.parametrize(
    ("out", "multiprocessors", "tile"),
    [(40, FEW, "128x64"), (100, FEW, "128x128"), (200, FEW, "64x256"), (200, MANY, "64x64"), (24, MANY, "64x64")],
)
def test_every_tile(out, multiprocessors, tile):
    problem = Problem((2, 24, 11, 13), out)
    schedule("up", multiprocessors)
    assert problem.check()["deform_conv2d"] == f"fused {tile}"


@pytest.mark.parametrize(
    ("form", "multiprocessors", "layout"),
    pairwise(["all_tile_widths", "offset_groups_across_groups", "large_kernel"], [FEW, MANY], list(FORMATS)),
    ids=word,
)
def test_nothing_depends_on_the_order_of_threads(form, layout, multiprocessors):
    """A barrier or a wait that is missing shows: shared memory begins as NaN, and some schedule reads it too early."""
    problem, found = Problem(**FORMS[form], layout=FORMATS[layout]), {}
    for name in SCHEDULES:
        schedule(name, multiprocessors)
        found[name] = [problem.forward(), *problem.backward()]
    for name, results in found.items():
        for mine, its in zip(results, found["up"], strict=True):
            assert mine.isfinite().all() and torch.equal(mine, its), name


@LAYOUTS
def test_values_that_are_not_finite(layout):
    """What diverged shows where it is read, and nowhere else: as in the reference."""
    problem = Problem((2, 16, 9, 7), 16, layout=layout)
    problem.offset[0, 4, 3, 3] = float("nan")
    problem.offset[0, 7, 5, 2] = float("inf")
    problem.offset[1, 0, 0, 0] = 1e30
    problem.mask[1, 3, 4, 4] = float("nan")
    problem.input[1, 5, 8, 6] = float("inf")
    out, gradients = problem.truth()
    found = problem.forward()
    assert torch.equal(found.isfinite(), out.isfinite())
    kept = out.isfinite()
    close(found[kept], out[kept], found.dtype)
    for mine, its in zip(problem.backward(), gradients, strict=True):
        assert torch.equal(mine.isnan(), its.isnan())


@pytest.mark.parametrize("wanted", range(16))
def test_only_what_is_asked_for(wanted):
    problem = Problem((1, 16, 7, 6), 16)
    every = problem.backward()
    for bit, found, whole in zip(GRADIENTS, problem.backward(wanted), every, strict=True):
        assert torch.equal(found, whole) if wanted & bit else found.numel() == 0


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=(1, 20, 6, 6)),  # channels not in pieces of eight
        dict(shape=(1, 32, 6, 6), offset_groups=8),  # nor those of an offset group
        dict(shape=(1, 80, 4, 4), offset_groups=10),  # more samples than fit
    ],
)
def test_the_portable_path_serves_the_rest(change):
    ran = Problem(**{"out": 16, **change}).check()
    assert ran == {"deform_conv2d": "portable", "deform_conv2d_backward": "portable"}


def test_unaligned_memory_goes_to_the_portable_path():
    problem = Problem((1, 16, 6, 6), 16)
    whole = torch.randn(1, 6, 6, 24, dtype=torch.bfloat16)
    problem.input = whole[..., 4:20].permute(0, 3, 1, 2)
    close(problem.forward(), problem.truth()[0], torch.bfloat16)
    assert used()["deform_conv2d"] == "portable"


def test_views_of_larger_tensors():
    """Strides that are no layout's of their own, but whole pieces."""
    problem = Problem((2, 16, 6, 6), 16)
    problem.input = torch.randn(4, 8, 9, 32).bfloat16()[::2, 1:7, 2:8, 8:24].permute(0, 3, 1, 2)
    problem.grad = torch.randn(2, 16, 12, 12).bfloat16()[:, :, ::2, 1::2]
    ran = problem.check()
    assert ran["deform_conv2d"].startswith("fused") and ran["deform_conv2d_backward"] == "fused"


def test_portable_is_the_default(monkeypatch):
    problem = Problem((1, 16, 6, 6), 16)
    for value in ("portable", "", None):
        monkeypatch.delenv("DCN_PLUGIN_CUDA_KERNELS", raising=False)
        if value is not None:
            monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", value)
        problem.forward()
        assert used()["deform_conv2d"] == "portable"
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="expected 'portable' or 'fused', got 'fast'"):
        problem.forward()


CASE = next(case for case in CASES if case.name == "deform_conv2d")


@HALVES
@pytest.mark.parametrize("config", CASE.configs)
def test_cases_of_all_devices(config, dtype):
    """The table that CPU and CUDA share: whatever the call, a kernel that is right serves it."""
    rounded = CASE.make(config, dtype)
    truth = CASE.reference(**convert(rounded, dtype=torch.float64))
    close(emulation.load().deform_conv2d(*CASE.to_op(**rounded).values()), truth, dtype)


def library_of_compiler(name: str) -> str:
    done = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(emulation.FLAGS in os.environ, reason="this is the sanitizers' run")
def test_under_sanitizers():
    """Every access to tensors and shared memory, alignment and integer arithmetic are watched."""
    preload = [library_of_compiler(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    if shutil.which("c++") is None or not all(Path(path).is_absolute() for path in preload):
        pytest.skip("the compiler comes without shared sanitizer libraries")
    environment = dict(
        os.environ,
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )
    # -O1 as the sanitizers' manual has it: -O2 compiles half as long again.
    environment[emulation.FLAGS] = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    chosen = "not order_of_threads and not only_what and not sanitizers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    tests = sorted(map(str, Path(__file__).parent.glob("test_emulated_*.py")))
    done = subprocess.run([*command, *tests], cwd=emulation.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
