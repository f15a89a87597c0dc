"""Offsets that an implementation predicts for more positions than it samples at, and reads the first numbers of."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from ..ops._transforms import unrecorded
from ._start import OffsetPredictor
from .conv import OffsetConv


class PrefixPredictor(OffsetPredictor):
    """The `conv_offset` of a strided layer in DBNet: it has stride 1, and what is too much of its result is not read.

    The authors' operator takes the first `2*G*K * H' * W'` of an image's `2*G*K * H * W` offsets, in memory's order,
    for those of its output, and the masks likewise. EasyOCR's and MhLiao's ResNet-50 was trained that way, and so its
    weights need it. State dicts are those of the layer without it.

    Args:
        layer: a `DCNv1` or `DCNv2`; `layer.conv_offset = PrefixPredictor(layer)`.

    Raises:
        TypeError: `layer` is something else, or its `conv_offset` is no convolution.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv2, PrefixPredictor
        >>> layer = DCNv2(4, 8, 3, stride=2, padding=1)
        >>> layer.conv_offset = PrefixPredictor(layer)
        >>> layer(torch.rand(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, layer: OffsetConv) -> None:
        if not isinstance(layer, OffsetConv):
            raise TypeError(f"layer: expected a DCNv1 or DCNv2, got {type(layer).__name__}")
        old = layer.conv_offset
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"layer.conv_offset: expected a convolution, got {type(old).__name__}")
        super().__init__(
            old.in_channels, old.out_channels, old.kernel_size, 1, old.padding, old.dilation,  # type: ignore[arg-type]
            device=old.weight.device, dtype=old.weight.dtype,
        )  # fmt: skip
        self.offset_rows = layer.offset_outputs
        self.read_stride = layer.stride

    def forward(self, x: Tensor) -> Tensor:
        """Predict for every position of `x`, and keep the first numbers: `[N, outputs, H', W']`."""
        raw = super().forward(x)
        height, width = _strided(raw, self.read_stride)
        parts = [part for part in raw.tensor_split([self.offset_rows], dim=1) if part.shape[1]]
        read = [
            part.flatten(1)[:, : part.shape[1] * height * width].unflatten(1, (part.shape[1], height, width))
            for part in parts
        ]
        return torch.cat(read, dim=1)


@unrecorded
def _strided(raw: Tensor, stride: tuple[int, int]) -> tuple[int, int]:
    return (raw.shape[2] - 1) // stride[0] + 1, (raw.shape[3] - 1) // stride[1] + 1


torch.fx.wrap("_strided")


def prefix_note(model: nn.Module) -> str:
    """Return a sentence of advice where DBNet's weights expect other strided layers than those of `model`, or ''."""
    strided = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, OffsetConv) and layer.stride != (1, 1) and type(layer.conv_offset) is not PrefixPredictor
    ]
    if not strided:
        return ""
    return (
        "DBNet's names; its ResNet-50 predicts the offsets of strided convolutions with stride 1 and reads a part of "
        "them, which these weights need: layer.conv_offset = dcn_plugin.layers.PrefixPredictor(layer) before loading, "
        f"in {', '.join(strided)}"
    )
