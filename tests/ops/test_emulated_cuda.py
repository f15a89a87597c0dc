"""The fused CUDA kernels of deform_conv2d, thread block by thread block on the CPU, against the reference."""

import concurrent.futures
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from cases import CASES, convert, set_to_zero
from coverings import pairwise, word

from dcn_plugin import reference
from dcn_plugin.ops._kernels import latest
from dcn_plugin.ops._layout import new_image
from dcn_plugin.ops._operator import WANTED

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
# Rounding of one value, of products of rounded values; float32's are rounded in the forward alone, to TF32.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-3}
LIMIT_OF_FLOAT = 2e-5
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
# What a block may have of shared memory on processors 8.6 and 8.9, 8.0, 9.0.
SMALL, A100, H100 = 99 << 10, 163 << 10, 227 << 10


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "fused")
    schedule()


@pytest.fixture(autouse=True)
def switches():
    """Torch's switches for float32, which tests change, are put back to what they are by default."""
    yield
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.allow_tf32 = True


def schedule(name="up", multiprocessors=FEW, shared_bytes=SMALL):
    emulation.load().set_schedule(*SCHEDULES[name], multiprocessors, shared_bytes=shared_bytes)


def used(operator: str = "deform_conv2d") -> dict[str, str]:
    """What served the last calls of one operator; other tests of the process may have called others."""
    kernels = latest(emulation.load().kernels_used())
    return {name: path for name, path in kernels.items() if name.startswith(operator)}


class Problem:
    """Arguments of a call, a gradient of its result, and what the reference makes of them in float64."""

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

    def aim(self):
        """Nearly all samples of a 3x3 kernel of stride 1 go to one place, whose cell has hundreds of them."""
        n, planes, height, width = self.offset.shape
        taps = torch.arange(9)
        y = 3.25 - (torch.arange(height)[:, None] - 1 + (taps // 3)[:, None, None])
        x = 4.5 - (torch.arange(width)[None, :] - 1 + (taps % 3)[:, None, None])
        aimed = torch.stack([y.expand(9, height, width), x.expand(9, height, width)], 1).expand(
            n, planes // 18, -1, -1, -1, -1
        )
        self.offset = aimed.reshape(self.offset.shape).to(self.offset.dtype).contiguous()
        self.offset[:, :, 3, :5] += torch.randn(n, planes, 5).to(self.offset.dtype)

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
        found, (out, _) = self.forward(), self.truth()
        close(found, out, self.input.dtype)
        assert found.stride() == new_image(self.input, found.shape).stride()
        self.check_gradients()
        return used()

    def check_gradients(self):
        """Compare those, and return which kernels ran."""
        _, gradients = self.truth()
        for mine, its in zip(self.backward(), gradients, strict=False):
            close(mine, its, self.input.dtype, exact=self.input.dtype == torch.float32)
        return used()["deform_conv2d_backward"]

    def served(self, ran):
        """Whether these are fused kernels, of float32 in TF32."""
        forward = "fused tf32 " if self.input.dtype == torch.float32 else "fused "
        return ran["deform_conv2d"].startswith(forward) and ran["deform_conv2d_backward"] == "fused"


def close(found, truth, dtype, exact=False):
    limit = (LIMIT_OF_FLOAT if exact else LIMITS[dtype]) * truth.abs().max()
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
    "one_row": dict(shape=(2, 16, 1, 9), out=24),
    "one_column": dict(shape=(2, 16, 9, 1), out=24),
    "one_pixel": dict(shape=(5, 16, 1, 1), out=24, spread=0.6),
    "v1": dict(shape=(1, 24, 9, 9), out=32, mask=False, bias=False),
    "far": dict(shape=(1, 16, 9, 7), out=16, spread=20.0),
    "half_offsets": dict(shape=(1, 16, 9, 7), out=16, spread=0.5, offset_dtype=None),
}  # fmt: skip


@pytest.mark.parametrize(("form", "dtype", "layout"), pairwise(list(FORMS), list(LIMITS), list(FORMATS)), ids=word)
def test_results_and_gradients(form, dtype, layout):
    how = dict(FORMS[form], dtype=dtype, layout=FORMATS[layout])
    how["offset_dtype"] = how.get("offset_dtype", torch.float32) or dtype
    problem = Problem(**how)
    assert problem.served(problem.check())


@pytest.mark.parametrize(("form", "layout"), pairwise(list(FORMS), list(FORMATS)), ids=word)
def test_gradients_of_float32(form, layout):
    problem = Problem(**dict(FORMS[form], dtype=torch.float32, offset_dtype=torch.float32, layout=FORMATS[layout]))
    assert problem.check_gradients() == "fused"


@pytest.mark.parametrize("dtype", LIMITS, ids=word)
@LAYOUTS
def test_most_samples_in_one_cell(dtype, layout):
    """Whose chunks are summed up before its pixels are: equal bits every time."""
    problem = Problem((2, 32, 12, 14), 8, dtype=dtype, offset_groups=2, layout=layout)
    problem.aim()
    assert problem.check_gradients() == "fused"
    assert all(torch.equal(*pair) for pair in zip(problem.backward(), problem.backward(), strict=True))


def test_vectors_of_float_are_four_channels():
    """Which half types cannot be served with: groups of 12, offset groups of 4."""
    how = dict(shape=(2, 24, 9, 7), out=10, groups=2, offset_groups=6)
    assert Problem(**how, dtype=torch.float32).check_gradients() == "fused"
    assert Problem(**how).check_gradients() == "portable"


def test_sums_over_many_pixels_are_rounded_once():
    """Ranges of 64 pixels each add 64.25, which bfloat16 would make 64: 1280 of them all, where 1285 becomes 1288."""
    problem = Problem((20, 128, 8, 8), 8, kernel=1, padding=(0, 0, 0, 0), mask=False, bias=False, spread=0.0)
    problem.input.fill_(1.0)
    problem.grad.fill_(1.0)
    problem.grad[:, :, 3, 5] = 1.25
    grad_weight = problem.backward()[2]
    assert used()["deform_conv2d_backward"] == "fused" and (grad_weight == 1288).all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "how",
    [
        dict(shape=(2, 12, 7, 6), out=10),
        dict(shape=(1, 40, 6, 5), out=24, groups=2, offset_groups=5),  # groups of 20 channels, offsets of 8
        dict(shape=(1, 36, 6, 7), out=40, offset_groups=9),
        dict(shape=(1, 4, 9, 8), out=16, kernel=5, padding=(2, 2, 2, 2)),
    ],
    ids=["one_group", "across_groups", "most_offset_groups", "one_vector"],
)
def test_vectors_of_four_floats(how, layout):
    problem = Problem(**how, dtype=torch.float32, layout=FORMATS[layout])
    assert problem.served(problem.check())


