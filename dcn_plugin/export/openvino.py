"""Models for OpenVINO: its readers learn deform_conv2d, which becomes OpenVINO's own DeformableConvolution.

`ms_deform_attn` and `deform_aggregate2d` come as the GridSample and the sum that they are in ONNX, of an ONNX file or a
`torch.export` program.

Needs OpenVINO: `pip install openvino`. Its CPU plugin computes in bfloat16 by default where the processor has
instructions for it; `compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})` asks for float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..ops.roi_pool import POOLING
from .grid_sample import grid_sample_decompositions

try:
    import openvino
    from openvino import opset8
    from openvino.frontend import onnx as onnx_frontend
    from openvino.frontend import pytorch as pytorch_frontend
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dcn_plugin.export.openvino needs {error.name}, which is not installed: pip install openvino", name=error.name
    ) from error

__all__ = ["convert", "extensions"]

# What becomes grid_sample and a sum, and what it is.
SAMPLED = {"ms_deform_attn": "attention", "deform_aggregate2d": "aggregation"}


def extensions() -> list[Any]:
    """Return what lets OpenVINO read our operators: `DeformConv` of ONNX, `torch.export` programs, traced modules.

    For `openvino.convert_model(..., extension=extensions())`, or each for `openvino.Core().add_extension`. RoI pooling,
    attention and aggregation of programs and traced modules raise an error that says what to do instead.

    Example:
        >>> import openvino, torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3, padding=1).eval(), torch.randn(1, 4, 8, 8)
        >>> traced = torch.jit.trace(layer, x)
        >>> model = openvino.convert_model(traced, input=[("input", [-1, 4, -1, -1])], extension=extensions())
        >>> [op.get_type_name() for op in model.get_ops() if "Deformable" in op.get_type_name()]
        ['DeformableConvolution']
    """
    made = [onnx_frontend.ConversionExtension("DeformConv", "", _from_onnx)]
    # torch.export and torch.jit write the name of an operator in their own ways.
    for spelling in ("dcn_plugin.{}.default", "dcn_plugin::{}"):
        made.append(pytorch_frontend.ConversionExtension(spelling.format("deform_conv2d"), _from_torch))
        for name in (*POOLING, *SAMPLED):
            made.append(pytorch_frontend.ConversionExtension(spelling.format(name), _refusal(name)))
    return made


def convert(model: nn.Module | torch.export.ExportedProgram | str | Path, example_input: Any = None) -> Any:
    """Return `model` as an `openvino.Model`, to compile or to save; its weights stay what they are.

    Deformable convolutions are computed in float32 at most, in float64 models too: their results are float32 numbers
    that are stored as float64. So they are in float16 and bfloat16 models.

    Args:
        model: an ONNX file; what `torch.export.export` or `torch.jit.trace` made of a module; or a module in the mode
            that it is to have, which OpenVINO traces.
        example_input: arguments of a traced module or a module, a tensor or a tuple of tensors. Images `[N, C, H, W]`
            keep their channels; every other size becomes free. A file and a program say themselves what is free.

    Returns:
        The model, its operators OpenVINO's own.

    Raises:
        ValueError: a module without `example_input`.
        Exception: OpenVINO's own errors for whatever it cannot read.

    Example:
        >>> import openvino, torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3, padding=1).eval(), torch.randn(2, 4, 9, 7)
        >>> model = convert(layer, torch.randn(1, 4, 8, 8))
        >>> compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        >>> torch.allclose(torch.from_numpy(compiled(x.numpy())[0]), layer(x), atol=1e-5)
        True
    """
    options: dict[str, Any] = dict(extension=extensions())
    if isinstance(model, torch.export.ExportedProgram):
        program, written = model, grid_sample_decompositions()
        sampled = {op: written[op] for op in (getattr(torch.ops.dcn_plugin, name).default for name in SAMPLED)}
        if any(node.target in sampled for node in program.graph.nodes):
            program = program.run_decompositions(sampled)
        names, model = _inputs_of(program), program
        sizes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.name in names}
        options["input"] = [(name, [size if isinstance(size, int) else -1 for size in sizes[name]]) for name in names]
    elif isinstance(model, nn.Module):
        if example_input is None:
            raise ValueError("example_input: expected the arguments of a module, got None")
        given = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        shapes = [[t.shape[1] if (t.dim(), i) == (4, 1) else -1 for i in range(t.dim())] for t in given]
        options |= dict(example_input=given, input=shapes)
        if isinstance(model, torch.jit.ScriptModule):  # OpenVINO overlooks shapes without names there
            names = [value.debugName() for value in model.graph.inputs()][1:]
            options["input"] = list(zip(names, shapes, strict=True))
    with _logging_as_it_was():
        return openvino.convert_model(model, **options)


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Keep the root logger: a conversion that fails leaves it with the level ERROR, and nobody's warnings are seen."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters, root.handlers
    root.filters, root.handlers = list(filters), list(handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _inputs_of(program: torch.export.ExportedProgram) -> list[str]:
    return [name for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _from_onnx(node: Any) -> list[Any]:
    input, weight, offset, bias, mask = _inputs(node)
    strides, dilations = (list(node.get_attribute(name, [1, 1])) for name in ("strides", "dilations"))
    pads = list(node.get_attribute("pads", [0, 0, 0, 0]))
    return _convolution(input, offset, weight, bias, mask, strides, pads, dilations)


def _from_torch(node: Any) -> list[Any]:
    strides, pads, dilations = (list(node.get_values_from_const_input(i)) for i in (5, 6, 7))
    input, offset, weight, bias, mask = _inputs(node)
    return _convolution(input, offset, weight, bias, mask, strides, pads, dilations)


def _inputs(node: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Our five tensors; None for one that is absent: at the end it is missing, else it has no type."""

    def at(i: int) -> Any:
        value = node.get_input(i) if i < node.get_input_size() else None
        return None if value is None or value.get_element_type().is_dynamic() else value

    return at(0), at(1), at(2), at(3), at(4)


