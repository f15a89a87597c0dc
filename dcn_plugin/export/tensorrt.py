"""Attention as TensorRT's own plugin in ONNX files, where they are made for TensorRT alone.

Without it `ms_deform_attn` becomes `GridSample` and standard operators, which every runtime has. Needs neither TensorRT
nor a GPU, and was not run in TensorRT: what is tested is the file, against what NVIDIA says of the plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid_sample import levels

__all__ = ["plugin_nodes"]

# NVIDIA's name. The domain is that in which onnxruntime looks for TensorRT's plugins; TensorRT itself reads the name,
# and these two attributes, which the nodes of all plugins have.
NODE = "trt.plugins::MultiscaleDeformableAttnPlugin_TRT"

_asked: ContextVar[int | None] = ContextVar("version of the plugin", default=None)


@contextmanager
def plugin_nodes(version: int = 2) -> Iterator[None]:
    """Let what is exported to ONNX inside of the `with` block have TensorRT's plugin where it calls `ms_deform_attn`.

    `MultiscaleDeformableAttnPlugin_TRT(value, spatial_shapes, level_start_index, sampling_locations, weights)`, all in
    float32: the plugin would take positions in half precision with half values. Positions, the softmax and fewer points
    on some levels are standard operators before it. Other operators of ours are written as ever.

    Args:
        version: of the plugin: 2, which TensorRT has from 10.11 on, or 1, which it calls deprecated since then.

    Raises:
        ValueError: another version.

    Example:
        >>> import onnx, tempfile, torch
        >>> from dcn_plugin.export.onnx import export_onnx
        >>> from dcn_plugin.export.tensorrt import plugin_nodes
        >>> from dcn_plugin.ops import ms_deform_attn
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, value, locations, weights):
        ...         return ms_deform_attn(value, [(4, 6), (2, 3)], locations, weights)
        >>> given = torch.randn(1, 30, 2, 8), torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
        >>> with plugin_nodes():
        ...     path = export_onnx(Attention(), given, tempfile.mkdtemp() + "/attention.onnx")
        >>> [node.op_type for node in onnx.load(path).graph.node if node.domain]
        ['MultiscaleDeformableAttnPlugin_TRT']
    """
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version!r}")
    token = _asked.set(version)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> int | None:
    """Return the version of the plugin that is to be written now; None: none."""
    return _asked.get()


def ms_deform_attn(version: int, value: Tensor, *arguments: Any) -> Tensor:
    """The operator as a node of TensorRT's plugin; arguments as the operator has them."""
    sampled = list(levels(value.float(), *arguments))
    points = max(level.locations.shape[3] for level in sampled)

    def whole(numbers: list[Any]) -> Tensor:
        """Of ints, which may be symbols."""
        return torch.stack([torch.full((), n, dtype=torch.int32, device=value.device) for n in numbers])

    locations, weights = [], []
    for level in sampled:
        missing = points - level.locations.shape[3]
        own = torch.ones_like(level.locations[..., 0]) if level.weights is None else level.weights
        # Points that are not there lie outside of every map, where nothing is read.
        locations.append(F.pad(level.locations, (0, 0, 0, missing), value=-1.0) if missing else level.locations)
        weights.append(F.pad(own, (0, missing)) if missing else own)
    n, _, heads, channels = value.shape
    shape = [n, locations[0].shape[1], heads, channels]
    out = torch.onnx.ops.symbolic(
        NODE,
        (
            value.float(),
            whole([size for level in sampled for size in (level.height, level.width)]).reshape(-1, 2),
            whole([level.first for level in sampled]),
            torch.stack(locations, 3),
            torch.stack(weights, 3),
        ),
        {"plugin_version": str(version), "plugin_namespace": ""},
        dtype=torch.float32,
        shape=shape,
        version=1,
    )
    return out.flatten(2).to(value.dtype)
