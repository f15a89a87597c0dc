"""What only a GPU shows: real sizes on both sets of kernels, sums in a fixed order, graphs, streams, devices, failures.

The contracts (test_contracts.py) run on CUDA too, on small shapes and in any order; this adds what they leave out.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    OpCase,
    assert_close,
    convert,
    deform_conv2d_arguments,
    deform_ps_roi_pool_arguments,
    deform_roi_pool_arguments,
    leaves,
    ms_deform_attn_arguments,
    ps_roi_pool_arguments,
    run,
)

import dcn_plugin
from dcn_plugin import ops

# cuBLAS adds in a fixed order only with a workspace of fixed size, and looks at this once, when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    # At once: more than a thousand items would be collected and skipped one by one.
    pytest.skip("needs a GPU", allow_module_level=True)

CONV = BY_NAME["deform_conv2d"]
# Of values, and of positions (offset, mask, regions) beside them.
TYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16-float32": (torch.float16, torch.float32),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PROBLEMS = {name: (case, make) for case in CASES for name, make in case.real.items()}
# For each tile of the fused forward a problem that is large enough for it on up to 160 multiprocessors; for those above
# it takes 64x64. The largest needs more shared memory than 8.6 and 8.9 have.
SHARED = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
TILES = {
    "128x256" if SHARED >= 121 << 10 else "64x256": deform_conv2d_arguments((16, 32, 36, 36), out=256),
    "128x128": deform_conv2d_arguments((8, 32, 72, 72), out=128),
    "128x64": deform_conv2d_arguments((8, 32, 72, 72), out=64),
}
ONE_EACH = [next(iter(case.real)) for case in CASES]
# A tensor of 256 channels and this side has more than 2^31 elements; a corner of it is compared with the CPU.
SIDE, CORNER = 2900, 40
each_problem = pytest.mark.parametrize("problem", PROBLEMS)
one_of_each = pytest.mark.parametrize("problem", ONE_EACH)
each_types = pytest.mark.parametrize("types", TYPES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# Other tests have these words in their names: `-k "not kernels_fused"` means this parameter.
@pytest.fixture(params=["portable", "fused"], ids=lambda name: f"kernels_{name}")
def kernels(request, monkeypatch):
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["any_order", "fixed_order"])
def fixed_order(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def errors_belong_to_the_test_that_made_them():
    yield
    torch.cuda.synchronize()


@cache
def given(problem: str, types: str, seed: int = 0) -> tuple[dict, torch.Tensor, dict]:
    """Arguments and a gradient of the result on the CPU, and what the CPU makes of them in full precision."""
    case, make = PROBLEMS.get(problem) or (CONV, TILES[problem])
    torch.manual_seed(seed)
    exact = make()
    if not case.of_regions and "offset" in exact:
        # Near whole pixels, where the derivative jumps, rounding would decide on the side.
        exact["offset"] = away_from_pixels(exact["offset"])
    value, position = TYPES[types]
    arguments = {
        k: v.to(position if k in case.float32_beside_half else value) if isinstance(v, torch.Tensor) else v
        for k, v in exact.items()
    }
    # Rounded regions put samples just on the border of those that count; float32 then decides as on the GPU.
    truth = convert(arguments, dtype=torch.float32 if case.of_regions and value != torch.float64 else torch.float64)
    grad = torch.randn(case.function(**truth).shape).to(value)
    return arguments, grad, run(case.function, truth, grad)


def away_from_pixels(offset: torch.Tensor) -> torch.Tensor:
    return offset.floor() + 0.1 + 0.8 * (offset - offset.floor())


def laid_out(arguments: dict, layout: str, device: str) -> dict:
    """All images on the device in this layout; as memory of their own, where that changes nothing too."""
    return {
        k: v.to(device).clone(memory_format=LAYOUTS[layout] if v.dim() == 4 else torch.preserve_format)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in arguments.items()
    }


def require_equal(found: dict, expected: dict, types: str, device: str) -> None:
    for name, value in found.items():
        assert value.device.type == torch.device(device).type
        assert_close(value, expected[name], TYPES[types][0], name)


def check_against_cpu(problem: str, types: str, layout: str, device: str, times: int = 1) -> None:
    """Value and gradients are the CPU's; several `times` give equal bits."""
    arguments, grad, expected = given(problem, types)
    on = laid_out({**arguments, "grad": grad}, layout, device)
    grad = on.pop("grad")
    function = ops.deform_conv2d if problem in TILES else PROBLEMS[problem][0].function
    first = run(function, on, grad)
    require_equal(first, expected, types, device)
    for _ in range(times - 1):
        for name, value in run(function, on, grad).items():
            assert torch.equal(value, first[name]), f"{name} differs between two runs"


