"""Operators and layers under what PyTorch does to functions and modules: vmap, derivatives, copies, graphs, export."""

import copy
import io
import itertools
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import timm
import torch
from cases import CASES, OpCase, assert_close, convert, leaves, run, tensors
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dcn_plugin.layers import DCNv1, DCNv2, DeformPSRoIPoolPack, DeformRoIPoolPack, ModulatedDeformRoIPoolPack

SAMPLES = 3
# "There is a performance drop": torch's fallback, sample by sample.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_config = pytest.mark.parametrize(
    ("case", "config"), [(c, k) for c in CASES for k in c.configs], ids=lambda v: v if isinstance(v, str) else v.name
)


def names_of(arguments: dict) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]


def batch_of(arguments: dict, names, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    """Different values of these arguments for each sample; regions move within their image."""
    batch = {}
    for name in names:
        value = torch.stack([arguments[name]] * samples)
        step = torch.arange(samples).to(value).view(-1, *[1] * (value.dim() - 1))
        if name == "rois":
            value[..., 1:] += step
        else:
            value += 0.1 * step * torch.randn_like(value)
        batch[name] = value
    return batch


def mapped(function, arguments: dict, names, in_dims=0):
    """vmap of the function of the arguments that ``names`` are."""
    return torch.func.vmap(lambda *t: function(**{**arguments, **dict(zip(names, t, strict=True))}), in_dims)


def sample(arguments: dict, batch: dict[str, torch.Tensor], i: int) -> dict:
    return {**arguments, **{name: value[i] for name, value in batch.items()}}


@each_config
def test_vmap_equals_a_loop_for_each_batched_argument_and_all(case: OpCase, config, device):
    arguments = case.make(config, device=device)
    names = names_of(arguments)
    for chosen in [*((n,) for n in names), tuple(names)]:
        batch = batch_of(arguments, chosen)
        dims = tuple(i % batch[name].dim() for i, name in enumerate(chosen))
        moved = [value.movedim(0, d) for value, d in zip(batch.values(), dims, strict=True)]
        expected = [case.reference(**sample(arguments, batch, i)) for i in range(SAMPLES)]
        assert_close(
            mapped(case.function, arguments, chosen, dims)(*moved), torch.stack(expected), torch.float64, str(chosen)
        )


@each_config
def test_gradients_through_vmap_equal_a_loop(case: OpCase, config, device):
    arguments = case.make(config, device=device)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    wanted = {n: v.requires_grad_() for n, v in batch.items() if n in tensors(arguments)}
    out = mapped(case.function, arguments, names)(*batch.values())
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    for i in range(SAMPLES):
        expected = run(case.reference, sample(arguments, batch, i), grad[i])
        for name, value in zip(wanted, found, strict=True):
            assert_close(value[i], expected[f"grad_{name}"], torch.float64, name)


@each_config
def test_batched_gradients_of_the_result(case: OpCase, config, device):
    """The backward's rule, for each gradient alone (others are then not computed) and for all."""
    arguments = leaves(case.make(config, device=device))
    wanted = tensors(arguments)
    out, truth = case.function(**arguments), case.reference(**arguments)
    grads = torch.randn(SAMPLES, *out.shape, dtype=out.dtype)
    for chosen in [*([n] for n in wanted), list(wanted)]:
        targets = [wanted[n] for n in chosen]
        found = torch.autograd.grad(out, targets, grads, is_grads_batched=True, retain_graph=True)
        for i in range(SAMPLES):
            expected = torch.autograd.grad(truth, targets, grads[i], retain_graph=True)
            for name, value, one in zip(chosen, found, expected, strict=True):
                assert_close(value[i], one, torch.float64, name)


@each_case
def test_backward_operator_maps_over_any_argument(case: OpCase, device):
    arguments = case.make(case.mixed, device=device)
    wanted = tensors(arguments)
    count = 4 if case.op == "deform_conv2d" else len(wanted)
    grad = torch.randn_like(case.function(**arguments))

    def backward(grad_output, **given):
        values = case.to_op(**{k: v for k, v in given.items() if k != "bias"})
        if case.op == "deform_conv2d":
            values = (*values[:3], *values[4:])  # its backward takes no bias
        needs = sum(1 << i for i in range(count))
        return getattr(torch.ops.dcn_plugin, f"{case.op}_backward")(grad_output, *values, needs)

    every = {"grad_output": grad, **arguments}
    for name in names_of(every):
        if name == "bias":
            continue
        batch = batch_of(every, [name])
        found = mapped(backward, every, [name])(*batch.values())
        for i in range(SAMPLES):
            expected = backward(**sample(every, batch, i))
            for left, right in zip(*((v,) if count == 1 else v for v in (found, expected)), strict=True):
                assert_close(left[i], right, torch.float64, name)


@each_case
def test_nested_vmap(case: OpCase):
    arguments = case.make(case.mixed)
    names = names_of(arguments)
    for outer, inner in itertools.permutations(names, 2):
        first, second = batch_of(arguments, [outer], 2), batch_of(arguments, [inner])
        call = mapped(case.function, arguments, [outer, inner], (None, 0))
        found = torch.func.vmap(call, (0, None))(first[outer], second[inner])
        for i, j in itertools.product(range(2), range(SAMPLES)):
            one = sample(sample(arguments, first, i), second, j)
            assert_close(found[i, j], case.reference(**one), torch.float64, f"{outer}, {inner}")
    batch = batch_of(arguments, names, 6)
    twice = torch.func.vmap(mapped(case.function, arguments, names))
    found = twice(*(value.unflatten(0, (2, 3)) for value in batch.values()))
    assert_close(found.flatten(0, 1), mapped(case.function, arguments, names)(*batch.values()), torch.float64)


@each_case
@pytest.mark.parametrize("config", ["full", "bare"])
def test_no_samples_and_samples_without_images(case: OpCase, config):
    arguments = leaves(case.make(getattr(case, config)))
    out, names = case.function(**arguments), names_of(arguments)
    for chosen in [*((n,) for n in names), tuple(names)]:
        none = [arguments[n].detach()[None][:0].requires_grad_(n in tensors(arguments)) for n in chosen]
        found = mapped(case.function, arguments, chosen)(*none)
        assert found.shape == (0, *out.shape)
        # They are in the graph: a training loop does not stop at an empty batch.
        for value in none:
            if value.requires_grad:
                assert torch.autograd.grad(found.sum(), value, retain_graph=True)[0].shape == value.shape
    wanted = list(tensors(arguments).values())
    grads = torch.func.vmap(lambda g: torch.autograd.grad(out, wanted, g))(torch.empty(0, *out.shape).to(out))
    assert [g.shape for g in grads] == [(0, *v.shape) for v in wanted]
    empty = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    batch = {n: torch.stack([empty[n]] * SAMPLES) for n in names}
    assert mapped(case.function, empty, names)(*batch.values()).shape == (SAMPLES, 0, *out.shape[1:])


@each_case
def test_mapped_calls_compile_whole(case: OpCase):
    arguments = case.make(case.mixed)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    call = mapped(case.function, arguments, names)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*batch.values()), call(*batch.values()), torch.float64)


