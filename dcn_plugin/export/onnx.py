"""Export to ONNX: deform_conv2d becomes the standard operator DeformConv, RoI pooling a graph of standard operators.

Needs onnx and onnxscript: `pip install '.[onnx]'` in a clone. What DeformConv makes of numbers that are not finite is
the runtime's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import reference

try:
    import onnx  # noqa: F401  (torch's exporter needs it)
    from onnxscript import evaluator, ir, opset19
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dcn_plugin.export.onnx needs {error.name}, which is not installed: pip install '.[onnx]' in a clone",
        name=error.name,
    ) from error

__all__ = ["custom_translation_table", "export_onnx", "roi_pooling_decompositions", "run_onnx"]

# The first opset that has DeformConv.
OPSET = 19

# ONNX has no operator for these.
_ROI_POOLING = ("deform_roi_pool", "deform_ps_roi_pool", "ps_roi_pool")


@torch.library.custom_op("dcn_plugin_onnx::sum_windows", mutates_args=())
def _sum_windows(maps: Tensor, window: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    """What remains of RoI pooling in the graph, and becomes a Scan over the regions.

    `out[r,g,d,b] = sum_{i,j} weights_y[r,g,b,i] * weights_x[r,g,b,j] * maps[n_r,g,d,i,j]`

    Args:
        maps: `[N, G, D, H, W]`, groups of channels.
        window: `[R, 6]`, (image, top, left) and (image + 1, bottom, right): beyond it the weights are 0.
        weights_y: `[R, G, B, H]`, for each bin of a group.
        weights_x: `[R, G, B, W]`.
    """
    return torch.einsum("rgdij,rgbi,rgbj->rgdb", maps[window[:, 0]], weights_y, weights_x)


@_sum_windows.register_fake
def _(maps: Tensor, window: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    return maps.new_empty(window.shape[0], *maps.shape[1:3], weights_y.shape[2])


def custom_translation_table() -> dict[Callable, Callable]:
    """Return what `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` needs for our operators.

    `deform_conv2d` becomes `DeformConv`, which zero padding and border rule fit exactly; float16 and bfloat16 are
    computed in float32, as they are here. The target must be opset 19 or newer. RoI pooling that is not decomposed
    first (`roi_pooling_decompositions`) raises an error that names `export_onnx`, which does that.

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
    return {
        _op("deform_conv2d"): _deform_conv,
        torch.ops.dcn_plugin_onnx.sum_windows.default: _scan_windows,
        **{_op(name): _refusal(name, "export_onnx writes it as standard operators") for name in _ROI_POOLING},
    }


def roi_pooling_decompositions() -> dict[Callable, Callable[..., Tensor]]:
    """Return what writes RoI pooling with operators that the table above translates, for `run_decompositions`.

    `program.run_decompositions(roi_pooling_decompositions())` of a `torch.export` program is what
    `export_onnx` hands to torch's exporter. Results are the operators', to rounding, and NaN for a region that
    names no image. A pixel that is not finite reaches every bin of the regions around it, in its channel.
    """
    return {_op(name): _decomposition_of(name) for name in _ROI_POOLING}


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
        opset_version: at least 19.

    Raises:
        ValueError: an opset before 19. torch's own errors for whatever does not export.

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
    pooling = roi_pooling_decompositions()
    if any(node.target in pooling for node in program.graph.nodes):
        program = program.run_decompositions(pooling)
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
    """The definition in plain PyTorch, with its samples summed up along each axis first."""
    names = [argument.name for argument in _op(name)._schema.arguments]

    def decompose(*args: Any) -> Tensor:
        given = dict(zip(names, args, strict=True))
        # Runtimes disagree on what is empty, so there is always a region: a last one, left out of the result.
        for of_regions in ("rois", "offset", "mask"):
            if (t := given.get(of_regions)) is not None:
                given[of_regions] = torch.cat((t, t.new_zeros(1, *t.shape[1:])))
        return getattr(reference, name)(**given, pool=_pool_windows)[:-1]

    return decompose