@pytest.mark.parametrize("seed", range(32))
def test_random_calls(seed):
    """Sizes that nobody chose: groups, offset groups, kernels, strides, paddings and layouts at random."""
    draw = random.Random(seed)
    groups, pieces = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3, 5, 9])
    whole = groups * pieces
    kernel, dilation, stride = draw.choice([1, 2, 3, 3, 4]), draw.choice([1, 1, 2]), draw.choice([1, 1, 2, 3])
    schedule(draw.choice(list(SCHEDULES)), draw.choice([FEW, 3, MANY]), draw.choice([SMALL, H100]))
    dtype = draw.choice(list(LIMITS))
    problem = Problem(
        (draw.randint(1, 3), (4 if dtype == torch.float32 else 8) * whole, draw.randint(4, 12), draw.randint(4, 12)),
        draw.randint(129, 300) if groups == 1 and draw.random() < 0.3 else groups * draw.randint(1, 90),
        kernel,
        stride,
        [(kernel - 1) * dilation // 2 + draw.randint(0, 2) for _ in range(4)],
        dilation,
        groups,
        draw.choice([d for d in range(1, 10) if whole % d == 0]),
        mask=draw.random() < 0.7,
        bias=draw.random() < 0.7,
        spread=draw.choice([0.0, 1.0, 4.0]),
        dtype=dtype,
        layout=draw.choice(list(FORMATS.values())),
    )
    assert problem.check()["deform_conv2d"].startswith("fused ")


@pytest.mark.parametrize("dtype", LIMITS, ids=word)
@pytest.mark.parametrize(
    ("out", "multiprocessors", "shared", "tile"),
    [
        (40, FEW, H100, "128x64"),
        (100, FEW, H100, "128x128"),
        (200, FEW, SMALL, "64x256"),
        (200, FEW, A100, "128x256"),
        (270, 3, H100, "128x256"),
        (200, MANY, H100, "64x64"),
        (24, MANY, SMALL, "64x64"),
    ],
)
def test_every_tile(out, multiprocessors, shared, tile, dtype):
    problem = Problem((2, 24, 11, 13), out, dtype=dtype)
    schedule("random", multiprocessors, shared)
    assert problem.check()["deform_conv2d"] == f"fused {'tf32 ' if dtype == torch.float32 else ''}{tile}"


@pytest.mark.parametrize(
    ("form", "dtype", "multiprocessors", "shared", "layout"),
    pairwise(
        ["all_tile_widths", "offset_groups_across_groups", "large_kernel"],
        [torch.bfloat16, torch.float32], [FEW, MANY], [SMALL, H100], list(FORMATS),
    ),
    ids=word,
)  # fmt: skip
def test_nothing_depends_on_the_order_of_threads(form, layout, multiprocessors, dtype, shared):
    """A barrier or a wait that is missing shows: shared memory begins as NaN, and some schedule reads it too early."""
    problem, found = Problem(**FORMS[form], dtype=dtype, layout=FORMATS[layout]), {}
    for name in SCHEDULES:
        schedule(name, multiprocessors, shared)
        found[name] = [problem.forward(), *problem.backward()]
    for name, results in found.items():
        for mine, its in zip(results, found["up"], strict=True):
            assert mine.isfinite().all() and torch.equal(mine, its), name


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=word)
def test_values_that_are_not_finite(layout, dtype):
    """What diverged shows where it is read, and nowhere else: as in the reference."""
    problem = Problem((2, 16, 9, 7), 16, dtype=dtype, layout=layout)
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
    problem = Problem((3, 32, 9, 8), 16)  # in several ranges of images and of pixels
    every = problem.backward()
    for bit, found, whole in zip(GRADIENTS, problem.backward(wanted), every, strict=True):
        assert torch.equal(found, whole) if wanted & bit else found.numel() == 0