@each_problem
@each_types
@each_layout
def test_real_sizes_equal_the_cpu(problem, types, layout, kernels):
    check_against_cpu(problem, types, layout, "cuda")


@each_problem
@each_types
@each_layout
@pytest.mark.parametrize("fixed_order", [True], indirect=True, ids=["fixed_order"])
def test_a_fixed_order_gives_equal_bits(problem, types, layout, kernels, fixed_order):
    check_against_cpu(problem, types, layout, "cuda", times=3)


@pytest.mark.parametrize(
    ("case", "config"), [(c, k) for c in CASES for k in c.configs], ids=lambda v: v if isinstance(v, str) else v.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fixed_order", [True], indirect=True, ids=["fixed_order"])
def test_every_configuration_in_a_fixed_order(case, config, dtype, kernels, fixed_order):
    check_configuration(case, config, dtype, "cuda")


def check_configuration(case: OpCase, config: str, dtype: torch.dtype, device: str) -> None:
    arguments = case.make(config, dtype, device)
    expected = run(case.function, convert(arguments, dtype=torch.float64, device="cpu"))
    first, second = run(case.function, arguments), run(case.function, arguments)
    for name, value in first.items():
        assert_close(value, expected[name], dtype, name)
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def test_the_setting_decides_which_kernels_run(kernels):
    check_against_cpu("c256", "bfloat16", "channels_last", "cuda")
    used = ops.kernels_used("cuda")
    # The fused ones need the tensor cores of 8.0 and up.
    fused = kernels == "fused" and torch.cuda.get_device_capability() >= (8, 0)
    for operator in ("deform_conv2d", "deform_conv2d_backward"):
        assert used[operator].startswith("fused") == fused, used


@pytest.mark.parametrize("problem", ["decoder", "internimage", "dcnv4"])
@pytest.mark.parametrize("types", TYPES)
def test_the_setting_decides_for_attention_and_aggregation_too(problem, types, kernels):
    check_against_cpu(problem, types, "NCHW", "cuda")
    used, operator = ops.kernels_used("cuda"), PROBLEMS[problem][0].name
    fused = kernels == "fused" and torch.cuda.get_device_capability() >= (8, 0) and types != "float64"
    for name in (operator, f"{operator}_backward"):
        assert used[name] == ("fused" if fused else "portable"), used


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="the fused kernels need 8.0"
)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("types", ["bfloat16-float32", "float16"])
@each_layout
@pytest.mark.parametrize("kernels", ["fused"], indirect=True, ids=["kernels_fused"])
def test_every_tile_size_equals_the_cpu(tile, types, layout, kernels):
    check_against_cpu(tile, types, layout, "cuda")
    if torch.cuda.get_device_properties(0).multi_processor_count <= 160:
        assert ops.kernels_used("cuda")["deform_conv2d"] == f"fused {tile}"


