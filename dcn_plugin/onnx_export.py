"""Export to ONNX: deform_conv2d becomes the standard operator DeformConv, RoI pooling standard operators where it can.

Needs ``pip install 'dcn_plugin[onnx]'``. What a runtime makes of offsets that are not finite is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import reference

try:
    import onnx  # noqa: F401  (torch's exporter needs it)
    from onnxscript import evaluator, ir, opset19
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dcn_plugin.onnx_export needs {error.name}: pip install 'dcn_plugin[onnx]'", name=error.name
    ) from error

# The first opset that has DeformConv.
OPSET = 19

# RoI pooling -> what of it exports. ONNX has no operator for it.
_ROI_POOLING = {
    "deform_roi_pool": "export_onnx writes it as standard operators when sampling_ratio is at least 1",
    "deform_ps_roi_pool": "export_onnx writes it as standard operators",
    "ps_roi_pool": "the number of pixels in its bins depends on the regions; deform_ps_roi_pool exports",
}


def custom_translation_table() -> dict[Callable, Callable]:
    """Return what ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)`` needs for our operators.

    ``deform_conv2d`` becomes ``DeformConv``, which zero padding and border rule fit exactly; float16 and bfloat16 are
    computed in float32, as they are here. The target must be opset 19 or newer. RoI pooling raises an error that says
    what exports.

    Example:
        >>> import torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3).eval(), torch.randn(1, 4, 8, 8)
        >>> table = custom_translation_table()
        >>> program = torch.onnx.export(
        ...     layer, (x,), dynamo=True, opset_version=19, custom_translation_table=table, verbose=False
        ... )
        >>> [node.op_type for node in program.model.graph if node.op_type == "DeformConv"]
        ['DeformConv']
    """
    return {_op("deform_conv2d"): _deform_conv, **{_op(name): _refusal_of(name) for name in _ROI_POOLING}}


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    opset_version: int = OPSET,
) -> Path:
    """Write ``model`` to ``path`` in the ONNX format and return it.

    Args:
        model: in the mode that it is to have, so mostly ``model.eval()``.
        args: its arguments, for tracing.
        dynamic_shapes: as ``torch.export.export`` takes it; None: every size is fixed.
        opset_version: at least 19.

    Raises:
        ValueError: an opset before 19. NotImplementedError: RoI pooling that standard operators do not express; it
            names the operator. torch's own errors for whatever else does not export.

    Example:
        >>> import tempfile, torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3).eval(), torch.randn(2, 4, 8, 8)
        >>> sizes = ({0: torch.export.Dim("batch")},)
        >>> path = export_onnx(layer, (x,), tempfile.mkdtemp() + "/layer.onnx", dynamic_shapes=sizes)
        >>> path.name
        'layer.onnx'
    """
    _check_opset(opset_version)
    program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
    pooling = {_op(name): _decomposition_of(name) for name in _ROI_POOLING}
    if any(node.target in pooling for node in program.graph.nodes):
        program = program.run_decompositions(pooling)
    for node in program.graph.nodes:
        if node.target in pooling:
            _refusal_of(node.target.overloadpacket.__name__)()
    exported = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        opset_version=opset_version,
        custom_translation_table=custom_translation_table(),
        verbose=False,
    )
    assert exported is not None
    exported.save(path)
    return Path(path)


def run_onnx(path: str | Path, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what onnxruntime makes of a model and its arguments on the CPU, for comparison with the original."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    arrays = {name: value.numpy() for name, value in zip(names, tree_leaves(args), strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, arrays)]


def _op(name: str) -> Any:
    return getattr(torch.ops.dcn_plugin, name).default


def _check_opset(version: int) -> None:
    if version < OPSET:
        raise ValueError(f"opset_version: expected at least {OPSET}, which brought DeformConv, got {version}")


def _deform_conv(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any, stride: Any, padding: Any, dilation: Any
) -> Any:
    _check_opset(evaluator.default().opset.version)
    for name, value in (("input", input), ("offset", offset), ("weight", weight)):
        sizes = value.shape[1:2] if name != "weight" else value.shape
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"{name}: expected fixed channels and a fixed kernel, got shape {value.shape}")
    kernel = [weight.shape[2], weight.shape[3]]
    # Runtimes may compute positions in the type they are given; here that is float32 at least.
    half = input.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    given = [
        opset19.Cast(t, to=ir.DataType.FLOAT.value) if half and t is not None else t
        for t in (input, weight, offset, bias, mask)
    ]
    out = opset19.DeformConv(
        *given,
        dilations=list(dilation),
        group=input.shape[1] // weight.shape[1],
        kernel_shape=kernel,
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
        pads=list(padding),
        strides=list(stride),
    )
    return opset19.CastLike(out, input) if half else out


def _decomposition_of(name: str) -> Callable[..., Tensor]:
    """The definition in plain PyTorch, where its samples are known in number."""
    names = [argument.name for argument in _op(name)._schema.arguments]

    def decompose(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        if name == "ps_roi_pool" or given.get("sampling_ratio", 1) < 1:
            return NotImplemented
        return getattr(reference, name)(**given)

    return decompose


def _refusal_of(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} does not export to ONNX like this: {_ROI_POOLING[name]}")

    return refuse