@pytest.mark.parametrize(
    ("change", "backward"),
    [
        (dict(shape=(1, 20, 6, 6)), "portable"),  # channels not in pieces of eight
        (dict(shape=(1, 32, 6, 6), offset_groups=8), "portable"),  # nor those of an offset group
        (dict(shape=(1, 80, 4, 4), offset_groups=10), "fused"),  # more samples than fit a block of the forward
    ],
)
def test_the_portable_path_serves_the_rest(change, backward):
    ran = Problem(**{"out": 16, **change}).check()
    assert ran == {"deform_conv2d": "portable", "deform_conv2d_backward": backward}


def test_a_batch_without_images():
    problem = Problem((0, 16, 6, 6), 16)
    gradients = problem.backward()
    arguments = (problem.input, problem.offset, problem.weight, problem.mask)
    assert [found.shape for found in gradients] == [given.shape for given in arguments]
    assert (gradients[2] == 0).all() and used()["deform_conv2d_backward"] == "fused"


def unaligned(whole, layout):
    """The same values in the same layout, from 8 bytes beyond a multiple of 16 on."""
    moved = torch.empty(whole.numel() + 12, dtype=whole.dtype)
    first = next(i for i in range(12) if moved[i:].data_ptr() % 16 == 8)
    like = whole.contiguous(memory_format=layout)
    moved = moved[first:].as_strided(like.shape, like.stride())
    assert moved.data_ptr() % 16 == 8
    return moved.copy_(like)


@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
@LAYOUTS
@pytest.mark.parametrize("which", ["input", "weight", "grad", "slice"])
def test_memory_that_is_not_aligned_is_copied(which, layout, groups):
    """What views of larger tensors begin with: the fused kernels serve them all the same."""
    problem = Problem((2, 16, 6, 5), 16, groups=groups, layout=layout)
    if which == "slice":
        problem.input = torch.randn(2, 6, 5, 24).bfloat16()[..., 4:20].permute(0, 3, 1, 2)
    else:
        setattr(problem, which, unaligned(getattr(problem, which), layout))
    ran = problem.check()
    assert all(path.startswith("fused") for path in ran.values()), ran


def test_images_as_wide_as_positions_may_be():
    """Eight rows of these have more pixels than an int counts."""
    of = emulation.load().pixel_of_tile
    for width in (2**28, 2**29 - 8):
        assert of(1, width, 8, width - 1) == [0, width - 1]
        assert of(2, width, 8, width + 1) == [1, width // 2]
        assert of(2, width, 1, width + 1) == [1, 1]
    assert of(11, 13, 8, 8 * 13 + 4) == [9, 1]


@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_what_is_written_whole_is_not_set_to_zero_before(groups):
    problem = Problem((2, 16, 6, 5), 16, groups=groups)
    zeroed = set_to_zero(problem.backward)
    assert used()["deform_conv2d_backward"].startswith("fused")
    assert problem.input.shape not in zeroed and problem.weight.shape not in zeroed
    # What would be left unwritten shows as NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert problem.check()["deform_conv2d_backward"].startswith("fused")
    finally:
        torch.use_deterministic_algorithms(False)


def test_views_of_larger_tensors():
    """Strides that are no layout's of their own, but whole pieces."""
    problem = Problem((2, 16, 6, 6), 16)
    problem.input = torch.randn(4, 8, 9, 32).bfloat16()[::2, 1:7, 2:8, 8:24].permute(0, 3, 1, 2)
    problem.grad = torch.randn(2, 16, 12, 12).bfloat16()[:, :, ::2, 1::2]
    ran = problem.check()
    assert ran["deform_conv2d"].startswith("fused") and ran["deform_conv2d_backward"] == "fused"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=word)