def _convolution(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any, strides: list[int], pads: list[int],
    dilations: list[int],
) -> list[Any]:  # fmt: skip
    """DeformableConvolution, and the bias, which that lacks."""
    _, group_channels, *kernel = _fixed("weight", weight, 0, 1, 2, 3)
    (channels,), (offsets,) = _fixed("input", input, 1), _fixed("offset", offset, 1)
    of_result = input
    of_other_type = input.get_element_type() != openvino.Type.f32
    if of_other_type:  # of offsets in half precision, whole pixels alone would remain
        tensors = (input, offset, weight, bias, mask)
        input, offset, weight, bias, mask = (None if t is None else opset8.convert(t, "f32") for t in tensors)
    out = opset8.deformable_convolution(
        input, offset, weight, strides, pads[:2], pads[2:], dilations, mask,
        group=channels // group_channels, deformable_group=offsets // (2 * kernel[0] * kernel[1]),
        # Neighbours outside of the input count as zeros, and do not make the whole sample zero.
        bilinear_interpolation_pad=True,
    )  # fmt: skip
    if bias is not None:
        out = opset8.add(out, opset8.reshape(bias, [1, -1, 1, 1], False))
    return [*(opset8.convert_like(out, of_result) if of_other_type else out).outputs()]


def _fixed(name: str, value: Any, *axes: int) -> list[int]:
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic or any(shape[axis].is_dynamic for axis in axes):
        raise ValueError(
            f"{name}: expected fixed channels and a fixed kernel, got shape {shape}: use "
            "dcn_plugin.export.openvino.convert, or give openvino.convert_model input=[(name, [-1, channels, -1, -1])]"
        )
    return [shape[axis].get_length() for axis in axes]


def _refusal(name: str) -> Any:
    if name in SAMPLED:
        way = "give dcn_plugin.export.openvino.convert an ONNX file, or what torch.export.export makes"
        got = f"{SAMPLED[name]}: {way}"
    else:
        got = "RoI pooling: torch.onnx.export it for onnxruntime"

    def refuse(_: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: expected an operator that OpenVINO has, got {got}")

    return refuse
