"""What decides whether an exported file is kept; the file of a failed export is not left behind."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from errors.table_export import executorch
from run_python import run_python

from dcn_plugin.export import _onnx_forms
from dcn_plugin.export.agreement import largest_difference, require_agreement


def test_the_largest_difference_is_in_parts_of_each_output():
    wanted = dict(a=torch.tensor([1.0, -4]), b=[torch.tensor([100, 3]), torch.tensor([True])], c=torch.empty(2, 0))
    found = dict(a=torch.tensor([1.5, -4]), b=[torch.tensor([90, 3]), torch.tensor([True])], c=torch.empty(2, 0))
    assert largest_difference(found, wanted) == 0.125
    assert largest_difference(wanted, wanted) == largest_difference([], ()) == 0
    assert largest_difference(torch.tensor([False]), torch.tensor([True])) == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_a_number_is_no_agreement(at):
    wanted = [torch.ones(2), torch.ones(2), torch.ones(2)]
    found = [torch.full((2,), torch.nan) if i == at else 1 + i * torch.ones(2) for i in range(3)]
    assert math.isnan(largest_difference(found, wanted))
    with pytest.raises(ArithmeticError, match="got nan"):
        require_agreement(found, wanted, 10)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write = Path.write_bytes

    def half(path, data):
        write(path, data[:1])
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space"):
        executorch(tmp_path, monkeypatch)  # asserts that the folder is empty


def test_an_opset_that_is_not_found_is_said_once():
    _onnx_forms._warn_of_opset.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="an opset without DeformConv or GridSample is not refused: ask for 19 or later"
    ):
        _onnx_forms._check_opset("GridSample")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _onnx_forms._check_opset("GridSample")


MOVED = """
import builtins, warnings
import torch
plain = builtins.__import__
def moved(name, names=None, *rest, **options):
    if name == "torch._decomp" and (names or {}).get("__name__") == "dcn_plugin.ops._exporters":
        raise ImportError("no torch._decomp")
    return plain(name, names, *rest, **options)
builtins.__import__ = moved
import dcn_plugin
layer, x = dcn_plugin.DCNv2(4, 6, 3), torch.randn(1, 4, 8, 8)
layer(x).sum().backward()
warnings.simplefilter("error", RuntimeWarning)
from dcn_plugin.export.onnx import export_onnx
try:
    export_onnx(layer.eval(), (x,), "not written.onnx")
except RuntimeWarning as error:
    print(error)
"""


def test_the_package_works_where_torch_has_moved_its_table_of_decompositions():
    pytest.importorskip("onnxscript")
    assert "has no table of decompositions where dcn_plugin looks for it" in run_python(MOVED)