def test_rows_that_are_no_whole_pixels_are_copied(dtype):
    problem = Problem((2, 16, 6, 6), 24, dtype=dtype)
    whole = torch.randn(2, 6, 8 * 16 - 8, dtype=dtype)
    problem.input = whole[..., : 6 * 16].unflatten(2, (6, 16)).permute(0, 3, 1, 2)
    assert problem.served(problem.check())


FULL_FLOAT32 = {
    "legacy": lambda backends: setattr(backends.cudnn, "allow_tf32", False),
    "conv": lambda backends: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "off": lambda backends: setattr(backends.cudnn, "enabled", False),
}


@pytest.mark.parametrize("switch", FULL_FLOAT32)
@LAYOUTS
def test_switches_of_torch_ask_for_full_float32(switch, layout, monkeypatch):
    """Then the bits are those of the portable path; in any thread, and again in TF32 as soon as it is allowed."""
    problem = Problem((2, 16, 9, 7), 24, dtype=torch.float32, layout=layout)
    rounded = problem.forward()
    assert used()["deform_conv2d"].startswith("fused tf32 ")
    FULL_FLOAT32[switch](torch.backends)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        full = thread.submit(problem.forward).result()
    assert used()["deform_conv2d"] == "portable"
    close(full, problem.truth()[0], torch.float32, exact=True)
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "portable")
    assert torch.equal(full, problem.forward()) and not torch.equal(full, rounded)
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "fused")
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert torch.equal(problem.forward(), rounded)


ALONE = """
import sys, torch
schemas = torch.library.Library("dcn_plugin_emulated", "FRAGMENT")
schemas.define(sys.argv[2])
torch.ops.load_library(sys.argv[1])
image, weight = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 3, 3)
for _ in range(2):
    torch.ops.dcn_plugin_emulated.deform_conv2d(
        image, torch.zeros(1, 18, 6, 6), weight, None, None, [1, 1], [1] * 4, [1, 1]
    )
    print(torch.ops.dcn_plugin_emulated.kernels_used())
"""


def test_without_our_python_float32_is_full():
    """Whoever loads the libraries alone, as a C++ program does, has nobody who answers for torch's switches."""
    library = str(emulation.build(os.environ.get(emulation.FLAGS, "")))
    schema = str(torch.ops.dcn_plugin.deform_conv2d.default._schema).removeprefix("dcn_plugin::")
    command = [sys.executable, "-c", ALONE, library, schema]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(library).parent)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[::2] for line in done.stdout.splitlines() if line] == [["deform_conv2d", "portable"]] * 2


def test_values_are_rounded_to_nearest():
    """A pointwise convolution at whole positions multiplies input and weight alone: what each becomes is seen."""
    one = 1 + 2.0 ** -torch.arange(8, 16, dtype=torch.float64)
    nearest = torch.where(one - 1 < 2**-11, 1.0, torch.where(one - 1 == 2**-11, 1 + 2**-10, one))
    problem = Problem(
        (1, 8, 1, 1), 8, kernel=1, padding=(0,) * 4, mask=False, bias=False, spread=0, dtype=torch.float32
    )
    for image, weight, expected in (
        (one, torch.eye(8), nearest),
        (-one, torch.eye(8), -nearest),
        (torch.ones(8), torch.diag(one), nearest),
    ):
        problem.input, problem.weight = image.float().view(1, 8, 1, 1), weight.float().view(8, 8, 1, 1)
        assert torch.equal(problem.forward().flatten(), expected.float())


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
    # Optimised, these take several times as long to compile.
    environment[emulation.FLAGS] = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    # float16 is read and written where bfloat16 is.
    chosen = "not order_of_threads and not only_what and not sanitizers and (bfloat16 or not float16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    tests = sorted(map(str, Path(__file__).parent.glob("test_emulated_*.py")))
    done = subprocess.run([*command, *tests], cwd=emulation.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
