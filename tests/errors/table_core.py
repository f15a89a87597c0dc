"""Conversion, preparation for inference, checkpoints, export to ONNX, and the compiled libraries."""

import importlib
import io
import json
import pickle
import sys
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dcn_plugin
from dcn_plugin import _extension
from dcn_plugin.checkpoint import extract_weights, load_checkpoint, read_checkpoint
from dcn_plugin.layers import DAttention, DCNv1, DeformConv2d
from errors.case import Case

V2 = dict(type="DCNv2")


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))


def state(made):
    """What a conversion that is refused leaves as it is."""
    if not isinstance(made, nn.Module):
        return made
    return [(name, id(module), module.training) for name, module in made.named_modules(remove_duplicate=False)]


def convert(rules, of=model, **options):
    def call():
        made = of()
        before = state(made)
        try:
            dcn_plugin.convert(made, rules, **options)
        finally:
            assert state(made) == before

    return call


class Folds(nn.Sequential):
    """Makes one convolution of itself."""

    def fuse(self):
        return nn.Conv2d(3, 4, 3)


def rule(**given):
    return convert(dict(match="0", layer=V2) | given)


def wrapped():
    made = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(made)
    return made


def converted():
    made = model()
    dcn_plugin.convert(made, dict(match="0", layer=V2))
    return made


PAIR = "expected an integer or a pair of integers"
CONVERT = [
    Case(convert({}, of=dict), TypeError, "model", "expected an nn.Module", "got dict"),
    Case(
        convert({}, of=wrapped),
        TypeError, "model:", "wrapped only after it is converted", "got a DistributedDataParallel",
    ),
    Case(convert("0"), TypeError, "rules", "expected a dict or a list of dicts", "got str"),
    Case(convert(["0"]), TypeError, "rules[0]", "expected a dict", "got str"),
    Case(
        rule(kernal_size=3),
        ValueError, "rules[0]", "keys out of match, exclude", "got 'kernal_size' (did you mean 'kernel_size'?)",
    ),
    Case(convert(dict(layer=V2)), ValueError, "rules[0]", "expected a key 'match'", "got 'layer'"),
    Case(convert({}), ValueError, "rules[0]", "expected a key 'match'", "got none"),
    Case(rule(match=3), TypeError, "match", "expected a string or a list of strings", "got 3"),
    Case(rule(exclude=[1]), TypeError, "exclude", "expected a string or a list of strings", "got [1]"),
    Case(
        rule(match="re:("),
        ValueError, "rules[0] (match='re:('): match", "expected regular expressions", "got 're:('",
    ),
    Case(
        rule(exclude="re:("),
        ValueError, "rules[0] (match='0'): exclude", "expected regular expressions", "got 're:('",
    ),
    Case(rule(layer="DCNv2"), TypeError, "layer", "expected a dict with a 'type'", "got 'DCNv2'"),
    Case(
        rule(layer=dict(type="DCNv9")),
        ValueError, "layer:", "type out of DCNv1, DCNv2", "got 'DCNv9' (did you mean 'DCNv",
    ),
    Case(rule(layer=dict(type=None)), ValueError, "layer:", "type out of DCNv1, DCNv2", "got None"),
    Case(
        rule(layer=dict(type="DeformConv2d")),
        ValueError, "layer:", "type out of DCNv1, DCNv2", "which cannot stand in",
    ),
    Case(
        rule(layer=dict(type=DeformConv2d)),
        ValueError, "layer:", "type out of DCNv1, DCNv2", "which cannot stand in",
    ),
    Case(
        rule(layer=V2 | dict(deform_groups=1)),
        ValueError, "layer:", "is called 'offset_groups'", "got 'deform_groups'",
    ),
    Case(
        rule(layer=V2 | dict(stride=2)),
        ValueError, "layer:", "options of DCNv2 out of offset_groups", "got 'stride'",
    ),
    Case(rule(groups=1.0), TypeError, "groups", "expected an integer or 'depthwise'", "got 1.0"),
    Case(rule(min_channels="8"), TypeError, "min_channels", "expected an integer", "got '8'"),
    Case(rule(kernel_size="3"), TypeError, "kernel_size", PAIR, "got '3'"),
    Case(rule(stride=(1, 1, 1)), TypeError, "stride", PAIR, "got (1, 1, 1)"),
    Case(rule(kernel_size=7), ValueError, "(match='0')", "that meets {'kernel_size': (7, 7)}", "got 1 modules"),
    Case(
        convert(dict(match="*", layer=V2), of=lambda: nn.Conv2d(3, 3, 3)),
        TypeError, "(match='*')", "use DCNv2.from_conv(model)", "got the model itself",
    ),
    Case(
        rule(match="re:1", kernel_size=3),
        ValueError, "(match='re:1')", "that meets {", "got 1 modules, none of which",
    ),
    Case(rule(exclude="0"), ValueError, "rules[0] (match='0')", "expected a module of the model", "got none"),
    Case(rule(match="9"), ValueError, "rules[0] (match='9')", "expected a module of the model", "got none"),
    Case(
        convert([dict(match=match, layer=V2) for match in ("0", "[0-9]")], of=model),
        ValueError, "0:", "expected one rule", "got rules[0] (match='0') and rules[1] (match='[0-9]')",
    ),
    Case(
        convert(dict(match="0", layer=dict(type="DCNv2", offset_channels=6))),
        ValueError, "rules[0] (match='0')", "a layer that the input alone suffices for", "got DCNv2(offset_groups=1,",
    ),
    Case(
        convert(dict(match="0", layer=V2), of=converted),
        TypeError, "rules[0] (match='0')", "exclude it", "got '0', as '0' is deformable already",
    ),
    Case(
        convert(dict(match="0.0", layer=V2), of=lambda: nn.Sequential(Folds(nn.Conv2d(3, 4, 3)))),
        TypeError, "(match='0.0')", "fold the model first", "got '0.0', which '0' (Folds) folds: fuse() would put a",
    ),
    Case(rule(match="1"), TypeError, "got '1'", "conv: expected an nn.Conv2d", "got ReLU; narrow the pattern"),
    Case(
        rule(layer=V2 | dict(offset_groups=2)),
        ValueError, "got '0'", "in_channels: expected a multiple of offset_groups", "got 3 and 2",
    ),
    Case(
        rule(layer=V2 | dict(mask_activation="tanh")), ValueError, "mask_activation", "expected '2*sigmoid'", "'tanh'"
    ),
    Case(rule(layer=V2 | dict(offset_bound="1")), TypeError, "offset_bound", "a number of pixels or None", "got '1'"),
    *(
        Case(
            convert(dict(match="0", layer=V2), input_size=size),
            ValueError, "input_size", "expected three positive integers (C, H, W)", f"got {size!r}",
        )
        for size in ((3, 12), (3, 12, 0), 12, (3, 12.0, 12), "3x4")
    ),
    Case(
        convert(dict(match="0", layer=V2), input_size=(4, 12, 12)),
        ValueError, "input_size:", "expected a size that the model runs on", "got (4, 12, 12): RuntimeError",
    ),
]  # fmt: skip

