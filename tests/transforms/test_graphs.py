"""Operators and models as graphs: exported files, ahead-of-time packages, whole compiled models."""

import io
import os
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from cases import OpCase, assert_close, convert, run
from families import NAMES, short
from torch import Tensor, nn

from dcn_plugin import ops, registry
from dcn_plugin.layers import DCNv2

from .parts import each_case, names_of


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
    assert all(set(dims) <= set(found) for dims, found in zip(case.dynamic, dynamic, strict=False))
    exported = torch.export.export(Call(case.function, first), values_of(first), dynamic_shapes=(dynamic,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert any(f"dcn_plugin.{case.name}" in str(node.target) for node in loaded.graph.nodes)
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


def test_compiles_where_ci_is_set(tmp_path):
    """There inductor checks torch's own tables, where our operators stand for the exporters."""
    lines = ["import torch, dcn_plugin", "torch.manual_seed(0)"]
    lines += ["layers = [dcn_plugin.DCNv2(4, 4, 3, padding=1), dcn_plugin.layers.DeformRoIPool(2)]"]
    lines += ["x, rois = torch.randn(2, 4, 9, 9), torch.tensor([[0.0, 1, 1, 7, 6]])"]
    lines += ["f = lambda x, rois: layers[1](layers[0](x), rois).exp()"]
    lines += ["torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, rois), f(x, rois))"]
    environment = os.environ | {"CI": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


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


# These differ from the tiny ones, which are tried, in numbers of blocks and channels alone.
LARGER = ("_small", "_base", "_large", "_xlarge")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(LARGER)])
def test_model_is_one_graph(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **short(name)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        dict(type="DCNResNet", depth=18, out_indices=(0, 1, 2, 3)),
        dict(type="TimmBackbone", model_name="resnet18_dcn", out_indices=(2, 3, 4)),
    ],
    ids=lambda config: config["type"],
)
def test_backbone_of_mmengine_is_one_graph(config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = registry.MODELS.build(config).train()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for found, expected in zip(compiled, model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def scripted_pooling(input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
    return torch.ops.dcn_plugin.deform_roi_pool(input, rois, offset, None, [2, 3], 0.5, 2, 0.1, True)


def scripted_convolution(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.dcn_plugin.deform_conv2d(input, offset, weight, None, None, [1, 2], [1, 0, 2, 1], [1, 1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_calls_of_the_operators(tmp_path):
    """The layers refuse it; a module of one's own may call the operator."""
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2.0, 12.0, 9.0], [1, 0.0, 0.0, 8.0, 15.0]], dtype=torch.float64)
    shift = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    offset, weight = torch.randn(2, 18, 10, 4).double(), torch.randn(6, 2, 3, 3, dtype=torch.float64)
    public = partial(ops.deform_conv2d, stride=(1, 2), padding=(1, 0, 2, 1))
    pooling = partial(ops.deform_roi_pool, output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2)
    for function, plain, given in [
        (scripted_convolution, public, (x, offset, weight)),
        (scripted_pooling, pooling, (x, rois, shift)),
    ]:
        torch.jit.script(function).save(str(tmp_path / "function.pt"))
        scripted = torch.jit.load(tmp_path / "function.pt")
        assert torch.equal(scripted(*given), plain(*given))
        (found,), (expected,) = (torch.autograd.grad(f(*given).square().sum(), x) for f in (scripted, plain))
        torch.testing.assert_close(found, expected)
