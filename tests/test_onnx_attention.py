"""Attention in ONNX: GridSample and a sum, or TensorRT's plugin, agree with the definition in every form."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import BY_NAME, convert
from torch import Tensor, nn

from dcn_plugin import ops, reference
from dcn_plugin.layers import MSDeformAttn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from onnx_checks import assert_close, needs_runtime  # noqa: E402

from dcn_plugin.export._onnx_forms import FORMS as WRITTEN  # noqa: E402
from dcn_plugin.export.grid_sample import grid_sample_decompositions  # noqa: E402
from dcn_plugin.export.onnx import export_onnx, run_onnx  # noqa: E402
from dcn_plugin.export.tensorrt import plugin_nodes  # noqa: E402

Dim = torch.export.Dim
SHAPES = [(6, 8), (3, 4), (1, 5)]
FLAT = [size for shape in SHAPES for size in shape]
PIXELS = sum(height * width for height, width in SHAPES)
HEADS, CHANNELS = 2, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(n=2, queries=7, boxes=None, points=(4, 4, 4), weights=True) -> list[Tensor | None]:
    """The operator's tensors; positions reach beyond every edge, the references are those of each level or of all."""
    shape = n, queries, HEADS, sum(points)
    locations = torch.rand(*shape, 2) * 1.6 - 0.3 if boxes is None else torch.randn(*shape, 2) * 2
    return [
        torch.randn(n, PIXELS, HEADS, CHANNELS), locations, torch.randn(shape) if weights else None,
        None if boxes is None else torch.rand(n, queries, *boxes),
    ]  # fmt: skip


OPTIONS = {
    f"{points}-{boxes}-{'softmax' if softmax else 'weights' if weights else 'plain'}": (points, boxes, weights, softmax)
    for points, boxes, (weights, softmax) in itertools.product(
        [(4, 4, 4), (1, 3, 2)],
        [None, (1, 2), (3, 2), (1, 4), (3, 4)],
        [(True, False), (True, True), (False, False)],
    )
}