WEIGHTS = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}


def load(**given):
    made = nn.Linear(2, 2)
    return lambda: load_checkpoint(**dict(model=made, source=WEIGHTS) | given)


def read(name, content, **options):
    """Read a file that holds these bytes, or what torch.save makes of something else."""

    def call(tmp_path):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        read_checkpoint(tmp_path / name, **options)

    return call


def read_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    read("x.safetensors", b"")(tmp_path)


def index(shard):
    return json.dumps({"weight_map": {"weight": shard}}).encode()


def read_index_of_another_file(tmp_path):
    torch.save({"bias": WEIGHTS["bias"]}, tmp_path / "x.bin")
    read("i.json", index("x.bin"))(tmp_path)


def read_folder(*names):
    def call(tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        read_checkpoint(folder)

    return call


def extract(content):
    def call(tmp_path):
        if isinstance(content, bytes):
            (tmp_path / "x.pth").write_bytes(content)
        else:
            torch.save(content, tmp_path / "x.pth")
        extract_weights(tmp_path / "x.pth", tmp_path / "y.pth")

    return call


def extract_script(tmp_path):
    """TorchScript that Python's reader of archives does not see to be that."""
    torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)).save(tmp_path / "x.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcn_plugin._unpickling.refuse_others", lambda path: None)
        extract_weights(tmp_path / "x.pth", tmp_path / "y.pth")


def containing_itself():
    content = {"weight": torch.zeros(2)}
    content["itself"] = content
    return content


# Two numbers, of which there are the bytes of one.
SHORT_ARRAY = pickle.dumps({"weight": np.full(2, 7, "u1")}, protocol=2).replace(b"\2\0\0\0\7\7", b"\1\0\0\0\7")