@each_case
def test_compiled_forward_mode_gives_the_tangents(case: OpCase):
    """Tracing keeps the tangents, which the compiled operator alone would drop without a word."""
    arguments = case.make(case.full)
    image = arguments.pop(case.image)

    def derivative(value):
        call = lambda v: case.function(**{case.image: v}, **arguments)  # noqa: E731
        return torch.func.jvp(call, (value,), (torch.ones_like(value),))[1]

    expected = derivative(image)
    torch._dynamo.reset()
    found = torch.compile(derivative, backend="aot_eager")(image)
    assert expected.any()
    torch.testing.assert_close(found, expected)


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vmap_under_autocast(case: OpCase, half, device):
    arguments = case.make(case.mixed, torch.float32, device)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    with torch.autocast(device, half):
        found = mapped(case.function, arguments, names)(*batch.values())
        expected = [case.function(**sample(arguments, batch, i)) for i in range(SAMPLES)]
    assert found.dtype == half
    assert_close(found, torch.stack(expected), half)


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vmap_in_half_precision(case: OpCase, half, device):
    """More images than half precision can number: 300 is no bfloat16, 3000 no float16."""
    arguments = case.make(case.mixed, half, device)
    names = names_of(arguments)
    samples = 300 if half == torch.bfloat16 else 1500
    batch = {n: v.expand(samples, *v.shape[1:]) for n, v in batch_of(arguments, names, 1).items()}
    batch["input"] = batch["input"] * torch.linspace(0.5, 2, samples).to(half).view(-1, 1, 1, 1, 1).to(device)
    found = mapped(case.function, arguments, names)(*batch.values())
    assert found.dtype == half
    for i in (0, samples // 2 + 1, samples - 1):
        expected = case.reference(**convert(sample(arguments, batch, i), dtype=torch.float64, device="cpu"))
        assert_close(found[i], expected, half)


@pytest.mark.parametrize("case", [c for c in CASES if "rois" in c.per_result], ids=lambda c: c.name)
@pytest.mark.parametrize("chosen", [("input",), ("rois",), ("input", "rois")], ids="+".join)
def test_regions_that_name_no_image_stay_invalid(case: OpCase, chosen, device):
    """Shifted into the images of all samples, they would name one of a neighbour."""
    arguments = case.make(case.full, device=device)
    images = arguments["input"].shape[0]
    # 1e-17 is no whole number, but added to that of an image it would be.
    wrong = torch.tensor([-1.0, images, 0.5, torch.nan, 1e-17]).to(arguments["rois"])
    arguments["rois"][: len(wrong), 0] = wrong
    arguments["rois"][len(wrong) :, 0] = images - 1
    batch = batch_of(arguments, chosen)
    batch["input"] = batch.get("input", torch.stack([arguments["input"]] * SAMPLES)).requires_grad_()
    names = tuple(batch)
    found = mapped(case.function, arguments, names)(*batch.values())
    assert found[:, : len(wrong)].isnan().all()
    op = getattr(torch.ops.dcn_plugin, case.op)
    for i in range(SAMPLES):
        alone = op(*case.to_op(**sample(arguments, batch, i)))
        assert_close(found[i], alone, torch.float64)
        assert not found[i, len(wrong) :].isnan().any()
    (grad,) = torch.autograd.grad(found[:, len(wrong) :].sum(), batch["input"], retain_graph=True)
    (all_of_it,) = torch.autograd.grad(found.sum(), batch["input"])
    assert torch.equal(grad, all_of_it) and grad[:, images - 1].any() and not grad[:, : images - 1].any()


@each_case
def test_jacobians_and_hessians(case: OpCase):
    """By torch.func (the reference) and by batched gradients of the kernel, of first and second order."""
    arguments = case.make(case.mixed)

    def scaled(function, name):
        def call(factor):
            return function(**{**arguments, name: arguments[name] * factor}).square().mean((-1, -2))

        return call

    for name, value in tensors(arguments).items():
        factor = (
            torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype) if name != "bias" else torch.ones_like(value)
        )
        expected = torch.autograd.functional.jacobian(scaled(case.reference, name), factor)
        ours = scaled(case.function, name)
        for found in (
            torch.func.jacrev(ours)(factor),
            torch.func.jacfwd(ours)(factor),
            torch.autograd.functional.jacobian(ours, factor, vectorize=True),
        ):
            assert_close(found, expected, torch.float64, name)
        expected = torch.autograd.functional.hessian(lambda f, n=name: scaled(case.reference, n)(f).sum(), factor)
        found = torch.autograd.functional.hessian(lambda f, g=ours: g(f).sum(), factor, vectorize=True)
        assert_close(found, expected, torch.float64, name)


