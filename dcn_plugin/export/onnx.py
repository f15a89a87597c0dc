"""Export to ONNX: deform_conv2d becomes the standard operator DeformConv, RoI pooling a graph of standard operators.

torch's own `torch.onnx.export(model, args, path)` writes the same, with all of its options: `import dcn_plugin` is what
tells it how. Needs onnx and onnxscript: `pip install '.[onnx]'` in a clone. What DeformConv makes of numbers that are
not finite is the runtime's affair.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ops._exporters import MOVED
from ._onnx_forms import OPSET

__all__ = ["export_onnx", "run_onnx"]


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    opset_version: int = OPSET,
) -> Path:
    """Write `model` to `path` in the ONNX format and return it.

    Args:
        model: in the mode that it is to have, so mostly `model.eval()`.
        args: its arguments, for tracing.
        dynamic_shapes: as `torch.export.export` takes it; None: every size is fixed.
        opset_version: at least 19 where the model has `deform_conv2d`, which becomes DeformConv; 16 where it has
            attention or aggregation, which become GridSample. RoI pooling asks for none.

    Raises:
        ValueError: an opset that lacks one of these. torch's own errors for whatever does not export.

    Outputs in a dict, as a segmenter's, have its keys as names.

    torch writes opset 18 and converts to older ones what it can, which attention is and RoI pooling is not; a file that
    has another opset than was asked for is warned of.

    Example:
        >>> import tempfile, torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3).eval(), torch.randn(2, 4, 8, 8)
        >>> sizes = ({0: torch.export.Dim("batch")},)
        >>> path = export_onnx(layer, (x,), tempfile.mkdtemp() + "/layer.onnx", dynamic_shapes=sizes)
        >>> path.name
        'layer.onnx'
    """
    if MOVED:
        warnings.warn(
            f"torch {torch.__version__} has no table of decompositions where dcn_plugin looks for it ({MOVED}), so its "
            "operators do not become standard ones, and torch refuses them by name",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        exported = torch.onnx.export(
            model, args, dynamo=True, dynamic_shapes=dynamic_shapes, opset_version=opset_version, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        said = str(error.__cause__).partition("\n")[0]  # behind it torch tells where it was
        if said.startswith("opset_version: "):
            raise ValueError(said) from error
        raise
    assert exported is not None
    written = exported.model.opset_imports.get("")
    if written != opset_version:
        warnings.warn(
            f"opset_version: {path} has {written}, as torch does not convert this model to {opset_version}",
            RuntimeWarning,
            stacklevel=2,
        )
    _name_outputs(exported)
    exported.save(path)
    return Path(path)


def _name_outputs(exported: Any) -> None:
    """Give the outputs of a model that returns a dict of tensors its keys as names, where no other value has one."""
    spec, graph = exported.exported_program.call_spec.out_spec, exported.model.graph
    if spec is None or spec.type not in (dict, OrderedDict) or spec.num_leaves != len(graph.outputs):
        return
    named = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    for key, value in zip(spec.context, graph.outputs, strict=True):
        if str(key) not in named | set(graph.initializers):
            value.name = str(key)


def run_onnx(path: str | Path, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what onnxruntime makes of a model and its arguments on the CPU, for comparison with the original."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    arrays = {name: value.numpy() for name, value in zip(names, tree_leaves(args), strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, arrays)]