@pytest.fixture
def allow_tf32():
    """Sets torch's switch; `float32_in_full` puts it back."""
    return lambda allowed: setattr(torch.backends.cudnn, "allow_tf32", allowed)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="the fused kernels need 8.0"
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tile", TILES)
@each_layout
@pytest.mark.parametrize("kernels", ["fused"], indirect=True, ids=["kernels_fused"])
def test_tf32_is_used_where_torch_allows_it(tile, layout, compiled, kernels, allow_tf32, monkeypatch):
    """Rounded operands, a fixed order of sums; full float32 as soon as the switch says so, in graphs too."""
    arguments, _, expected = given(tile, "float32")
    on = laid_out(arguments, layout, "cuda")
    # One graph for all: the switch is looked at when it runs.
    function = torch.compile(ops.deform_conv2d, backend="aot_eager") if compiled else ops.deform_conv2d
    allow_tf32(True)
    rounded = function(**on)
    used = ops.kernels_used("cuda")["deform_conv2d"]
    assert used.startswith("fused tf32 ")
    if torch.cuda.get_device_properties(0).multi_processor_count <= 160:
        assert used == f"fused tf32 {tile}"
    error = (rounded.cpu().double() - expected["out"]).abs().max()
    assert error < 1e-3 * expected["out"].abs().max()
    assert torch.equal(function(**on), rounded)
    allow_tf32(False)
    full = function(**on)
    assert ops.kernels_used("cuda")["deform_conv2d"] == "portable"
    assert_close(full, expected["out"], torch.float32, "out")
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "portable")
    assert torch.equal(function(**on), full)


@one_of_each
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_gives_half_results_near_those_of_float32(problem, half, kernels):
    check_autocast(problem, half, "cuda")


def check_autocast(problem: str, half: torch.dtype, device: str) -> None:
    arguments, grad, expected = given(problem, "float32")
    on = leaves(laid_out(arguments, "channels_last", device))
    with torch.autocast(device, half):
        out = PROBLEMS[problem][0].function(**on)
    assert out.dtype == half
    assert_close(out, expected["out"], half)
    out.backward(grad.to(out))
    for name in (k for k in expected if k != "out"):
        value = on[name.removeprefix("grad_")].grad
        assert value.dtype == torch.float32
        assert_close(value, expected[name], half, name)


# -- graphs, streams, devices -----------------------------------------------------------------------------------------


class Slots:
    """Arguments in fixed memory, whose values can be exchanged; `run` computes from what is there."""

    def __init__(self, problem: str, types: str, device: str):
        self.problem, self.types, self.device = problem, types, device
        arguments, grad, _ = given(problem, types)
        self.arguments = laid_out({**arguments, "grad": grad}, "channels_last", device)
        self.tensors = {k: v for k, v in self.arguments.items() if isinstance(v, torch.Tensor)}
        self.grad = self.arguments.pop("grad")
        # Poison: what runs before the values are there gives NaN.
        for value in self.tensors.values():
            value.fill_(torch.nan)

    def source(self, seed: int) -> dict[str, torch.Tensor]:
        arguments, grad, _ = given(self.problem, self.types, seed)
        return {k: v.to(self.device) for k, v in {**arguments, "grad": grad}.items() if isinstance(v, torch.Tensor)}

    def fill(self, source: dict[str, torch.Tensor]) -> None:
        for name, value in source.items():
            self.tensors[name].copy_(value)

    def run(self) -> dict[str, torch.Tensor]:
        return run(PROBLEMS[self.problem][0].function, self.arguments, self.grad)

    def check(self, found: dict[str, torch.Tensor], seed: int) -> None:
        require_equal(found, given(self.problem, self.types, seed)[2], self.types, self.device)


