"""ONNX: onnxruntime and onnx's own interpreter agree with the operators, the layers and whole models."""

from __future__ import annotations

import copy
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dcn_plugin import ops, reference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
timm = pytest.importorskip("timm")
from families import FAMILIES, short, smallest  # noqa: E402
from onnx_checks import HAS_RUNTIME, assert_close, by_definition, needs_runtime  # noqa: E402

from dcn_plugin.export.onnx import export_onnx, run_onnx  # noqa: E402
from dcn_plugin.layers import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, offset_parameters  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
Dim = torch.export.Dim
# torch.export sets sizes apart that give one output pixel.
IMAGES = {0: Dim("n"), 2: Dim("h", min=4), 3: Dim("w", min=4)}


class Form(nn.Module):
    """The operator in one form, with offsets of some pixels (many reach outside) and masks made from its input."""

    def __init__(
        self, kernel=(3, 3), groups=1, offset_groups=1, mask=False, bias=False, stride=(1, 1), padding=(1, 1, 1, 1),
        dilation=(1, 1),
    ):  # fmt: skip
        super().__init__()
        self.options = dict(stride=stride, padding=padding, dilation=dilation)
        taps = offset_groups * kernel[0] * kernel[1]
        self.weight = nn.Parameter(torch.randn(6, 6 // groups, *kernel))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        self.moves = nn.Parameter(torch.randn(2 * taps, 6, *kernel))
        self.factors = nn.Parameter(torch.randn(taps, 6, *kernel)) if mask else None

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        top, left, bottom, right = self.options["padding"]
        padded = nn.functional.pad(x, (left, right, top, bottom))
        return nn.functional.conv2d(padded, weight, None, self.options["stride"], 0, self.options["dilation"])

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.factors is None else self.conv(x, self.factors).sigmoid()
        offset = self.conv(x, self.moves) * 0.4
        return ops.deform_conv2d(x, offset, self.weight, self.bias, **self.options, mask=mask)


FORMS = {
    "plain": dict(),
    "mask-bias": dict(mask=True, bias=True),
    "groups": dict(groups=2, mask=True),
    "offset-groups": dict(offset_groups=3, bias=True),
    "both-groups": dict(groups=3, offset_groups=2, mask=True, bias=True),
    "depthwise": dict(groups=6, mask=True),
    "4-sided": dict(padding=(0, 1, 2, 3), mask=True),
    "stride-dilation": dict(stride=(2, 1), dilation=(1, 2), padding=(2, 1, 2, 1), bias=True),
    "1x1": dict(kernel=(1, 1), padding=(0, 0, 0, 0), offset_groups=2),
    "2x3": dict(kernel=(2, 3), stride=(2, 2), padding=(1, 0, 0, 2), groups=2, offset_groups=2, mask=True, bias=True),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name, opset", [*((name, 19) for name in FORMS), ("4-sided", 22), ("2x3", 22)])
@torch.no_grad()
def test_operator(name, opset, tmp_path):
    model = Form(**FORMS[name])
    path = export_onnx(
        model, (torch.randn(2, 6, 9, 8),), tmp_path / "m.onnx", dynamic_shapes=(IMAGES,), opset_version=opset
    )
    graph = onnx.load(path)
    assert [node.op_type for node in graph.graph.node].count("DeformConv") == 1
    assert {node.domain for node in graph.graph.node} == {""} and graph.opset_import[0].version == opset
    x = torch.randn(1, 6, 4, 5)
    assert_close(by_definition(path, (x,)), model(x))
    if HAS_RUNTIME:
        x = torch.randn(3, 6, 12, 10)
        assert_close(run_onnx(path, (x,))[0], model(x))


def exact(model: Form, x: Tensor, monkeypatch) -> Tensor:
    """By the definition, in float64."""
    with monkeypatch.context() as changed:
        changed.setattr(ops, "deform_conv2d", reference.deform_conv2d)
        return model.double()(x.double()).float()


# What torch.onnx.export writes without any call of ours: of a module, and of a program that was exported earlier.
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["plain", "both-groups", "2x3"])
@torch.no_grad()
def test_torch_itself_writes_the_operator(name, earlier, tmp_path, monkeypatch):
    model, x = Form(**FORMS[name]).eval(), torch.randn(2, 6, 9, 8)
    kernel = list(model.weight.shape[2:])
    groups = 6 // model.weight.shape[1]
    source, given, shapes = model, (x,), (IMAGES,)
    if earlier:
        source, given, shapes = torch.export.export(model, (x,), dynamic_shapes=shapes), (), None
    program = torch.onnx.export(
        source, given, tmp_path / "m.onnx", dynamic_shapes=shapes, verify=True, report=True, artifacts_dir=tmp_path,
        verbose=False,
    )  # fmt: skip
    assert any("success" in file.name for file in tmp_path.glob("*.md"))
    onnx.checker.check_model(program.model_proto, full_check=True)
    (node,) = (node for node in program.model_proto.graph.node if node.op_type == "DeformConv")
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert found == dict(
        dilations=list(model.options["dilation"]), group=groups, kernel_shape=kernel,
        strides=list(model.options["stride"]),
        offset_group=model.moves.shape[0] // (2 * kernel[0] * kernel[1]), pads=list(model.options["padding"]),
    )  # fmt: skip
    x = torch.randn(1, 6, 4, 5)
    found = by_definition(tmp_path / "m.onnx", (x,))
    wanted = exact(model, x, monkeypatch)
    assert_close(found, wanted)
    # Offsets matter, or agreement would say little.
    model.float().moves.zero_()
    assert (model(x) - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("opset", [17, 18])
def test_torch_itself_refuses_an_opset_without_the_operator(opset):
    for source in (Form().eval(), torch.export.export(Form(), (torch.randn(1, 6, 8, 8),))):
        with pytest.raises(torch.onnx.OnnxExporterError, match=f"at least 19, which brought DeformConv, got {opset}"):
            torch.onnx.export(source, (torch.randn(1, 6, 8, 8),), opset_version=opset, verbose=False)


def test_a_translation_of_the_user_comes_first():
    from onnxscript import opset19

    def identity(input, offset, weight, bias, mask, stride, padding, dilation):
        return opset19.Identity(input)

    table = {torch.ops.dcn_plugin.deform_conv2d.default: identity}
    program = torch.onnx.export(
        Form(), (torch.randn(1, 6, 8, 8),), custom_translation_table=table, optimize=False, verbose=False
    )
    assert "Identity" in {node.op_type for node in program.model.graph}


def test_graphs_for_anything_else_keep_the_operator():
    """The table of decompositions is everyone's; fake tensors of unknown sizes look there too."""
    program = torch.export.export(Form(), (torch.randn(2, 6, 9, 8),), dynamic_shapes=(IMAGES,))
    kept = program.run_decompositions(dict(torch._decomp.decomposition_table))
    targets = [node.target for node in kept.graph.nodes]
    assert torch.ops.dcn_plugin.deform_conv2d.default in targets


def test_the_old_exporter_names_the_new_one(tmp_path):
    with pytest.raises(NotImplementedError, match="expected dynamo=True for dcn_plugin::deform_conv2d"):
        torch.onnx.export(Form().eval(), (torch.randn(1, 6, 8, 8),), tmp_path / "m.onnx", dynamo=False)


@pytest.mark.parametrize("offsets", [torch.float16, torch.float32])
@torch.no_grad()
def test_half_precision_is_computed_in_float32(offsets, tmp_path):
    class Half(nn.Module):
        def forward(self, x, offset, weight):
            return ops.deform_conv2d(x, offset, weight, padding=1)

    x, weight = torch.randn(1, 4, 40, 40).half(), torch.randn(3, 4, 3, 3).half()
    given = (x, (torch.randn(1, 18, 40, 40) * 3).to(offsets), weight)
    path = export_onnx(Half(), given, tmp_path / "m.onnx")
    casts = [n.op_type for n in onnx.load(path).graph.node if n.op_type.startswith("Cast")]
    assert len(casts) == (3 if offsets == torch.float32 else 4), casts
    if HAS_RUNTIME:
        assert_close(run_onnx(path, given)[0], Half()(*given), tolerance=1e-3)


class Attention(nn.Module):
    def forward(self, value, locations, weights):
        return ops.ms_deform_attn(value, [(6, 8), (3, 4)], locations, weights)


@needs_runtime
@pytest.mark.parametrize("earlier", [False, True])
def test_torch_itself_writes_attention(earlier, tmp_path):
    """At an opset without DeformConv, too; a program that was exported earlier. `test_onnx_attention.py` has more."""
    model, given = (
        Attention().eval(),
        (torch.randn(2, 60, 2, 5), torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)),
    )
    source = torch.export.export(model, given) if earlier else model
    program = torch.onnx.export(source, given, opset_version=18, verify=True, verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert nodes.count("GridSample") == 2 and "DeformConv" not in nodes
    program.save(tmp_path / "m.onnx")
    assert_close(run_onnx(tmp_path / "m.onnx", given)[0], model(*given))


class Aggregation(nn.Module):
    """Any form of the call; sizes are those of the tensors."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.eval()

    def forward(self, *tensors):
        return ops.deform_aggregate2d(*tensors, **self.options)


@needs_runtime
@pytest.mark.parametrize("packed", [False, True])
def test_torch_itself_writes_aggregation(packed, tmp_path):
    """At an opset without DeformConv, too; one graph for all batches and sizes."""
    model = Aggregation(stride=2, dilation=2, padding=2, softmax=True, official_order=True, offset_scale=0.5)

    def given(n, height, width):
        out = (n, (height + 1) // 2, (width + 1) // 2, 3)
        tensors = (torch.randn(n, height, width, 12), 2 * torch.randn(*out, 9, 2), torch.randn(*out, 9))
        return (tensors[0], torch.cat([tensors[1].flatten(4), tensors[2]], 4)) if packed else tensors

    free = {i: torch.export.Dim.AUTO for i in range(3)}
    first = given(2, 8, 10)
    shapes = ((free,) * len(first),)
    source = torch.export.export(model, first, dynamic_shapes=shapes)
    program = torch.onnx.export(source, first, opset_version=18, verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert nodes.count("GridSample") == 1 and "DeformConv" not in nodes
    program.save(tmp_path / "m.onnx")
    for sizes in ((2, 8, 10), (1, 13, 7), (3, 5, 6)):
        tensors = given(*sizes)
        assert_close(run_onnx(tmp_path / "m.onnx", tensors)[0], model(*tensors))


class Pool(nn.Module):
    def __init__(self, operator: str, **options):
        super().__init__()
        self.operator, self.options = operator, options
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        return getattr(ops, self.operator)(*tensors, spatial_scale=0.25, **self.options)


POOLING = {
    "deform_roi_pool": dict(output_size=(3, 2), sampling_ratio=2),
    "deform_ps_roi_pool": dict(output_dim=2, group_size=2, output_size=(3, 2), samples_per_part=2),
    "ps_roi_pool": dict(output_dim=2, group_size=2, output_size=3),
}
REGIONS = torch.tensor([[0, 1, 2, 30, 40.0], [1, 8, 3, 44, 30]])


@needs_runtime
@pytest.mark.parametrize("operator", POOLING)
def test_roi_pooling_as_standard_operators(operator, tmp_path):
    model = Pool(operator, **POOLING[operator])
    given = (torch.randn(2, 8, 12, 14), REGIONS, torch.randn(2, 2, 3, 2), torch.rand(2, 1, 3, 2))
    regions = torch.cat([REGIONS, torch.tensor([[2, -9, 20, 60, 70.0]])])
    other = (torch.randn(3, 8, 15, 13), regions, torch.randn(3, 2, 3, 2), torch.rand(3, 1, 3, 2))
    if operator == "ps_roi_pool":
        given, other = given[:2], other[:2]
    sizes = ((IMAGES, *({0: Dim("regions")},) * (len(given) - 1)),)
    path = export_onnx(model, given, tmp_path / "m.onnx", dynamic_shapes=sizes)
    assert_close(run_onnx(path, other)[0], model(*other))


@needs_runtime
@pytest.mark.parametrize("operator", POOLING)
def test_torch_itself_writes_roi_pooling(operator, tmp_path):
    """At an opset without DeformConv, too; a program that was exported earlier."""
    model, given = Pool(operator, **POOLING[operator]), (torch.randn(2, 8, 12, 14), REGIONS)
    program = torch.onnx.export(torch.export.export(model, given), opset_version=18, verify=True, verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    program.save(tmp_path / "m.onnx")
    assert_close(run_onnx(tmp_path / "m.onnx", given)[0], model(*given))


@needs_runtime
@pytest.mark.parametrize("cls", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_layers_that_pool_are_written_while_gradients_are_on(cls, tmp_path):
    layer, given = cls(4, 8, spatial_scale=0.25, sampling_ratio=2).eval(), (torch.randn(2, 8, 12, 14), REGIONS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    layer.requires_grad_()
    torch.onnx.export(layer, given, tmp_path / "m.onnx", verbose=False)
    assert_close(run_onnx(tmp_path / "m.onnx", given)[0], layer(*given))


def test_an_old_opset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^opset_version: expected at least 19[^\n]*$"):
        export_onnx(Form(), (torch.randn(1, 6, 8, 8),), tmp_path / "m.onnx", opset_version=18)
    value, locations = torch.randn(1, 60, 2, 5), torch.rand(1, 7, 2, 2, 3, 2)
    with pytest.raises(ValueError, match="^opset_version: expected at least 16[^\n]*$"):
        export_onnx(Attention(), (value, locations, locations[..., 0]), tmp_path / "m.onnx", opset_version=15)
    assert list(tmp_path.iterdir()) == []


@needs_runtime
@pytest.mark.parametrize("opset", [16, 17, 18])
def test_an_old_opset_is_written_where_it_has_all_that_is_needed(opset, tmp_path):
    value, locations = torch.randn(2, 60, 2, 5), torch.rand(2, 7, 2, 2, 3, 2)
    given = value, locations, torch.rand(2, 7, 2, 2, 3)
    path = export_onnx(Attention().eval(), given, tmp_path / "m.onnx", opset_version=opset)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import if not opset.domain] == [("", opset)]
    assert_close(run_onnx(path, given)[0], Attention()(*given))


@needs_runtime
@pytest.mark.parametrize("opset", [16, 18])
def test_a_file_of_another_opset_is_warned_of(opset, tmp_path):
    """torch keeps 18 where it cannot convert."""
    model, given = Pool("ps_roi_pool", **POOLING["ps_roi_pool"]), (torch.randn(2, 8, 12, 14), REGIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = export_onnx(model, given, tmp_path / "m.onnx", opset_version=opset)
    version = next(imported.version for imported in onnx.load(path).opset_import if not imported.domain)
    told = [str(warning.message) for warning in caught if "opset_version: " in str(warning.message)]
    wanted = f"m.onnx has {version}, as torch does not convert this model to {opset}"
    assert bool(told) == (version != opset) and all(wanted in message for message in told)
    assert version == 18 or version == opset
    assert_close(run_onnx(path, given)[0], model(*given))


def move_offsets(model: nn.Module) -> nn.Module:
    """As training does: offsets of half a pixel, and batch norms that keep activations where rounding does not grow."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            # The last of a block begins at 0, which would hide the block's offsets.
            if not module.weight.any():
                nn.init.constant_(module.weight, 0.1)
    with torch.no_grad():
        for name in offset_parameters(model):
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 / parameter[0].numel() ** 0.5)
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


def smallest_of(family: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return timm.create_model(smallest(family), num_classes=5, **short(smallest(family)))

    return make


def mmdetection_resnet() -> nn.Module:
    pytest.importorskip("mmengine")
    from dcn_plugin.mm import DCNResNet

    return DCNResNet(50, dcn=dict(type="DCNv2"), norm_eval=False)


@needs_runtime
@pytest.mark.parametrize("make", [*map(smallest_of, FAMILIES), mmdetection_resnet], ids=[*FAMILIES, "mmdetection"])
@torch.no_grad()
def test_whole_models(make, tmp_path):
    model = move_offsets(make())
    path = export_onnx(model, (torch.randn(2, 3, 64, 64),), tmp_path / "m.onnx", dynamic_shapes=({0: Dim("n")},))
    x = torch.randn(1, 3, 64, 64)
    wanted = tree_leaves(model(x))
    exact = tree_leaves(copy.deepcopy(model).double()(x.double()))
    for found, expected, right in zip(run_onnx(path, (x,)), wanted, exact, strict=True):
        # Deep networks of drawn samples let float32's own rounding grow.
        rounding = float((expected - right).abs().max() / right.abs().max())
        assert rounding < 1e-3
        assert_close(found, expected, max(1e-5, 4 * rounding))
    for name in offset_parameters(model):
        model.get_parameter(name).zero_()
    # A hundred times what agreement leaves open: a small network without norms is moved little by its offsets.
    assert (tree_leaves(model(x))[-1] - wanted[-1]).abs().max() > 1e-3 * wanted[-1].abs().max()


# -- scripts/export.py ------------------------------------------------------------------------------------------------


def script(*arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts/export.py"), run_name="__main__")


@pytest.fixture
def folder(tmp_path) -> Path:
    """What fine-tuning exports."""
    pytest.importorskip("pytorch_lightning")
    from dcn_plugin.finetune import export_model

    model = timm.create_model("resnet18_dcn", channels=(8, 8, 16, 16), in_chans=1, num_classes=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset.weight" in name:
                parameter.normal_(std=0.1)
    return export_model(model, tmp_path / "tuned", data_config=dict(input_size=(1, 48, 48)))


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=needs_runtime), "exported_program"])
@torch.no_grad()
def test_script_writes_a_fine_tuned_model(form, folder, tmp_path, monkeypatch, capsys):
    from dcn_plugin.finetune import load_exported

    out = tmp_path / "new" / "model.bin"
    script(folder, "--out", out, "--format", form, monkeypatch=monkeypatch)
    assert "of the largest output" in capsys.readouterr().out
    assert [file.name for file in out.parent.iterdir()] == ["model.bin"]
    x = torch.randn(5, 1, 48, 48)
    found = run_onnx(out, (x,))[0] if form == "onnx" else torch.export.load(out).module()(x)
    assert_close(found, load_exported(folder)(x))


@torch.no_grad()
def test_script_leaves_nothing_that_does_not_agree(folder, tmp_path, monkeypatch):
    load = torch.export.load

    def spoiled(*args, **kwargs):
        program = load(*args, **kwargs)
        program.state_dict["fc.weight"].mul_(2)
        return program

    monkeypatch.setattr(torch.export, "load", spoiled)
    out = tmp_path / "new" / "model.pt2"
    arguments = (folder, "--out", out, "--format", "exported_program", "--batch", 2)
    with pytest.raises(SystemExit, match="nothing written: ArithmeticError: outputs differ by"):
        script(*arguments, monkeypatch=monkeypatch)
    assert list(out.parent.iterdir()) == []
    out.write_text("the last one")
    with pytest.raises(SystemExit, match="outputs differ"):
        script(*arguments, monkeypatch=monkeypatch)
    assert out.read_text() == "the last one"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_model"], "Unknown model"),
        (["resnet18_dcn", "--opset", "18"], "at least 19"),
    ],
)
def test_script_says_what_is_wrong(arguments, words, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=words):
        script(*arguments, "--out", tmp_path / "m.onnx", monkeypatch=monkeypatch)
    assert list(tmp_path.iterdir()) == []