def defined(tensors, points, softmax, scale=0.5) -> Tensor:
    """In float64."""
    value, locations, weights, references = (None if t is None else t.double() for t in tensors)
    return reference.ms_deform_attn(
        value, SHAPES, locations, weights, points=points, softmax=softmax, reference_points=references,
        offset_scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_form_is_the_definition(name):
    points, boxes, weights, softmax = OPTIONS[name]
    tensors = draw(boxes=boxes, points=points, weights=weights)
    found = WRITTEN["ms_deform_attn"](*tensors, FLAT, list(points), softmax, 0.25)
    assert_close(found.double(), defined(tensors, points, softmax, 0.25), 2e-6)


@pytest.mark.parametrize("dtype, tolerance", {torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}.items())
def test_the_form_in_other_types(dtype, tolerance):
    """Positions, weights and sums are float32 within, whatever the values are."""
    places = torch.promote_types(dtype, torch.float32)
    value, *others = draw(boxes=(3, 2))
    given = [value.to(dtype), *(t.to(places) for t in others)]
    found = WRITTEN["ms_deform_attn"](*given, FLAT, [4, 4, 4], True, 0.5)
    assert found.dtype == dtype
    assert_close(found.double(), defined(given, (4, 4, 4), True), tolerance)


class Attention(nn.Module):
    """The operator on the maps of several levels, whose sizes it reads off them."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.eval()

    def forward(self, *given: Tensor) -> Tensor:
        *maps, locations, weights, references = given
        value = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1).unflatten(2, (HEADS, -1))
        shapes = [level.shape[-2:] for level in maps]
        return ops.ms_deform_attn(
            value, shapes, locations, weights, softmax=True, reference_points=references, **self.options
        )


def on_maps(n, queries, sizes, box, points=3) -> tuple[Tensor, ...]:
    maps = [torch.randn(n, HEADS * CHANNELS, *size) for size in sizes]
    shape = n, queries, HEADS, *((2, points) if isinstance(points, int) else (sum(points),))
    return *maps, torch.randn(*shape, 2), torch.randn(shape), torch.rand(n, queries, 2, box)


N, Q = Dim("n"), {0: Dim("n"), 1: Dim("queries")}
SIZES = (*({0: N, 2: Dim(f"height{i}"), 3: Dim(f"width{i}")} for i in range(2)), Q, Q, Q)
OTHERS = [(1, 3, [(5, 20), (9, 2)]), (3, 100, [(12, 4), (2, 3)]), (1, 1, [(2, 2), (1, 1)])]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = MSDeformAttn(16, 2, 2, 2)
        self.eval()

    def forward(self, *given: Tensor) -> Tensor:
        return self.layer(*given, [(4, 6), (2, 3)])


@needs_runtime
def test_the_graph_of_a_layer_takes_an_empty_batch(tmp_path):
    def given(n):
        return torch.randn(n, 5, 16), torch.rand(n, 5, 2, 2), torch.randn(n, 30, 16)

    model = Layer()
    path = export_onnx(model, given(2), tmp_path / "m.onnx", dynamic_shapes=(({0: Dim("n")},) * 3,))
    for n in (0, 1, 3):
        inputs = given(n)
        (found,), expected = run_onnx(path, inputs), model(*inputs)
        assert found.shape == expected.shape == (n, 5, 16)
        if n:
            assert_close(found, expected)


def domains(path) -> set[str]:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return {node.domain for node in model.graph.node}


@needs_runtime
@pytest.mark.parametrize("box, points", [(2, 3), (4, (1, 4))])
def test_the_graph_takes_any_batch_queries_and_sizes(box, points, tmp_path):
    model = Attention() if isinstance(points, int) else Attention(points=points)
    given = on_maps(2, 7, [(8, 10), (4, 6)], box, points)
    path = export_onnx(model, given, tmp_path / "m.onnx", dynamic_shapes=(SIZES,))
    assert domains(path) == {""}
    assert [node.op_type for node in onnx.load(path).graph.node].count("GridSample") == 2
    for n, queries, sizes in OTHERS:
        other = on_maps(n, queries, sizes, box, points)
        assert_close(run_onnx(path, other)[0], model(*other))
    for n, queries in ((2, 0), (0, 2)):
        assert run_onnx(path, on_maps(n, queries, [(5, 6), (2, 3)], box, points))[0].shape == (n, queries, 10)


class Encoder(nn.Module):
    """Two layers over two maps, each pixel a query whose reference is itself, as detectors have them."""

    def __init__(self, width=16, heads=2, points=3):
        super().__init__()
        self.split = heads, 2, points
        counts = dict(value=width, offsets=heads * 4 * points, logits=heads * 2 * points, out=width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, count) for name, count in counts.items()}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.eval()

    def forward(self, *maps: Tensor) -> Tensor:
        shapes, centres = [level.shape[-2:] for level in maps], []
        for height, width in shapes:
            y, x = ((torch.arange(size) + 0.5) / size for size in (height, width))
            centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1))
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)
        references = torch.cat(centres)[None, :, None].expand(x.shape[0], -1, 2, -1)
        for layer in self.layers:
            attended = ops.ms_deform_attn(
                layer["value"](x).unflatten(2, (self.split[0], -1)), shapes,
                layer["offsets"](x).unflatten(2, (*self.split, 2)), layer["logits"](x).unflatten(2, self.split),
                softmax=True, reference_points=references,
            )  # fmt: skip
            x = self.norm(x + layer["out"](attended).relu())
        return x


@needs_runtime
@torch.no_grad()
def test_a_whole_encoder(tmp_path):
    model = Encoder()
    sizes = tuple({0: N, 2: Dim(f"height{i}", min=2), 3: Dim(f"width{i}", min=2)} for i in range(2))
    given = torch.randn(2, 16, 8, 10), torch.randn(2, 16, 4, 6)
    path = export_onnx(model, given, tmp_path / "m.onnx", dynamic_shapes=(sizes,))
    other = torch.randn(1, 16, 5, 12), torch.randn(1, 16, 7, 3)
    wanted = model(*other)
    assert_close(run_onnx(path, other)[0], wanted)
    for layer in model.layers:  # what moves the samples matters, or agreement would say little
        layer["offsets"].weight.zero_()
    assert (model(*other) - wanted).abs().max() > 0.01


@needs_runtime
def test_what_lies_outside_is_not_read(tmp_path):
    """Infinite positions, too."""

    class Plain(nn.Module):
        def forward(self, value: Tensor, locations: Tensor) -> Tensor:
            return ops.ms_deform_attn(value, [(4, 3)], locations)

    given = torch.randn(1, 12, 1, 6), torch.rand(1, 40, 1, 1, 1, 2) * 1.4 - 0.2
    path = export_onnx(Plain().eval(), given, tmp_path / "m.onnx")
    for at, far in enumerate((torch.inf, -torch.inf, 1e30, -1e9, -0.2, 1.2)):
        given[1][0, 5 + 2 * at : 7 + 2 * at] = torch.tensor([far, 0.5])
        given[1][0, 20 + at, ..., 1] = far
    found = run_onnx(path, given)[0]
    assert_close(found, Plain()(*given))
    assert not found[0, 5:13].any() and not found[0, 20:24].any()


@needs_runtime
def test_half_values_are_sampled_in_float32(tmp_path):
    class Half(nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ops.ms_deform_attn(value, SHAPES, locations, weights)

    value, locations, weights, _ = draw()
    given = value.half(), locations.half(), weights
    path = export_onnx(Half().eval(), given, tmp_path / "m.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
    sampled = [name for node in graph.node if node.op_type == "GridSample" for name in node.input]
    assert len(sampled) == 6 and {types[name] for name in sampled} == {onnx.TensorProto.FLOAT}
    found = run_onnx(path, given)[0]
    assert found.dtype == torch.float16
    assert_close(found, Half()(*given), 1e-3)


def test_a_program_of_grid_sample_has_core_operators_alone():
    model, given = Attention(), on_maps(2, 7, [(8, 10), (4, 6)], 4)
    free = tuple(dict.fromkeys(sizes, Dim.AUTO) for sizes in SIZES)
    program = torch.export.export(model, given, dynamic_shapes=(free,))
    program = program.run_decompositions({**torch.export.default_decompositions(), **grid_sample_decompositions()})
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {target.namespace for target in targets} == {"aten"}
    assert torch.ops.aten.grid_sampler_2d.default in targets
    other = on_maps(*OTHERS[0], 4)
    assert_close(program.module()(*other), model(*other))


# -- aggregation, which is attention over the taps of a kernel --------------------------------------------------------

AGGREGATIONS = {
    name: BY_NAME["deform_aggregate2d"].configs[name]
    for name in ("weights", "plain", "packed_softmax", "rectangular", "rows", "stretched", "no_centre", "far")
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_form_of_aggregation_is_the_definition(name):
    case = BY_NAME["deform_aggregate2d"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3)):
        arguments = convert(case.make(name), dtype=dtype)
        if dtype == torch.float16:
            arguments["offset"] = arguments["offset"].float()
        found = WRITTEN["deform_aggregate2d"](*case.to_op(**arguments).values())
        assert found.dtype == dtype
        assert_close(found.double(), case.reference(**convert(arguments, dtype=torch.float64)), tolerance)


# -- TensorRT's plugin -------------------------------------------------------------------------------------------------


def by_plugin(path, given: tuple[Tensor, ...]) -> Tensor:
    """What onnx's interpreter makes of a file whose plugin is what NVIDIA says of it, on our definition."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class MultiscaleDeformableAttnPlugin_TRT(OpRun):
        op_domain = "trt.plugins"

        def _run(self, *given, plugin_version=None, plugin_namespace=None):
            value, shapes, first, locations, weights = map(torch.tensor, given)
            float32, int32 = torch.float32, torch.int32
            assert [t.dtype for t in (value, shapes, first, locations, weights)] == [
                float32,
                int32,
                int32,
                *[float32] * 2,
            ]
            assert [t.dim() for t in (value, shapes, first, locations, weights)] == [4, 2, 1, 6, 5]
            assert locations.shape[:-1] == weights.shape and locations.shape[3] == len(shapes) == len(first)
            pixels = [value[:, a : a + h * w] for a, (h, w) in zip(first.tolist(), shapes.tolist(), strict=True)]
            out = reference.ms_deform_attn(torch.cat(pixels, 1), shapes.tolist(), locations, weights)
            return (out.unflatten(2, value.shape[2:]).numpy(),)

    model = ReferenceEvaluator(str(path), new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    return torch.from_numpy(
        model.run(None, {name: t.numpy() for name, t in zip(model.input_names, given, strict=True)})[0]
    )


@pytest.mark.parametrize("version, box, points", [(2, 2, 3), (1, 4, (1, 4))])
def test_the_plugin_is_given_what_nvidia_says(version, box, points, tmp_path):
    model = Attention() if isinstance(points, int) else Attention(points=points)
    given = on_maps(2, 7, [(8, 10), (4, 6)], box, points)
    with plugin_nodes(version):
        path = export_onnx(model, given, tmp_path / "m.onnx", dynamic_shapes=(SIZES,))
    assert domains(path) == {"", "trt.plugins"}
    (node,) = (node for node in onnx.load(path).graph.node if node.domain)
    attributes = {attribute.name: attribute.s for attribute in node.attribute}
    assert node.op_type == "MultiscaleDeformableAttnPlugin_TRT"
    assert attributes == dict(plugin_version=str(version).encode(), plugin_namespace=b"")
    for n, queries, sizes in OTHERS[:2]:
        other = on_maps(n, queries, sizes, box, points)
        assert_close(by_plugin(path, other), model(*other))


def test_the_plugin_serves_aggregation(tmp_path):
    class Packed(nn.Module):
        def forward(self, value: Tensor, packed: Tensor) -> Tensor:
            return ops.deform_aggregate2d(value, packed, remove_center=True)

    given = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 6, 2, 24)
    with plugin_nodes():
        path = export_onnx(Packed().eval(), given, tmp_path / "m.onnx")
    assert domains(path) == {"", "trt.plugins"}
    assert_close(by_plugin(path, given), Packed()(*given))


def test_the_plugin_without_weights_and_with_half_values(tmp_path):
    class Plain(nn.Module):
        def forward(self, value: Tensor, locations: Tensor) -> Tensor:
            return ops.ms_deform_attn(value, SHAPES, locations)

    value, locations, *_ = draw()
    with plugin_nodes():
        torch.onnx.export(Plain().eval(), (value.half(), locations), tmp_path / "m.onnx", dynamo=True, verbose=False)
    found = by_plugin(tmp_path / "m.onnx", (value.half(), locations))
    assert found.dtype == torch.float16
    assert_close(found, Plain()(value.half(), locations), 1e-3)


def test_the_plugin_is_written_on_request_alone(tmp_path):
    given = on_maps(1, 3, [(4, 5), (2, 3)], 2)
    with pytest.raises(RuntimeError, match="inside"), plugin_nodes():
        raise RuntimeError("inside")
    assert domains(export_onnx(Attention(), given, tmp_path / "m.onnx")) == {""}