GLOBS = "expected a glob or a list of globs"
CHECKPOINT = [
    Case(load(model={}), TypeError, "model", "expected an nn.Module", "got dict"),
    Case(load(source=None), TypeError, "source", "expected a path or a state dict", "got NoneType"),
    Case(load(source=[torch.zeros(1)]), TypeError, "source", "expected a path or a state dict", "got list"),
    Case(load(allow_missing=3), TypeError, "allow_missing", GLOBS, "got 3"),
    Case(load(allow_unexpected=[1]), TypeError, "allow_unexpected", GLOBS, "got [1]"),
    Case(load(allow_mismatched=None), TypeError, "allow_mismatched", GLOBS, "got None"),
    Case(load(source={"weight": "zeros"}), TypeError, "state dict:", "expected tensors", "got a str under 'weight'"),
    Case(load(source={}), ValueError, "state dict:", "expected weights", "got none"),
    Case(load(key=3), TypeError, "key", "expected a string, such as 'ema.module', or a list of them", "got 3"),
    Case(load(key="ema"), ValueError, "key:", "in state dict, which has 'weight', 'bias'", "got 'ema'"),
    Case(
        load(prefix="student."),
        ValueError, "prefix:", "expected the start of names in state dict, which has weight, bias", "got 'student.'",
    ),
    Case(load(source={"bias": torch.zeros(3)}), RuntimeError, "shape of bias", "model has [2]", "source has [3]"),
    Case(load(source="nowhere.pth"), FileNotFoundError, "nowhere.pth:", "expected a checkpoint file", "got none"),
    Case(
        load(source="https://example.org/x.pth"),
        FileNotFoundError, "https://example.org/x.pth:", "download it first", "got none",
    ),
    Case(read_without_safetensors, ImportError, "x.safetensors", "pip install safetensors", "needs safetensors"),
    Case(
        read("x.safetensors", b"hello"), ValueError, "x.safetensors:", "expected a readable safetensors file", "header"
    ),
    Case(
        read("x.pkl", pickle.dumps({"a": len}, protocol=2)),
        ValueError, "x.pkl", "pass the state dict to load_checkpoint", "got a file of something else",
    ),
    Case(
        read("x.pth", {"model": nn.Linear(2, 2)}),
        ValueError, "x.pth", "expected weights alone", "got objects of torch.nn.modules.linear.Linear",
    ),
    Case(
        read("x.pth", b"version https://git-lfs.github.com/spec/v1\nsize 9000000\n"),
        ValueError, "x.pth", "run `git lfs pull`", "got a Git LFS pointer, not the file of 9.0 MB",
    ),
    Case(read("i.json", b"{"), ValueError, "i.json:", "expected a readable index of shards", "got Expecting"),
    Case(read("i.json", b"{}"), ValueError, "i.json", "expected weights, or an index", "got JSON without a weight_map"),
    Case(read("i.json", index("../x.bin")), ValueError, "i.json", "names of files beside it", "got '../x.bin'"),
    Case(read("i.json", index("x.bin")), FileNotFoundError, "i.json:", "expected 1 shards", "got all but 1: x.bin"),
    Case(read_index_of_another_file, ValueError, "i.json", "expected 'weight' in 'x.bin'", "got a file without"),
    Case(read_folder(), FileNotFoundError, "folder:", "expected a checkpoint file", "got nothing"),
    Case(read_folder("a.pth", "b.pth"), ValueError, "folder:", "expected one file", "got 2 (a.pth, b.pth): give one"),
    Case(
        read_folder(".metadata"),
        ValueError, "folder", "make one of it with python -m", "got a checkpoint of torch.distributed.checkpoint",
    ),
    Case(extract(b"\x80\x02nothing"), ValueError, "x.pth:", "expected a readable checkpoint", "got "),
    Case(extract(SHORT_ARRAY), ValueError, "x.pth", "array of shape (2,)", "cannot have 1 bytes"),
    Case(extract_script, ValueError, "x.pth", "checkpoint", "it holds TorchScript"),
    Case(extract(containing_itself()), ValueError, "x.pth", "expected weights by name", "in each other without end"),
    Case(extract({"epoch": 3}), ValueError, "x.pth", "expected weights", "got none beside dict"),
    Case(read("x.pth", b""), ValueError, "x.pth", "expected a readable checkpoint", "got EOFError"),
    Case(read("x.pth", [1, 2]), ValueError, "x.pth", "expected a dict of weights", "got a list"),
    Case(read("x.pth", {"net": WEIGHTS}), TypeError, "x.pth:", "say where with key=", "got a dict under 'net'"),
    Case(read("x.pth", WEIGHTS, key="ema"), ValueError, "key:", "x.pth, which has 'weight'", "got 'ema'"),
]  # fmt: skip


