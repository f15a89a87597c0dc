"""deform_conv2d as operators that nearly every tool knows: `grid_sample`, a product with the mask, a 1x1 convolution.

For converters and runtimes that take neither our operator nor ONNX's DeformConv, such as ExecuTorch. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.roi_pool import POOLING

__all__ = ["grid_sample_decompositions"]


def grid_sample_decompositions() -> dict[Callable, Callable[..., Tensor]]:
    """Return what writes `deform_conv2d` with `grid_sample`, for `ExportedProgram.run_decompositions`.

    `columns = mask * grid_sample(input, positions)`, `out = conv2d(columns, weight as 1x1)`: about 40 operators, all of
    them ATen's core ones, for any groups, offset groups, padding, stride, dilation and dynamic sizes. float16 and
    bfloat16 are computed in float32. `grid_sample` takes positions in parts of the map, so samples move by up to 1e-7
    of its size: outputs differ by some 1e-6 of the largest, by 1e-5 for noise on maps of 200 pixels. The columns of a
    whole call are in memory at once: K times the input's channels at the output's size.

    Raises:
        NotImplementedError: when a program is decomposed that pools regions; the message names the operator.

    Example:
        >>> import torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3).eval(), torch.randn(1, 4, 8, 8)
        >>> program = torch.export.export(layer, (x,)).run_decompositions(
        ...     {**torch.export.default_decompositions(), **grid_sample_decompositions()}
        ... )
        >>> any("dcn_plugin" in str(node.target) for node in program.graph.nodes)
        False
        >>> torch.allclose(program.module()(x), layer(x), atol=1e-5)
        True
    """
    ours = torch.ops.dcn_plugin
    refused = {getattr(ours, name).default: _refusal(name) for name in POOLING}
    return {ours.deform_conv2d.default: _deform_conv2d, **refused}


def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    stored = input.dtype
    acc = torch.promote_types(stored, torch.float32)
    input, offset, weight = (t.to(acc) for t in (input, offset, weight))
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kh * kw
    offset_groups = offset.shape[1] // (2 * taps)

    def axis(count: int, taps: int, i: int) -> tuple[Tensor, Tensor]:
        """Where the window begins for each output, and how far from there each tap is."""
        numbers = (torch.arange(size, dtype=acc, device=input.device) for size in (count, taps))
        outputs, inside = numbers
        return outputs * float(stride[i]) - float(padding[i]), inside * float(dilation[i])

    rows, tap_rows = axis(out_h, kh, 0)
    columns, tap_columns = axis(out_w, kw, 1)
    shift = offset.reshape(n * offset_groups, kh, kw, 2, out_h, out_w)
    y = shift[:, :, :, 0] + rows[:, None] + tap_rows[:, None, None, None]
    x = shift[:, :, :, 1] + columns + tap_columns[:, None, None]
    # From pixels to [-1, 1] over the map. What lies outside stays just outside, where nothing is read: runtimes count
    # pixels in integers, which infinite positions do not fit.
    grid = torch.stack(
        [(t.clamp(-2, size + 1) * 2.0 + 1.0) / size - 1.0 for t, size in ((x, width), (y, height))],
        dim=-1,
    ).reshape(n * offset_groups, taps * out_h, out_w, 2)
    maps = input.reshape(n * offset_groups, channels // offset_groups, height, width)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if mask is not None:
        sampled = sampled * mask.to(acc).reshape(n * offset_groups, 1, taps * out_h, out_w)
    out = F.conv2d(
        sampled.reshape(n, channels * taps, out_h, out_w),
        weight.reshape(out_channels, group_channels * taps, 1, 1),
        None if bias is None else bias.to(acc),
        groups=channels // group_channels,
    )
    return out.to(stored)


def _refusal(name: str) -> Callable[..., Tensor]:
    def refuse(*_: object, **__: object) -> Tensor:
        raise NotImplementedError(
            f"grid_sample_decompositions: expected deform_conv2d alone, got {name}, which no graph of grid_sample "
            "computes: dcn_plugin.export.onnx.export_onnx writes it for ONNX runtimes"
        )

    return refuse
