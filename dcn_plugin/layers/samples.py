"""What layers that sample say of themselves and of a call, and the hooks that are told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.fx
from torch import Tensor

from ..ops._transforms import is_tracing

if TYPE_CHECKING:
    from .sampling import SamplingModule


class Samples(NamedTuple):
    """What one call of a layer sampled with, cut off from the graph of gradients.

    Fields:
        input: `[N, C, H, W]`, or feature maps by name where the layer takes several.
        offset: in **(y, x)**, after a bound: `[N, 2*G*K, H', W']` (unit pixels) or `[R, 2 * classes, P_h, P_w]`
            (unit region), in `scale` of them; of attention `[N, 2*M*K, Q]`, from the reference point, in pixels of
            the point's level; of attention to a grid `[N, 2*G, H', W']`, from the layer's `places`; None: undeformed.
        mask: after its activation, one for each pair of `offset`; None: all ones.
        rois: what the layer was given, `[R, 5]` or boxes for each image; None for a convolution.
        image_sizes: (height, width) of each image, where the layer is told.
        scale: the layer's `displacement_scale`.
        part: which of several poolings of one layer this is (`"scores"` or `"boxes"` in R-FCN), or `""`.
    """

    input: Tensor | Mapping[str, Tensor]
    offset: Tensor | None
    mask: Tensor | None = None
    rois: Any = None
    image_sizes: Any = None
    scale: float = 1.0
    part: str = ""


class Window(NamedTuple):
    """How a layer moves over its input like a convolution: all (y, x), `padding` (top, left, bottom, right).

    Stride, padding and dilation are no whole pixels where a layer stretches its grid by some other factor.
    """

    kernel_size: tuple[int, int]
    stride: tuple[float, float]
    padding: tuple[float, float, float, float]
    dilation: tuple[float, float]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (H', W') for an input of this size."""
        (kh, kw), (sy, sx), (top, left, bottom, right), (dy, dx) = self
        return _whole((height + top + bottom - dy * (kh - 1) - 1) // sy + 1), _whole(
            (width + left + right - dx * (kw - 1) - 1) // sx + 1
        )

    def taps(self) -> Tensor:
        """Return where the taps of output pixel (0, 0) lie without offsets, `[K, 2]`."""
        (kh, kw), (dy, dx), (top, left, *_) = self.kernel_size, self.dilation, self.padding
        ys, xs = torch.arange(kh) * dy - top, torch.arange(kw) * dx - left
        return torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).reshape(-1, 2).float()


def _whole(value: Any) -> int:
    """Sizes that are symbols while tracing stay symbols."""
    return int(value) if isinstance(value, float) else value


class Regions(NamedTuple):
    """Where one call put the bins of its regions, in pixels of the image that these are given in; points are (y, x).

    Fields:
        images: `[R]`, on which image of the batch each region lies.
        boxes: `[R, 4]`, (x1, y1, x2, y2) as given.
        bins: `[R, P_h, P_w, 2]`, centres of the undeformed bins.
        shifts: `[R, classes, P_h, P_w, 2]`, what is added to them.
        mask: `[R, classes, P_h, P_w]`, or None.
    """

    images: Tensor
    boxes: Tensor
    bins: Tensor
    shifts: Tensor
    mask: Tensor | None


class OffsetRate(NamedTuple):
    """How a parameter that predicts offsets is trained.

    Fields:
        usual: its learning rate as a multiple of the rest's.
        option: the option of a trainer that changes it, see `SamplingModule.offset_lr_option`.
    """

    usual: float
    option: Literal["offset_lr_mult", "roi_offset_lr_mult"]

    def factor(self, offset_lr_mult: float | None, roi_offset_lr_mult: float | None) -> float | None:
        """Return the multiple of the rest's rate under these options; None where the one in question is None."""
        if self.option == "roi_offset_lr_mult":
            return roi_offset_lr_mult
        return None if offset_lr_mult is None else offset_lr_mult * self.usual


SamplingHook = Callable[[Any, Samples], None]


class Hooks:
    """The hooks of one layer, in the order they came."""

    def __init__(self, hooks: tuple[SamplingHook, ...]) -> None:
        self.hooks = hooks

    # A copy or a pickle of the layer is another layer, which nobody has asked to watch.
    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class SamplingHandle:
    """Takes a hook away again: by `remove()`, or at the end of a `with` block."""

    def __init__(self, layer: SamplingModule, hook: SamplingHook) -> None:
        self._layer: Callable[[], SamplingModule | None] = weakref.ref(layer)
        self._hook: SamplingHook | None = hook

    def remove(self) -> None:
        """Take the hook away; a second time does nothing."""
        layer, hook, self._hook = self._layer(), self._hook, None
        if layer is None or hook is None or layer._sampling_hooks is None:
            return
        left = list(layer._sampling_hooks.hooks)
        if hook in left:
            left.remove(hook)
        layer._sampling_hooks = Hooks(tuple(left)) if left else None

    def __enter__(self) -> SamplingHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def detached(value: Any) -> Any:
    """Cut every tensor in `value` off from the graph of gradients."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: detached(item) for name, item in value.items()}
    return [detached(item) for item in value] if isinstance(value, (list, tuple)) else value


def recorded(*values: Any) -> bool:
    """Tell whether this call writes a graph instead of sampling."""
    return is_tracing() or torch.compiler.is_exporting() or any(isinstance(value, torch.fx.Proxy) for value in values)