def warm_up(slots: Slots, stream: torch.cuda.Stream) -> None:
    """Libraries create what they need at the first call on a stream, which may not be recorded and may synchronise."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slots.run()
        slots.run()
    torch.cuda.synchronize()


@one_of_each
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
def test_a_recorded_graph_computes_from_new_values(problem, types, kernels, fixed_order):
    slots, stream = Slots(problem, types, "cuda"), torch.cuda.Stream()
    warm_up(slots, stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = slots.run()
    for seed in (1, 2, 1):
        slots.fill(slots.source(seed))
        graph.replay()
        slots.check(results, seed)


@one_of_each
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
def test_everything_runs_on_the_current_stream(problem, types, kernels, fixed_order):
    slots, stream = Slots(problem, types, "cuda"), torch.cuda.Stream()
    warm_up(slots, stream)
    source = slots.source(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # About a tenth of a second in which only NaN is there for those who do not wait.
        torch.cuda._sleep(200_000_000)
        slots.fill(source)
        results = slots.run()
    stream.synchronize()
    slots.check(results, 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@one_of_each
def test_a_device_that_is_not_the_current_one(problem, kernels, fixed_order):
    assert torch.cuda.current_device() == 0
    arguments, grad, expected = given(problem, "float32")
    found = run(PROBLEMS[problem][0].function, laid_out(arguments, "NCHW", "cuda:1"), grad.to("cuda:1"))
    torch.cuda.synchronize(1)
    assert {value.device.index for value in found.values()} == {1} and torch.cuda.current_device() == 0
    require_equal(found, expected, "float32", "cuda:1")


FAILING = """
import os, sys, torch, dcn_plugin
from cases import CASES
case = CASES[int(sys.argv[1])]
arguments = case.make(case.full, torch.float32, "cuda")
case.function(**arguments)  # afterwards all memory is there, and only launches are left that can fail
try:
    torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError:
    pass
else:
    sys.exit("the device did not fail")
try:
    case.function(**arguments)
except RuntimeError as error:
    print("raised:", error, flush=True)
