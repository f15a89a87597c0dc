"""The ways out beside ONNX: ncnn, ExecuTorch, torchvision's module, grid_sample, TensorRT's plugin."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from dcn_plugin.export.agreement import largest_difference
from dcn_plugin.layers import DCNv1, DeformConv2d, DeformRoIPool, SamplingConv
from dcn_plugin.ops import deform_conv2d, ms_deform_attn
from errors.case import Case

IMAGE = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def without(package, module):
    def call(monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        importlib.import_module(module)

    return call


def ncnn(model, *args, found=None, **options):
    def call(tmp_path, monkeypatch):
        from dcn_plugin.export import ncnn as export

        if found is not None:
            monkeypatch.setattr(export, "run_ncnn", lambda *_: [found])
        try:
            export.export_ncnn(model, args, tmp_path / "model", **options)
        finally:
            assert not list(tmp_path.iterdir())

    return call


def no_file_from_pnnx(tmp_path, monkeypatch):
    from dcn_plugin.export import ncnn as export

    monkeypatch.setattr(export.pnnx, "EXEC_PATH", "true")
    export.export_ncnn(DCNv1(4, 4, 3), (IMAGE,), tmp_path / "model")


def ncnn_file(text):
    def call(tmp_path):
        from dcn_plugin.export.ncnn import run_ncnn

        (tmp_path / "model.param").write_text(text)
        (tmp_path / "model.bin").write_bytes(b"")
        run_ncnn(tmp_path / "model.param", (IMAGE,))

    return call


class Calls(nn.Module):
    def forward(self, x):
        return deform_conv2d(x, x.new_zeros(1, 2, 6, 6), x.new_ones(1, 4, 1, 1))


class Knows(nn.Module):
    """What ncnn has no layer for."""

    def forward(self, x):
        return torch.lgamma(x)


def torchvision(model):
    def call():
        from dcn_plugin.export.torchvision import to_torchvision

        to_torchvision(model)

    return call


def hooked():
    layer = DCNv1(4, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


class Attends(nn.Module):
    def forward(self, x):
        return ms_deform_attn(x.flatten(2).transpose(1, 2)[:, :, None], [(6, 6)], x.new_zeros(1, 5, 1, 1, 1, 2))


def plugin_nodes(version):
    from dcn_plugin.export.tensorrt import plugin_nodes

    with plugin_nodes(version):
        pass


class Doubles(SamplingConv):
    def offsets(self, x):
        return x.new_zeros(1, 2, *x.shape[2:]), None

    def forward(self, x):
        return 2 * deform_conv2d(x, self.offsets(x)[0], self.weight, self.bias)


def regions_as_grid_sample():
    from dcn_plugin.export.grid_sample import grid_sample_decompositions

    program = torch.export.export(DeformRoIPool(2), (IMAGE, torch.tensor([[0, 1.0, 1, 4, 4]])))
    program.run_decompositions(grid_sample_decompositions())


def executorch(tmp_path, monkeypatch):
    """A runtime of that name that computes zeros: the package is too much for this."""
    program = SimpleNamespace(to_executorch=lambda: SimpleNamespace(buffer=b"a program"))
    method = SimpleNamespace(execute=lambda given: [torch.zeros(1, 4, 4, 4)])
    loaded = SimpleNamespace(load_method=lambda name: method)
    parts = dict(
        exir=dict(to_edge_transform_and_lower=lambda *_, **__: program),
        runtime=dict(Runtime=SimpleNamespace(get=lambda: SimpleNamespace(load_program=lambda path: loaded))),
    )
    monkeypatch.setitem(sys.modules, "executorch", ModuleType("executorch"))
    for name, values in parts.items():
        module = ModuleType(f"executorch.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, f"executorch.{name}", module)
    monkeypatch.delitem(sys.modules, "dcn_plugin.export.executorch", raising=False)
    export = importlib.import_module("dcn_plugin.export.executorch")
    try:
        export.export_executorch(DCNv1(4, 4, 3), (IMAGE,), tmp_path / "model.pte", partitioners=())
    finally:
        monkeypatch.delitem(sys.modules, "dcn_plugin.export.executorch")
        assert not list(tmp_path.iterdir())


# fmt: off
CASES = [
    Case(
        without("ncnn", "dcn_plugin.export.ncnn"),
        ModuleNotFoundError, "dcn_plugin.export.ncnn", "pip install pnnx ncnn", "needs ncnn",
    ),
    Case(
        without("executorch", "dcn_plugin.export.executorch"),
        ModuleNotFoundError, "dcn_plugin.export.executorch", "pip install executorch", "needs executorch",
    ),
    Case(ncnn(DCNv1(4, 4, 3), torch.ones(2, 4, 6, 6)), ValueError, "args", "float32 tensors [1, ...]", "[2, 4, 6, 6]"),
    Case(ncnn(DCNv1(4, 4, 3), IMAGE.double()), ValueError, "args", "float32", "torch.float64"),
    Case(ncnn(DCNv1(4, 4, 3), IMAGE, other_args=(3,)), ValueError, "other_args", "float32", "got 3"),
    Case(ncnn(Calls(), IMAGE), NotImplementedError, "model", "in its layers alone", "dcn_plugin::deform_conv2d"),
    Case(ncnn(Attends(), IMAGE), NotImplementedError, "model", "in its layers alone", "dcn_plugin::ms_deform_attn"),
    Case(lambda: plugin_nodes(3), ValueError, "version", "expected 1 or 2", "got 3"),
    Case(no_file_from_pnnx, NotImplementedError, "model", "that pnnx converts", "no file"),
    Case(ncnn(Knows(), IMAGE), NotImplementedError, "model", "layers that ncnn has", "torch.lgamma"),
    Case(ncnn(DCNv1(4, 4, 3), IMAGE, found=torch.ones(1, 4)), ArithmeticError, "outputs", "[1, 4, 4, 4]", "[1, 4]"),
    Case(
        ncnn(DCNv1(4, 4, 3), IMAGE, found=torch.full((1, 4, 4, 4), torch.nan)),
        ArithmeticError, "outputs", "within 0.0001 of the largest", "got nan",
    ),
    Case(
        lambda: largest_difference([IMAGE], [IMAGE, IMAGE]), ArithmeticError, "outputs", "expected 2", "got 1",
    ),
    Case(
        ncnn_file("7767517\n1 1\nInput data 0 1 data\n"),
        ValueError, "path", "a file of pnnx, with in0", "got one with data",
    ),
    Case(
        ncnn_file("7767517\n2 2\nInput in0 0 1 in0\nInput in1 0 1 in1\n"), ValueError, "args", "expected 2", "got 1",
    ),
    Case(ncnn_file("no model"), RuntimeError, "path", "a model that ncnn", "model.param"),
    Case(
        # Arguments that are cut into groups before any layer: pnnx does not know their first axis for the batch.
        ncnn(DeformConv2d(4, 4, 3, padding=1, offset_groups=2), IMAGE, torch.zeros(1, 36, 6, 6)),
        RuntimeError, "path", "a model that ncnn computes", "from out0",
    ),
    Case(
        torchvision(nn.Sequential(DeformRoIPool(2))),
        NotImplementedError, "model", "deformable convolutions alone", "DeformRoIPool at '0'",
    ),
    Case(torchvision(hooked()), NotImplementedError, "model", "without hooks", "DCNv1 with ['_forward_hooks']"),
    Case(
        torchvision(nn.Sequential(Doubles(4, 4, 1))),
        NotImplementedError, "model", "at what `offsets` returns", "Doubles at '0', which computes something else",
    ),
    Case(
        regions_as_grid_sample, NotImplementedError,
        "grid_sample_decompositions", "convolution, attention and aggregation alone", "got deform_roi_pool",
    ),
    Case(executorch, ArithmeticError, "outputs", "within 0.0001 of the largest", "got 1"),
]
