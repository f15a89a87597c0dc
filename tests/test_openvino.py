"""OpenVINO: its deformable convolution agrees with the definition, by every way that a model has to it."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from torch import Tensor, nn

from dcn_plugin import ops, reference

if sys.version_info < (3, 11):
    pytest.skip("no OpenVINO is tested on Python 3.10", allow_module_level=True)

import openvino  # noqa: E402
from onnx_checks import assert_close  # noqa: E402
from test_onnx_export import FORMS, IMAGES, Form  # noqa: E402

from dcn_plugin.export.openvino import convert, extensions  # noqa: E402

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(model: openvino.Model, *given: Tensor) -> Tensor:
    return torch.from_numpy(openvino.compile_model(model, "CPU", FLOAT32)([t.numpy() for t in given])[0])


def exact(model: nn.Module, x: Tensor, monkeypatch) -> Tensor:
    with monkeypatch.context() as changed:
        changed.setattr(ops, "deform_conv2d", reference.deform_conv2d)
        return copy.deepcopy(model).double()(x.double()).float()


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_every_form(name, tmp_path, monkeypatch):
    """Made with one size and run with another; a mask comes with and without a bias."""
    model, x = Form(**FORMS[name]).eval(), torch.randn(2, 6, 9, 8)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamic_shapes=(IMAGES,), verbose=False)
    program = torch.export.export(model, (x,), dynamic_shapes=(IMAGES,))
    other = torch.randn(3, 6, 12, 10)
    wanted = exact(model, other, monkeypatch)
    for way in (
        convert(tmp_path / "m.onnx"),
        convert(program),
        convert(torch.jit.trace(model, x), x),
        convert(model, x),
    ):
        assert_close(run(way, other), wanted)


class Given(nn.Module):
    def forward(self, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return ops.deform_conv2d(x, offset, weight)


def test_the_border_is_ours():
    """Samples around and beyond every edge, in eighths of a pixel: neighbours outside count as zeros."""
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 1, 1)
    offset = torch.randint(-80, 81, (1, 2, 5, 6)) / 8.0
    given = (x, offset, weight)
    wanted = reference.deform_conv2d(x, offset, weight)
    assert_close(run(convert(torch.export.export(Given(), given)), *given), wanted)
    outside = offset.sign() * 9  # nothing is left to read
    assert not run(convert(torch.export.export(Given(), given)), x, outside, weight).any()


def test_float64_is_computed_in_float32():
    given = tuple(torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 9, 9), (1, 2, 9, 9), (3, 4, 1, 1)))
    found = run(convert(torch.export.export(Given(), given)), *given)
    assert found.dtype == torch.float64 and torch.equal(found, found.float().double())
    assert_close(found, Given()(*given), tolerance=1e-5)


def test_half_precision_is_computed_in_float32():
    x, weight = torch.randn(1, 4, 40, 40).half(), torch.randn(3, 4, 1, 1).half()
    given = (x, (torch.randn(1, 2, 40, 40) * 3).half(), weight)
    found = run(convert(torch.export.export(Given(), given)), *given)
    assert found.dtype == torch.float16
    assert_close(found, Given()(*given), tolerance=1e-3)


class Attends(nn.Module):
    """The operator on the maps of two levels, whose sizes it reads off them."""

    def forward(self, *given: Tensor) -> Tensor:
        *maps, locations, weights = given
        value = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1).unflatten(2, (2, 4))
        return ops.ms_deform_attn(value, [level.shape[-2:] for level in maps], locations, weights, softmax=True)


def test_attention(tmp_path):
    def given(n, queries, *sizes):
        shape = n, queries, 2, 2, 3
        return *(torch.randn(n, 8, *size) for size in sizes), torch.rand(*shape, 2) * 1.4 - 0.2, torch.randn(shape)

    free, queries = torch.export.Dim.AUTO, {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    sizes = (({0: free, 2: free, 3: free},) * 2 + (queries,) * 2,)
    program = torch.export.export(Attends(), given(2, 5, (6, 8), (3, 4)), dynamic_shapes=sizes)
    torch.onnx.export(program, (), tmp_path / "m.onnx", verbose=False)
    other = given(3, 9, (9, 5), (4, 7))
    for way in (convert(tmp_path / "m.onnx"), convert(program)):
        assert_close(run(way, *other), Attends()(*other))
    with pytest.raises(Exception, match="ms_deform_attn: expected an operator that OpenVINO has, got attention"):
        openvino.convert_model(program, extension=extensions())


class Aggregates(nn.Module):
    """Offsets and weights in one tensor, as DCNv4 has them."""

    def forward(self, value: Tensor, packed: Tensor) -> Tensor:
        return ops.deform_aggregate2d(value, packed, official_order=True)


def test_aggregation(tmp_path):
    def given(n, *size):
        return torch.randn(n, *size, 8), torch.randn(n, *size, 2, 27)

    free = {i: torch.export.Dim.AUTO for i in range(3)}
    program = torch.export.export(Aggregates(), given(2, 5, 6), dynamic_shapes=(free, free))
    torch.onnx.export(program, (), tmp_path / "m.onnx", verbose=False)
    other = given(3, 7, 4)
    for way in (convert(tmp_path / "m.onnx"), convert(program)):
        assert_close(run(way, *other), Aggregates()(*other))
    with pytest.raises(Exception, match="deform_aggregate2d: expected an operator that OpenVINO has, got aggregation"):
        openvino.convert_model(program, extension=extensions())


def test_what_cannot_be_read_is_named():
    x = torch.randn(1, 6, 9, 8)
    with pytest.raises(Exception, match="input: expected fixed channels and a fixed kernel, got shape"):
        openvino.convert_model(torch.jit.trace(Form(), x), extension=extensions())

    class Pool(nn.Module):
        def forward(self, x: Tensor, rois: Tensor) -> Tensor:
            return ops.deform_roi_pool(x, rois, output_size=2)

    given = (x, torch.tensor([[0, 1.0, 1, 5, 6]]))
    with pytest.raises(Exception, match="deform_roi_pool: expected an operator that OpenVINO has, got RoI pooling"):
        convert(torch.export.export(Pool(), given))


def test_a_conversion_that_fails_leaves_logging_alone():
    """OpenVINO's own leaves the root logger with the level ERROR, so that nobody's warnings are seen any more."""

    class Eigenvalues(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with pytest.raises(Exception, match="No conversion rule"):
        convert(torch.export.export(Eigenvalues(), (torch.eye(3),)))
    assert (root.level, root.filters, root.handlers) == before
