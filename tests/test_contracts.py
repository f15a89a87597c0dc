"""What every operator promises, for every operator: each contract runs over all cases, devices and code paths."""

import pytest
import torch
from cases import CASES, CONSTANT, OpCase, assert_close, convert, leaves, run, tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_config = pytest.mark.parametrize(
    ("case", "config"), [(c, k) for c in CASES for k in c.configs], ids=lambda v: v if isinstance(v, str) else v.name
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def channels_last(arguments: dict, names: tuple[str, ...]) -> dict:
    return {k: v.contiguous(memory_format=torch.channels_last) if k in names else v for k, v in arguments.items()}


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "all_channels_last"])
@each_config
def test_value_and_gradients_equal_the_reference(case: OpCase, config, layout, dtype, device):
    arguments = case.make(config, dtype, device)
    truth = convert(arguments, dtype=torch.float64, device="cpu")
    if layout != "contiguous":
        images = [k for k, v in tensors(arguments).items() if v.dim() == 4] if "all" in layout else [case.image]
        arguments = channels_last(arguments, tuple(images))
    grad = torch.randn(case.reference(**truth).shape, dtype=torch.float64).to(dtype)
    expected = run(case.reference, truth, grad)
    actual = run(case.function, arguments, grad.to(device))
    for name, value in actual.items():
        assert value.dtype == dtype and value.device.type == device
        assert_close(value, expected[name], dtype, name)


@each_config
def test_any_thread_count_gives_the_reference_and_equal_bits_from_run_to_run(case: OpCase, config, threads):
    arguments = case.make(config, torch.float32)
    first, second = run(case.function, arguments), run(case.function, arguments)
    expected = run(case.reference, convert(arguments, dtype=torch.float64))
    for name, value in first.items():
        assert_close(value, expected[name], torch.float32, name)
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


@each_config
def test_gradients_equal_finite_differences(case: OpCase, config, device):
    # Positions near whole pixels are moved away: bilinear interpolation has a kink there.
    arguments = case.make(config, device=device)
    if "offset" in arguments:
        fraction = arguments["offset"] - arguments["offset"].floor()
        arguments["offset"] = arguments["offset"].floor() + 0.1 + 0.8 * fraction
    arguments = leaves(arguments)
    names, values = list(tensors(arguments)), list(tensors(arguments).values())
    assert torch.autograd.gradcheck(
        lambda *t: case.function(**{**arguments, **dict(zip(names, t, strict=True))}), values, fast_mode=True,
        nondet_tol=1e-10,  # the bodies of CUDA add atomically, on the CPU too; another test is about equal bits
    )  # fmt: skip


@each_case
def test_second_gradients_equal_finite_differences(case: OpCase):
    arguments = leaves(case.make(case.mixed))
    names, values = list(tensors(arguments)), list(tensors(arguments).values())
    assert torch.autograd.gradgradcheck(
        lambda *t: case.function(**{**arguments, **dict(zip(names, t, strict=True))}), values, fast_mode=True
    )


@each_case
def test_function_transforms(case: OpCase):
    """Forward mode, grad, per-sample gradients and vmap: never a silent zero."""
    arguments = case.make(case.mixed)
    names, values = list(tensors(arguments)), tuple(tensors(arguments).values())

    def call(function, *given: torch.Tensor) -> torch.Tensor:
        return function(**{**arguments, **dict(zip(names, given, strict=True))})

    directions = tuple(torch.randn_like(v) for v in values)
    step = 1e-6
    ahead, behind = (
        call(case.reference, *(v + s * d for v, d in zip(values, directions, strict=True))) for s in (step, -step)
    )
    _, tangent = torch.func.jvp(lambda *v: call(case.function, *v), values, directions)
    assert (tangent - (ahead - behind) / (2 * step)).abs().max() < 1e-6 * tangent.abs().max()
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(v, d) for v, d in zip(values, directions, strict=True)]
        out = torch.autograd.forward_ad.unpack_dual(call(case.function, *dual))
    assert_close(out.tangent, tangent, torch.float64)

    everything = tuple(range(len(values)))
    expected = run(case.function, arguments)
    grads = torch.func.grad(lambda *v: call(case.function, *v).sum(), argnums=everything)(*values)
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, expected[f"grad_{name}"], torch.float64, name)

    batch = tuple(torch.stack([v, v + 0.1]) for v in values)
    mapped = torch.func.vmap(lambda *v: call(case.function, *v))(*batch)
    per_sample = torch.func.vmap(torch.func.grad(lambda *v: call(case.function, *v).sum()))(*batch)
    for i in (0, 1):
        one = {**arguments, **dict(zip(names, (v[i] for v in batch), strict=True))}
        assert_close(mapped[i], case.function(**one), torch.float64)
        assert_close(per_sample[i], run(case.function, one)[f"grad_{names[0]}"], torch.float64)


@each_config
def test_each_gradient_only_when_asked(case: OpCase, config, device):
    arguments = case.make(config, device=device)
    every = run(case.function, arguments)
    for name in tensors(arguments):
        alone = {
            k: v.detach().requires_grad_(k == name) if k in tensors(arguments) else v for k, v in arguments.items()
        }
        (grad,) = torch.autograd.grad(case.function(**alone).sum(), [alone[name]])
        assert_close(grad, every[f"grad_{name}"], torch.float64, name)