def export(version, model, *given):
    from dcn_plugin.export.onnx import export_onnx

    export_onnx(model, given, "not written.onnx", opset_version=version)


def export_of_any_size():
    """The exporter asks for the operator's form while sizes of the channels are not known."""
    from dcn_plugin.export._onnx_forms import FORMS

    input, offset, weight = (SimpleNamespace(shape=shape) for shape in ((1, "C", 8, 8), (1, 18, 8, 8), (4, 4, 3, 3)))
    FORMS["deform_conv2d"](input, offset, weight, None, None, [1, 1], [1, 1, 1, 1], [1, 1])


def export_by_torch(**options):
    """What torch's exporter, which wraps it, was told."""
    layer = DeformConv2d(4, 4, 3, padding=1)
    given = (torch.zeros(1, 4, 8, 8), torch.zeros(1, 18, 8, 8))
    try:
        torch.onnx.export(layer, given, io.BytesIO(), verbose=False, **options)
    except torch.onnx.OnnxExporterError as error:
        raise error.__cause__ from None


def decompose_for_nobody():
    torch._decomp.decomposition_table[torch.ops.dcn_plugin.ps_roi_pool.default](torch.zeros(1))


def import_without_openvino(monkeypatch):
    monkeypatch.delitem(sys.modules, "dcn_plugin.export.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    importlib.import_module("dcn_plugin.export.openvino")


def convert_for_openvino(*arguments):
    from dcn_plugin.export.openvino import convert

    convert(*arguments)


def read_by_openvino(unknown):
    """What OpenVINO's reader, which wraps errors in words of its own, calls, with one axis that is not known."""
    from dcn_plugin.export import openvino

    shapes = dict(input=[1, 4, 8, 8], offset=[1, 18, 8, 8], weight=[4, 4, 3, 3])
    shapes[unknown] = [shapes[unknown][0], -1, *shapes[unknown][2:]]
    given = [openvino.opset8.parameter(shape).output(0) for shape in shapes.values()]
    openvino._convolution(*given, None, None, [1, 1], [1, 1, 1, 1], [1, 1])


def refused_by_openvino(name):
    from dcn_plugin.export import openvino

    openvino._refusal(name)(None)


OPENVINO = [
    Case(
        import_without_openvino,
        ModuleNotFoundError, "dcn_plugin.export.openvino", "pip install openvino", "needs openvino",
    ),
    Case(
        lambda: convert_for_openvino(nn.Identity()),
        ValueError, "example_input:", "expected the arguments of a module", "got None",
    ),
    *(
        Case(
            lambda name=name: read_by_openvino(name),
            ValueError, f"{name}:", "expected fixed channels and a fixed kernel", f"got shape [{size},?,",
        )
        for name, size in (("input", 1), ("offset", 1), ("weight", 4))
    ),
    Case(
        lambda: refused_by_openvino("ps_roi_pool"),
        NotImplementedError, "ps_roi_pool:", "expected an operator that OpenVINO has", "got RoI pooling",
    ),
    Case(
        lambda: refused_by_openvino("ms_deform_attn"),
        NotImplementedError, "ms_deform_attn:", "expected an operator that OpenVINO has", "got attention: give",
    ),
]  # fmt: skip

ONNX = [
    Case(
        lambda: export(18, DCNv1(4, 4, 3).eval(), torch.zeros(1, 4, 8, 8)),
        ValueError, "opset_version:", "expected at least 19, which brought DeformConv", "got 18",
    ),
    Case(
        lambda: export(15, DAttention(4, 2, 1, 8).eval(), torch.zeros(1, 4, 8, 8)),
        ValueError, "opset_version:", "expected at least 16, which brought GridSample", "got 15",
    ),
    Case(
        lambda: export_by_torch(opset_version=18),
        ValueError, "opset_version:", "expected at least 19, which brought DeformConv", "got 18",
    ),
    Case(
        lambda: export_by_torch(dynamo=False),
        NotImplementedError, "torch.onnx.export:", "expected dynamo=True", "got dynamo=False",
    ),
    Case(
        decompose_for_nobody,
        NotImplementedError, "dcn_plugin::ps_roi_pool:", "expected an exporter", "got a call outside of one",
    ),
    Case(export_of_any_size, ValueError, "input:", "expected fixed channels and a fixed kernel", "got shapes (1, 'C'"),
]  # fmt: skip


def load_libraries(monkeypatch, tmp_path, content=None, torch_version=None):
    for name in ("CPU_LIBRARY", "CUDA_LIBRARY", "BUILD_INFO"):
        monkeypatch.setattr(_extension, name, tmp_path / getattr(_extension, name).name)
    if content is not None:
        _extension.CPU_LIBRARY.write_bytes(content)
    if torch_version is not None:
        _extension.BUILD_INFO.write_text('{"torch_floor": "2.11"}')
        monkeypatch.setattr(torch, "__version__", torch_version)
    _extension.load.__wrapped__()


def call_on_cuda(monkeypatch, tmp_path):
    """What a CUDA tensor meets where the CUDA library is missing."""
    kernels = {}

    class Registrations:
        def __init__(self, *_):
            pass

        def impl(self, name, kernel, key):
            kernels[name] = kernel

    monkeypatch.setattr(torch.library, "Library", Registrations)
    monkeypatch.setattr(_extension, "_stand_ins", [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "CUDA_LIBRARY", tmp_path / "absent.so")
    _extension._raise_on_cuda_tensors(_extension._load_cuda())
    kernels["deform_conv2d"]()


LIBRARIES = [
    Case(
        lambda monkeypatch, tmp_path: load_libraries(monkeypatch, tmp_path, torch_version="2.9.1+cpu"),
        _extension.ExtensionError, "dcn_plugin", "needs torch 2.11 or newer", "torch 2.9.1+cpu is running",
    ),
    Case(load_libraries, _extension.ExtensionError, "_C.so", "To mend it", "does not exist"),
    Case(
        lambda monkeypatch, tmp_path: load_libraries(monkeypatch, tmp_path, content=b"not a library"),
        _extension.ExtensionError, "_C.so", "To mend it", "damaged, or was built for another kind of machine",
    ),
    Case(call_on_cuda, RuntimeError, "operators of dcn_plugin", "whose nvcc is on PATH", "were built without CUDA"),
]  # fmt: skip


def constructor(optimizer=MappingProxyType(dict(type="SGD", lr=0.1)), **paramwise):
    from mmengine.optim import build_optim_wrapper

    name = "dcn_plugin.OptimWrapperConstructor"
    config = dict(constructor=name, optimizer=dict(optimizer), paramwise_cfg=paramwise)
    return lambda: build_optim_wrapper(model(), config)


OPTIMIZERS = [
    Case(constructor(dcn_offset_lr_mult="0.1"), TypeError, "dcn_offset_lr_mult:", "expected a number", "got '0.1'"),
    Case(constructor(roi_offset_lr_mult=True), TypeError, "roi_offset_lr_mult:", "expected a number", "got True"),
    Case(constructor(roi_offset_lr_mult=-1.0), ValueError, "roi_offset_lr_mult:", "at least 0", "got -1.0"),
    Case(
        constructor(dict(type="Adadelta"), dcn_offset_lr_mult=0.1),
        ValueError, "dcn_offset_lr_mult:", "expected an optimizer with a learning rate", "got one without lr",
    ),
]  # fmt: skip
NONE = "deformable convolutions with weights of their own on a CPU"
INFERENCE = [
    Case(lambda: dcn_plugin.prepare_for_inference({}), TypeError, "model", "expected an nn.Module", "got dict"),
    Case(lambda: dcn_plugin.prepare_for_inference(model()), ValueError, "model", NONE, "got none"),
    Case(
        lambda: dcn_plugin.prepare_for_inference(DeformConv2d(4, 4, 3, device="meta")),
        ValueError, "model", NONE, "got none",
    ),
    Case(
        lambda: dcn_plugin.prepare_for_inference(DeformConv2d(4, 4, 3, groups=4)),
        ValueError, "model", NONE, "got none",
    ),
]  # fmt: skip
CASES = CONVERT + INFERENCE + CHECKPOINT + ONNX + OPENVINO + LIBRARIES + OPTIMIZERS