def _pool_windows(
    input: Tensor, rois: Tensor, vertical: Any, horizontal: Any, mask: Tensor | None, bins: Sequence[int], k: int
) -> Tensor:
    """As the definition's own average over the samples of `vertical` and `horizontal`, on `sum_windows`.

    Samples of a bin form a grid and bilinear weights are products, so each axis has weights of its own. They are
    formed from no more samples than can lie on the map, and multiplied in the region's window alone.
    """
    n, channels, height, width = input.shape
    classes = max(vertical.position.shape[1], 1 if mask is None else mask.shape[1])
    # Bins of a group along y and x read the same channels; where k does not divide them, each is a group.
    groups = [k if size % k == 0 else size for size in bins]
    maps = input.to(torch.promote_types(input.dtype, torch.float32))
    maps = maps.reshape(n, classes, channels // classes // k**2, k, k, height, width)
    for i, (size, group) in enumerate(zip(bins, groups, strict=True)):
        if group != k:
            number = torch.arange(size, device=input.device)
            maps = maps.index_select(3 + i, number.mul(k).div(size, rounding_mode="trunc"))
    maps = maps.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 3)
    inner = [size // group for size, group in zip(bins, groups, strict=True)]

    def weights(axis: Any, extent: int) -> Tensor:
        """[R, G, B, extent]."""
        of_bin = reference.axis_weights(axis.position, axis.read, extent) / axis.divisor.clamp(min=1)[..., None]
        of_bin = of_bin.expand(-1, classes, *bins, extent)
        of_bin = of_bin.reshape(-1, classes, groups[0], inner[0], groups[1], inner[1], extent).transpose(3, 4)
        return of_bin.flatten(4, 5).flatten(1, 3)

    weights_y, weights_x = weights(vertical, height), weights(horizontal, width)
    # Where one axis has no sample, none is read: not those of a NaN position either.
    any_y, any_x = ((t != 0).any(-1, keepdim=True) for t in (weights_y, weights_x))
    weights_y, weights_x = torch.where(any_x, weights_y, 0), torch.where(any_y, weights_x, 0)
    image = torch.where((rois[:, 0] >= 0) & (rois[:, 0] < n), rois[:, 0], 0).long()
    (top, bottom), (left, right) = _window(weights_y), _window(weights_x)
    window = torch.stack((image, top, left, image + 1, bottom, right), 1)
    out = torch.ops.dcn_plugin_onnx.sum_windows(maps, window, weights_y, weights_x)
    out = out.reshape(-1, classes, *groups, maps.shape[2], *inner).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.flatten(5, 6).flatten(3, 4)  # [R, classes, D / classes, P_h, P_w]
    if mask is not None:
        out = out * mask[:, :, None]
    return out.flatten(1, 2).to(input.dtype)


def _window(weights: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel with a weight, and the one after the last, for each region; one pixel where none has one."""
    used = (weights != 0).any(2).any(1)
    number = torch.arange(1, used.shape[1] + 1, device=used.device)
    last = torch.where(used, number, 1).amax(1)
    return torch.where(used, number - 1, last[:, None] - 1).amin(1), last


def _scan_windows(maps: Any, window: Any, weights_y: Any, weights_x: Any) -> Any:
    """`sum_windows` as a Scan, whose memory is that of one region; maps are read where they are, not passed along."""
    recorder: Any = evaluator.default()
    outside = len(recorder.nodes)
    at, inputs_y, inputs_x = (
        ir.Value(name=f"{t.name}_of_region", shape=ir.Shape(t.shape[1:]), type=ir.TensorType(t.dtype))
        for t in (window, weights_y, weights_x)
    )

    def entry(i: int) -> Any:
        return opset19.Slice(at, [i], [i + 1])

    values = opset19.Slice(maps, opset19.Slice(at, [0], [3]), opset19.Slice(at, [3], [6]), [0, 3, 4])
    values = opset19.Reshape(values, [0, 0, 0, -1])
    along_y = opset19.Slice(inputs_y, entry(1), entry(4), [2])
    along_x = opset19.Slice(inputs_x, entry(2), entry(5), [2])
    weights = opset19.Mul(opset19.Unsqueeze(along_y, [3]), opset19.Unsqueeze(along_x, [2]))
    weights = opset19.Reshape(weights, [0, 0, -1])
    out = opset19.Squeeze(opset19.MatMul(values, opset19.Transpose(weights, perm=[0, 2, 1])), [0])

    body = ir.Graph((at, inputs_y, inputs_x), (out,), nodes=recorder.nodes[outside:], name="sum_window")
    del recorder.nodes[outside:]
    attributes = (ir.AttrGraph("body", body), ir.AttrInt64("num_scan_inputs", 3))
    scan = ir.Node("", "Scan", (window, weights_y, weights_x), attributes, version=recorder.opset.version)
    recorder.nodes.append(scan)
    return scan.outputs[0]


def _refusal(name: str, reason: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} does not export to ONNX like this: {reason}")

    return refuse
