"""What is particular to deformable convolution: other implementations, borders, values that are not finite, errors."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, assert_close, convert, deform_conv2d_arguments, run
from conftest import PORTABLE, TUNED, cpu_kernels

from dcn_plugin import reference
from dcn_plugin.ops import deform_conv2d
from dcn_plugin.ops._operator import WANTED

CASE = next(c for c in CASES if c.name == "deform_conv2d")
EVERYTHING = sum(WANTED.values())
TORCHVISION = [k for k in CASE.configs if k != "four_sided"]


@pytest.mark.parametrize("config", TORCHVISION)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torchvision(config, dtype, device):
    torchvision = pytest.importorskip("torchvision")
    arguments = CASE.make(config, dtype, device)
    expected = run(torchvision.ops.deform_conv2d, arguments)
    for name, value in run(deform_conv2d, arguments).items():
        assert_close(value, expected[name], dtype, name)


@pytest.mark.parametrize("config", ["v1", "groups", "rectangular", "depthwise"])
def test_without_displacement_it_is_a_convolution(config, device):
    arguments = CASE.make(config, device=device)
    arguments["offset"].zero_()
    if "mask" in arguments:
        arguments["mask"].fill_(1)
    groups = arguments["input"].shape[1] // arguments["weight"].shape[1]
    geometry = {k: arguments[k] for k in ("stride", "padding", "dilation")}
    expected = F.conv2d(arguments["input"], arguments["weight"], arguments.get("bias"), groups=groups, **geometry)
    assert_close(deform_conv2d(**arguments), expected, torch.float64)


def point(y: float, x: float, device: str, size: int = 4, **kwargs) -> dict:
    """One 1x1 tap on a size x size map, read at (y, x)."""
    offset = torch.tensor([y, x], dtype=torch.float64).reshape(1, 2, 1, 1)
    image = torch.arange(1.0, 1 + size * size, dtype=torch.float64).reshape(1, 1, size, size)
    arguments = {"input": image, "offset": offset, "weight": torch.ones(1, 1, 1, 1, dtype=torch.float64)}
    return {**{k: v.to(device) for k, v in arguments.items()}, "stride": size, **kwargs}


@pytest.mark.parametrize("y", [-1.0, 4.0, -1.5, 4.5, 1e30, -1e30, float("inf"), float("-inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_outside_gives_zero_value_and_zero_gradients(y, axis, device):
    position = [1.0, 1.0]
    position[axis] = y
    result = run(deform_conv2d, point(*position, device))
    for name in ("out", "grad_input", "grad_offset", "grad_weight"):
        assert not result[name].any(), name


@pytest.mark.parametrize(("y", "value"), [(-0.75, 0.25), (3.75, 13 * 0.25), (-1 + 1e-9, 1e-9), (0.0, 1.0), (3.0, 13.0)])
def test_within_one_pixel_of_the_edge_it_interpolates_with_zeros(y, value, device):
    assert_close(deform_conv2d(**point(y, 0.0, device)), torch.full((1, 1, 1, 1), value).double(), torch.float64)


def test_nan_positions_show_where_they_are_read_and_nowhere_else(device):
    arguments = CASE.make("v2", device=device)
    arguments["offset"][0, 4, 2, 3] = torch.nan
    out = deform_conv2d(**arguments)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, :, 2, 3] = True
    assert torch.equal(out.isnan(), expected)
    actual, truth = run(deform_conv2d, arguments), run(reference.deform_conv2d, arguments)
    assert_close(actual["grad_input"], truth["grad_input"], torch.float64)
    assert torch.equal(actual["grad_offset"].isnan(), truth["grad_offset"].isnan())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_reach_only_the_samples_that_read_them(bad, device):
    arguments = CASE.make("v1", device=device)
    arguments["input"][0, 1, 3, 4] = bad
    arguments["offset"].zero_()  # whole positions: neighbours have weight 0 and are not read
    actual = deform_conv2d(**arguments)
    expected = F.conv2d(arguments["input"], arguments["weight"], padding=1)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    arguments = CASE.make("v1", device=device)
    arguments["input"][0, 1, 3, 4] = bad
    actual, expected = run(deform_conv2d, arguments), run(reference.deform_conv2d, arguments)
    assert torch.equal(actual["out"].isfinite(), expected["out"].isfinite())
    assert torch.equal(actual["grad_weight"].isfinite(), expected["grad_weight"].isfinite())
    assert_close(actual["grad_input"], expected["grad_input"], torch.float64)


def test_hostile_positions_never_read_out_of_bounds(device):
    arguments = CASE.make("groups", torch.float32, device)
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, 2.0**63, -(2.0**63), 1e-45, -0.0])
    picked = torch.randint(len(hostile), arguments["offset"].shape, generator=torch.Generator().manual_seed(0))
    arguments["offset"] = hostile[picked].to(device)
    actual, expected = run(deform_conv2d, arguments), run(reference.deform_conv2d, arguments)
    for name in ("out", "grad_input", "grad_bias"):
        assert_close(actual[name], expected[name], torch.float32, name)


@pytest.mark.parametrize("kernels", [PORTABLE, TUNED])
def test_more_than_2_to_the_31_elements(kernels):
    # Untouched pages cost nothing: only what is written and read becomes real memory.
    side = 46400
    image = torch.empty(1, 1, side, side)
    assert image.numel() > 2**31
    stride = side - 2
    for y in range(2):
        for x in range(2):
            image[0, 0, y * stride : y * stride + 2, x * stride : x * stride + 2] = 1.0 + 2 * y + x
    arguments = dict(offset=torch.full((1, 2, 2, 2), 0.5), weight=torch.ones(1, 1, 1, 1), stride=stride)
    with cpu_kernels(kernels):
        out = deform_conv2d(image, **arguments)
    assert torch.equal(out, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))


def test_image_chunks_do_not_show():
    # More images than are held in rows at a time (16 MiB): NCHW is copied to rows, channels_last is read in place.
    arguments = deform_conv2d_arguments((5, 64, 160, 160), out=2, padding=0, stride=16, spread=3.0)()
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    whole = run(deform_conv2d, arguments)
    direct = run(
        deform_conv2d, {**arguments, "input": arguments["input"].contiguous(memory_format=torch.channels_last)}
    )
    for name, value in whole.items():
        assert_close(value, direct[name], torch.float32, name)
    for i in range(5):
        one = {k: v[i : i + 1] if k in ("input", "offset", "mask") else v for k, v in arguments.items()}
        assert_close(whole["out"][i : i + 1], deform_conv2d(**one), torch.float32)


def good() -> dict:
    return CASE.make("v2", torch.float32)


# What Python refuses with a message (errors/table_ops.py), as far as torch lets it through to the compiled operator.
BAD = [
    ("input", lambda a: a["input"][0]),
    ("input", lambda a: a["input"].long()),
    ("input", lambda a: a["input"].numpy()),
    ("input", lambda a: a["input"][:, :3]),
    ("input", lambda a: a["input"][:, :, :0]),
    ("input", lambda a: a["offset"]),
    ("offset", lambda a: a["mask"]),
    ("offset", lambda a: a["offset"][..., 1:]),
    ("offset", lambda a: a["offset"][:1]),
    ("offset", lambda a: a["offset"].repeat(1, 3, 1, 1)),
    ("offset", lambda a: a["offset"].double()),
    ("offset", lambda a: a["offset"].half()),
    ("offset", lambda a: a["offset"].to("meta")),
    ("offset", lambda a: None),
    ("weight", lambda a: a["weight"][:, :3]),
    ("weight", lambda a: a["weight"][:, :2][:5]),
    ("weight", lambda a: a["weight"].double()),
    ("weight", lambda a: a["weight"][0]),
    ("weight", lambda a: a["weight"][:0]),
    ("bias", lambda a: a["bias"][:5]),
    ("bias", lambda a: a["bias"][None]),
    ("mask", lambda a: a["offset"]),
    ("mask", lambda a: a["mask"].bool()),
    ("mask", lambda a: a["mask"].double()),
    ("stride", lambda a: (0, 0)),
    ("stride", lambda a: (1, 2, 3)),
    ("dilation", lambda a: (1, 0)),
    ("dilation", lambda a: (9, 9)),
    ("padding", lambda a: (-1, -1, -1, -1)),
    ("padding", lambda a: (1, 1, 1)),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_the_compiled_operators_protect_memory_by_themselves(name, change):
    """Callers from C++ or exported graphs skip the Python checks; forward and backward name the operator then."""
    arguments = good()
    grad = torch.ones_like(deform_conv2d(**arguments))
    bad = {name: change(arguments)}
    with pytest.raises((RuntimeError, ValueError), match="deform_conv2d|expected to be on cpu"):
        CASE.op(*(CASE.to_op(**arguments) | bad).values())
    if name != "bias":  # the backward has none
        with pytest.raises((RuntimeError, ValueError), match="deform_conv2d|expected to be on cpu"):
            CASE.backward_op(*(CASE.to_backward(grad, EVERYTHING, **arguments) | bad).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[0], "expected shape"),
        (lambda g: g[:1], "expected shape"),
        (lambda g: g[..., 1:], "expected shape"),
        (lambda g: g.double(), "expected Float like input, got Double"),
    ],
)
def test_the_compiled_backward_checks_the_gradient_it_is_given(change, message):
    grad = torch.ones_like(deform_conv2d(**good()))
    with pytest.raises(RuntimeError, match=f"grad_output: {message}"):
        CASE.backward_op(*CASE.to_backward(change(grad), EVERYTHING, **good()).values())


def test_deterministic_mode_gives_equal_bits(device, monkeypatch):
    # Without it, torch's own products of matrices on CUDA raise in that mode.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = CASE.make("many_tiles", torch.float32, device)
    expected = run(reference.deform_conv2d, convert(arguments, dtype=torch.float64, device="cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (run(deform_conv2d, arguments) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert_close(value, expected[name], torch.float32, name)
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = good()
    with FlopCounterMode(display=False) as counter:
        deform_conv2d(**arguments)
    n, c, h, w = arguments["input"].shape
    assert counter.get_total_flops() == 2 * n * h * w * 9 * (6 * c + 4 * c)


def test_overlapping_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    problems = [CASE.make(config, torch.float32, seed=i) for i, config in enumerate(["v2", "groups", "depthwise"] * 4)]
    expected = [run(deform_conv2d, p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda p: run(deform_conv2d, p), problems))
    for a, e in zip(actual, expected, strict=True):
        for name in a:
            assert_close(a[name], e[name], torch.float32, name)