os._exit(0)  # what frees memory on a failed device may abort
"""


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_launch_that_fails_raises(case):
    """In a process of its own: a device that has failed stays so until its process ends."""
    paths = [Path(dcn_plugin.__file__).parents[1], Path(__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(case)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "raised: " in done.stdout, done.stdout + done.stderr[-4000:]


# -- more than 2^31 elements ------------------------------------------------------------------------------------------


@pytest.fixture
def much_memory():
    """48 GiB of the GPU's, for one process at a time of those that test side by side."""
    with open(Path(tempfile.gettempdir(), "dcn_plugin-gpu-memory.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0]
        if free < 48 * 2**30:
            pytest.skip(f"needs 48 GiB of free memory on the GPU, there are {free / 2**30:.0f}")
        yield
        torch.cuda.empty_cache()


def of_maps(image: torch.Tensor, outputs: int) -> tuple[dict, dict]:
    side = image.shape[-1]
    offset = away_from_pixels(torch.rand(1, 18, side, side, device=image.device) * 2 - 1).bfloat16()
    weight = torch.randn(outputs, image.shape[1], 3, 3, device=image.device).bfloat16() / 64
    arguments = {"input": image, "offset": offset, "weight": weight, "padding": 1}
    return arguments, {k: v[..., -CORNER:, -CORNER:] if k in ("input", "offset") else v for k, v in arguments.items()}


def of_regions(make: Callable, image: torch.Tensor, outputs: int) -> tuple[dict, dict]:
    made = make(shape=(1, image.shape[1], 1, 1), regions=3, bins=(2, 2), spatial_scale=1.0)()
    made = convert(made, dtype=torch.float32, device=image.device)
    low, high = CORNER * (0.4 + 0.1 * torch.rand(3, 2)), CORNER * (0.7 + 0.2 * torch.rand(3, 2))
    near = torch.cat([torch.zeros(3, 1), low, high], 1).to(image.device)
    far = near + torch.tensor([0.0] + [image.shape[-1] - CORNER] * 4, device=image.device)
    return {**made, "input": image, "rois": far}, {**made, "input": image[..., -CORNER:, -CORNER:], "rois": near}


def of_levels(image: torch.Tensor, outputs: int) -> tuple[dict, dict]:
    """The image's pixels as rows, with heads of 64 channels, read in the last corner."""
    side, heads = image.shape[-1], image.shape[1] // 64
    made = ms_deform_attn_arguments((1, heads, 64), ((CORNER, CORNER),), 50, 4, spread=0)()
    made = convert(made, dtype=torch.float32, device=image.device)
    pixels = made["sampling_locations"] * CORNER + (side - CORNER)
    value = image.permute(0, 2, 3, 1)
    far = {**made, "value": value.flatten(1, 2).unflatten(2, (heads, 64)), "spatial_shapes": [(side, side)]}
    corner = value[:, -CORNER:, -CORNER:].flatten(1, 2).unflatten(2, (heads, 64))
    return {**far, "sampling_locations": pixels / side}, {**made, "value": corner}


def of_pixels(image: torch.Tensor, outputs: int) -> tuple[dict, dict]:
    """The image channels-last, in groups of 64 channels."""
    value, groups = image.permute(0, 2, 3, 1), image.shape[1] // 64
    offset = away_from_pixels(torch.rand(*value.shape[:3], groups, 9, 2, device=image.device) * 2 - 1).bfloat16()
    arguments = {"value": value, "offset": offset}
    return arguments, {k: v[:, -CORNER:, -CORNER:] for k, v in arguments.items()}


# Name of an operator -> arguments for a large image, and those for its corner alone, from the image and outputs.
LARGE = {
    "deform_aggregate2d": of_pixels,
    "deform_conv2d": of_maps,
    "deform_roi_pool": partial(of_regions, partial(deform_roi_pool_arguments, spread=0.5)),
    "deform_ps_roi_pool": partial(
        of_regions, partial(deform_ps_roi_pool_arguments, spread=0.5, output_dim=64, group_size=2)
    ),
    "ps_roi_pool": partial(of_regions, partial(ps_roi_pool_arguments, output_dim=64, group_size=2)),
    "ms_deform_attn": of_levels,
}


@each_layout
@pytest.mark.parametrize("what", ["output", *LARGE])
def test_more_than_2_to_the_31_elements(what, layout, kernels, much_memory):
    check_far_corner(what, layout, "cuda", SIDE)


def check_far_corner(what: str, layout: str, device: str, side: int) -> None:
    """The last rows and columns of a large map, in value and gradient, against the CPU's on that corner alone."""
    torch.manual_seed(0)
    case = BY_NAME.get(what, CONV)
    channels, outputs = (64, 256) if what == "output" else (256, 32)
    image = torch.empty(
        (1, channels, side, side), dtype=torch.bfloat16, device=device, memory_format=LAYOUTS[layout]
    ).normal_()
    arguments, corner = LARGE[case.name](image, outputs)
    truth = leaves(convert(corner, dtype=torch.float64, device="cpu"))
    expected = case.function(**truth)
    on = {
        k: v.detach().requires_grad_(k == case.image) if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }
    out = case.function(**on)
    grad = torch.zeros_like(out)
    # Of a map only what does not reach over the corner's inner edges.
    inner = slice(-CORNER // 2, None)
    last = {
        "deform_conv2d": (..., inner, inner),
        "output": (..., inner, inner),
        "deform_aggregate2d": (..., inner, inner, slice(None)),
    }.get(what, (...,))
    grad[last] = torch.randn(expected[last].shape).to(grad)
    assert_close(out[last], expected[last], torch.bfloat16, "out")
    (found,) = torch.autograd.grad(out, [on[case.image]], grad)
    del out
    probe = torch.zeros_like(expected)
    probe[last] = grad[last].double().cpu()
    (wanted,) = torch.autograd.grad(expected, [truth[case.image]], probe)
    if what == "ms_deform_attn":  # rows of pixels: as a map again
        found, wanted = (g.unflatten(1, (s, s)).flatten(3) for g, s in ((found, side), (wanted, CORNER)))
    if not case.of_images:
        found, wanted = found.movedim(3, 1), wanted.movedim(3, 1)
    assert_close(found[..., -CORNER:, -CORNER:], wanted, torch.bfloat16, "grad_input")
    assert not found[..., :-CORNER, :].any() and not found[..., :-CORNER].any()