@each_case
def test_backward_keeps_nothing_but_inputs(case: OpCase, device):
    arguments = leaves(case.make(case.full, device=device))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.function(**arguments)
    inputs = {v.data_ptr() for v in arguments.values() if isinstance(v, torch.Tensor)}
    assert kept and {t.data_ptr() for t in kept} <= inputs
    with torch.no_grad():
        assert not case.function(**arguments).requires_grad


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_of_the_image_is_kept(case: OpCase, config, dtype, device):
    arguments = case.make(config, dtype, device)
    image = arguments[case.image]
    if not case.of_images:
        # What lies like an image by accident makes no image of the results.
        for given in (arguments, channels_last(arguments, (case.image,))):
            assert all(value.is_contiguous() for value in run(case.function, given).values())
        return
    if image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last):
        return  # one channel, or one pixel: both layouts are the same memory
    out = run(case.function, arguments)
    assert out["out"].is_contiguous() and out[f"grad_{case.image}"].is_contiguous()
    out = run(case.function, channels_last(arguments, (case.image,)))
    assert out[f"grad_{case.image}"].is_contiguous(memory_format=torch.channels_last)
    assert out["out"].is_contiguous(memory_format=torch.channels_last)


@each_case
def test_any_strides_give_the_same(case: OpCase, device):
    arguments = case.make(case.full, device=device)
    expected = run(case.function, arguments)

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full([2 * s for s in t.shape], torch.nan, dtype=t.dtype, device=t.device)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    for change in (spread, lambda t: spread(t.mT).mT if t.dim() > 1 else t):
        strided = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        for name, value in run(case.function, strided).items():
            assert_close(value, expected[name], torch.float64, name)


@each_case
def test_expanded_arguments(case: OpCase, device):
    arguments = case.make(case.full, device=device)
    one = {k: v[:1].contiguous() if k in case.per_result else v for k, v in arguments.items()}
    many = {k: v.expand(3, *v.shape[1:]) if k in case.per_result else v for k, v in one.items()}
    out = case.function(**one)
    assert_close(case.function(**many), out.expand(3, *[-1] * (out.dim() - 1)), torch.float64)


@each_case
def test_empty_batch(case: OpCase, device):
    arguments = case.make(case.mixed, torch.float32, device)
    empty = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    result = run(case.function, empty)
    assert result["out"].shape[0] == 0 and result["out"].shape[1:] == case.function(**arguments).shape[1:]
    for name, value in tensors(empty).items():
        assert result[f"grad_{name}"].shape == value.shape
        assert not result[f"grad_{name}"].any()


def some_wide(case: OpCase) -> list[tuple[str, ...]]:
    """Each argument that may be float32 beside half values alone, and all of them."""
    names = [name for name in case.float32_beside_half if name not in CONSTANT]
    return [*((name,) for name in names), tuple(names)]


@pytest.mark.parametrize(
    ("case", "wide"),
    [(c, w) for c in CASES for w in some_wide(c)],
    ids=lambda v: getattr(v, "name", None) or "+".join(v),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_positions_beside_half_values(case: OpCase, dtype, wide, device):
    arguments = case.make(case.mixed, dtype, device)
    wide_names = wide
    mixed = {k: v.float() if k in wide_names else v for k, v in arguments.items()}
    expected = run(case.reference, convert(mixed, dtype=torch.float64, device="cpu"))
    for name, value in run(case.function, mixed).items():
        assert value.dtype == (torch.float32 if name.removeprefix("grad_") in wide_names else dtype)
        assert_close(value, expected[name], dtype, name)


@each_config
def test_opcheck(case: OpCase, config, device):
    for layout in ("contiguous", "channels_last"):
        arguments = case.make(config, torch.float32, device)
        if layout == "channels_last":
            arguments = channels_last(arguments, (case.image,))
        assert set(opcheck(case.op, tuple(case.to_op(**leaves(arguments)).values())).values()) == {"SUCCESS"}


@each_config
@pytest.mark.parametrize("image_layout", ["contiguous", "channels_last"])
def test_fake_results_have_the_strides_of_real_ones(case: OpCase, config, image_layout, device):
    arguments = case.make(config, torch.float32, device)
    if image_layout == "channels_last":
        arguments = channels_last(arguments, (case.image,))
    real = case.function(**arguments)
    meta = case.function(**convert(arguments, device="meta"))
    assert meta.shape == real.shape and meta.stride() == real.stride() and meta.dtype == real.dtype


@each_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(case: OpCase, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=dynamic)
    for config, seed in ((case.full, 0), (case.full, 1), (case.mixed, 2)):
        arguments = case.make(config, torch.float32, device, seed)
        expected = run(case.function, arguments)
        for name, value in run(compiled, arguments).items():
            assert_close(value, expected[name], torch.float32, name)


@each_case
def test_one_dynamic_graph_serves_other_sizes(case: OpCase):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for make in case.sizes:  # no two sizes equal: dynamo would tie them
        arguments = make()
        assert_close(compiled(**arguments), case.reference(**arguments), torch.float64)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and set(counts) == {counts[0]}  # the first call may count twice: it settles on constants


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_half_with_float32_positions(case: OpCase, half, device):
    arguments = leaves(case.make(case.mixed, torch.float32, device))
    seen = {}
    with torch.autocast(device, half):
        out = case.function(**arguments)
    assert out.dtype == half
    out.float().sum().backward()
    rounded = {
        k: v.detach().to(half).double() if isinstance(v, torch.Tensor) and k not in case.float32_beside_half else v
        for k, v in arguments.items()
    }
    expected = run(case.reference, convert(rounded, dtype=torch.float64, device="cpu"))
    assert_close(out, expected["out"], half, "out")
    for name, value in tensors(arguments).items():
        seen[name] = value.grad.dtype
        assert_close(value.grad, expected[f"grad_{name}"], half, name)
    assert set(seen.values()) == {torch.float32}
    with torch.autocast(device, half):  # float64 is left alone, as torch leaves it
        assert case.function(**case.make(case.bare, torch.float64, device)).dtype == torch.float64