# Layers: each is made with the arguments it is called with.


def _image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 8, 9)


def _rois() -> torch.Tensor:
    return torch.tensor([[0, 2.0, 3.0, 12.0, 11.0], [1, 0.0, 1.0, 9.5, 15.0], [0, 4.5, 2.5, 6.0, 14.0]])


LAYERS = {
    "DCNv1": lambda: (DCNv1(4, 6, 3, padding=1, offset_groups=2), (_image(4),)),
    "DCNv2": lambda: (DCNv2(4, 6, 3, padding=1, groups=2), (_image(4),)),
    "DeformRoIPoolPack": lambda: (DeformRoIPoolPack((2, 3), 8, 16, 0.5, 2), (_image(8), _rois())),
    "ModulatedDeformRoIPoolPack": lambda: (ModulatedDeformRoIPoolPack((2, 3), 8, 16, 0.5, 2), (_image(8), _rois())),
    "DeformPSRoIPoolPack": lambda: (
        DeformPSRoIPoolPack(2, 2, (2, 3), 0.5, deform_fc_channels=16, modulated=True), (_image(8), _rois())
    ),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The layer, with samples that have moved, and its arguments."""
    torch.manual_seed(0)
    layer, inputs = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.to(dtype), tuple(t.to(dtype) for t in inputs)


@each_layer
def test_gradient_penalty_trains(name):
    """Second gradients through a layer, by every parameter, against a finite difference of the penalty."""
    layer, (image, *rest) = make_layer(name)
    parameters = list(layer.parameters())

    def penalty():
        x = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer(x, *rest).square().sum(), x, create_graph=True)
        return slope.square().sum()

    grads = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    step = 1e-6
    for parameter, grad in zip(parameters, grads, strict=True):
        direction, start = torch.randn_like(parameter), parameter.detach().clone()
        values = []
        for sign in (1, -1):
            parameter.data = start + sign * step * direction
            values.append(penalty().item())
        parameter.data = start
        difference = (values[0] - values[1]) / (2 * step)
        assert abs((grad * direction).sum().item() - difference) <= 1e-5 * max(1.0, abs(difference))


@each_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    layer, (image, *rest) = make_layer(name)
    image.requires_grad_()
    wanted = [image, *layer.parameters()]
    plain = torch.autograd.grad(layer(image, *rest).square().sum(), wanted)
    out = checkpoint(layer, image, *rest, use_reentrant=use_reentrant)
    out.square().sum().backward()  # a reentrant one knows backward() alone
    for value, expected in zip(wanted, plain, strict=True):
        torch.testing.assert_close(value.grad, expected, rtol=0, atol=0)


@each_layer
def test_functional_call_and_ensembles(name):
    """Parameters from outside; with vmap, a layer for each sample in one call."""
    layer, inputs = make_layer(name)
    stacked = {k: torch.stack([v.detach(), v.detach() * 0.5, v.detach() - 0.1]) for k, v in layer.named_parameters()}
    before = layer(*inputs)
    found = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, inputs))(stacked)
    for i in range(3):
        twin = copy.deepcopy(layer)
        twin.load_state_dict({k: v[i] for k, v in stacked.items()})
        assert_close(found[i], twin(*inputs), torch.float64)
    assert not torch.equal(found[1], found[0]) and torch.equal(layer(*inputs), before)


@each_layer
def test_layers_without_values(name):
    """On the meta device and with fake tensors: shape, strides and type of the real result, forward and backward."""
    layer, inputs = make_layer(name, torch.float32)
    real = layer(*inputs)
    meta = copy.deepcopy(layer).to("meta")
    out = meta(*(t.to("meta") for t in inputs))
    assert out.is_meta and (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    out.sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in meta.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in meta.parameters()) == len(list(meta.parameters()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = layer(*(mode.from_tensor(t) for t in inputs))
        assert isinstance(out, torch._subclasses.FakeTensor)
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


@each_layer
def test_shared_memory_is_one_for_all_processes(name):
    layer, inputs = make_layer(name)
    before = layer(*inputs)
    layer.share_memory()
    twin = pickle.loads(ForkingPickler.dumps(layer))  # what a process gets
    assert all(p.is_shared() for p in twin.parameters())
    torch.testing.assert_close(twin(*inputs), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(twin(*inputs), before)
    torch.testing.assert_close(twin(*inputs), layer(*inputs), rtol=0, atol=0)


@each_layer
def test_gradient_scaler_with_autocast(name):
    """Scaled gradients are unscaled to what they are; a step with an infinite one is left out."""
    layer, inputs = make_layer(name, torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(*inputs).float().square().mean()

    expected = torch.autograd.grad(loss(), list(layer.parameters()))
    start = [p.detach().clone() for p in layer.parameters()]
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    for parameter, old, grad in zip(layer.parameters(), start, expected, strict=True):
        assert_close(parameter, old - 0.1 * grad, torch.float32)
    assert any(not torch.equal(p, old) for p, old in zip(layer.parameters(), start, strict=True))
    kept = [p.detach().clone() for p in layer.parameters()]
    optimizer.zero_grad()
    scaler.scale(loss() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), kept, strict=True))


# Graphs


class Call(nn.Module):
    """An operator as a module of its tensors, which is what export takes."""

    def __init__(self, function, arguments: dict) -> None:
        super().__init__()
        self.function, self.names = function, names_of(arguments)
        self.rest = {k: v for k, v in arguments.items() if k not in self.names}

    def forward(self, *values):
        return self.function(**dict(zip(self.names, values, strict=True)), **self.rest)


def values_of(arguments: dict) -> tuple[torch.Tensor, ...]:
    return tuple(arguments[name] for name in names_of(arguments))


def dynamic_sizes(case: OpCase) -> tuple[dict, ...]:
    """Dimensions that differ between the sizes of a case are dynamic: batch, regions, height and width."""
    shapes = [[v.shape for v in values_of(make())] for make in case.sizes]
    return tuple(
        {d: torch.export.Dim.DYNAMIC for d in range(len(same[0])) if len({s[d] for s in same}) > 1}
        for same in zip(*shapes, strict=True)
    )


@each_case
def test_exported_file_serves_other_sizes(case: OpCase):
    first = case.sizes[0]()
    dynamic = dynamic_sizes(case)
    assert {0, 2, 3} <= set(dynamic[0])
    exported = torch.export.export(Call(case.function, first), values_of(first), dynamic_shapes=(dynamic,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert any(f"dcn_plugin.{case.op}" in str(node.target) for node in loaded.graph.nodes)
    for make in case.sizes:
        arguments = make()
        assert_close(loaded.module()(*values_of(arguments)), case.reference(**arguments), torch.float64)


@each_case
def test_reduce_overhead_is_tolerated(case: OpCase):
    """Without a GPU there are no CUDA graphs to take; the result must not suffer, from call to call."""
    torch._dynamo.reset()
    compiled = torch.compile(case.function, mode="reduce-overhead")
    for seed in (0, 1):
        arguments = case.make(case.mixed, torch.float32, seed=seed)
        expected = run(case.reference, convert(arguments, dtype=torch.float64))
        for name, value in run(compiled, arguments).items():
            assert_close(value, expected[name], torch.float32, name)


def packaged(module: nn.Module, inputs: tuple, dynamic, path) -> nn.Module:
    """The module as a compiled package, loaded from its file."""
    exported = torch.export.export(module, inputs, dynamic_shapes=dynamic)
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path / "model.pt2"))
    )


@pytest.mark.slow
@each_case
def test_ahead_of_time_package_of_an_operator(case: OpCase, tmp_path):
    first = convert(case.sizes[0](), dtype=torch.float32)
    package = packaged(Call(case.function, first), values_of(first), (dynamic_sizes(case),), tmp_path)
    for make in case.sizes:
        arguments = make()
        expected = case.reference(**convert(arguments, dtype=torch.float32))
        assert_close(package(*values_of(convert(arguments, dtype=torch.float32))), expected, torch.float32)


@pytest.mark.slow
def test_ahead_of_time_package_of_a_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18_dcn", num_classes=5, zero_init_last=False).eval()
    for module in model.modules():
        if isinstance(module, DCNv2):
            nn.init.normal_(module.conv_offset.weight, std=0.05)
    package = packaged(model, (torch.randn(2, 3, 64, 64),), ({0: torch.export.Dim("batch", min=1, max=64)},), tmp_path)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(package(x), model(x), rtol=1e-4, atol=1e-5)


# The deep ones take long to trace.
MODELS = [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("resnet101", "resnet152")) else [])
    for name in timm.list_models(module="dcn_resnet")
]


@pytest.mark.parametrize("name", MODELS)
def test_model_is_one_graph(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
