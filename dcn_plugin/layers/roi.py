"""Layers that pool regions of interest (RoIs), plain and deformable (Dai et al. 2016 and 2017, Zhu et al. 2019).

Symbols: N batch, C channels, R RoIs, P_h x P_w bins of a RoI. RoIs are `[R, 5]` (batch index, x1, y1, x2, y2) or a
list of `[L_n, 4]` boxes for each image, in pixels of the image. Offsets have no unit: a bin moves by
`gamma * size of the RoI * offset`.

The classes with mmcv's names have mmcv's arguments, state dict, **(x, y)** order of offset channels and sigmoid masks,
so that its checkpoints mean the same here. All others have (y, x), like the rest of this package.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool
from ..ops._check import integer, number, require_dense
from ..ops._transforms import unrecorded
from ._start import ZeroLinear, warn_if_redrawn
from ._torchscript import NotScriptable
from .conv import _check_input, _floating, _pair, activation
from .sampling import SamplingModule

#: Learning rate of the branches below as a multiple of the rest's (Dai et al. 2017, section 2.3).
BRANCH_LR_MULT = 0.01

Size = int | tuple[int, int]
RoIs = Tensor | Sequence[Tensor]

# Symbolic tracing records these as calls: they look at shapes.
torch.fx.wrap("deform_roi_pool")
torch.fx.wrap("deform_ps_roi_pool")
torch.fx.wrap("ps_roi_pool")
torch.fx.wrap("_check_input")
torch.fx.wrap("_swap")


def _swap(offset: Tensor | None) -> Tensor | None:
    """Turn (x, y) into (y, x)."""
    return None if offset is None else _check_pairs(offset).flip(1)


@unrecorded
def _check_pairs(offset: Tensor) -> Tensor:
    require_dense("offset", offset)
    if not isinstance(offset, Tensor) or offset.dim() != 4 or offset.shape[1] != 2:
        got = list(offset.shape) if isinstance(offset, Tensor) else type(offset).__name__
        raise ValueError(f"offset must be [R, 2, P_h, P_w], got {got}")
    return offset


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def branch(inputs: int, hidden: int, outputs: int, factory: dict[str, Any], layers: int = 3) -> nn.Sequential:
    """Fully connected layers with ReLU in between, the last one zero."""
    widths = [inputs] + [hidden] * (layers - 1)
    inner: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        inner += [nn.Linear(before, after, **factory), nn.ReLU(inplace=True)]
    return nn.Sequential(*inner, ZeroLinear(hidden, outputs, **factory))


def factory_arguments(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    _floating("dtype", dtype)
    return dict(device=device, dtype=dtype)


def describe(module: nn.Module, names: Sequence[str]) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)


class _Branched(NotScriptable, SamplingModule):
    """What layers with a fully connected branch for offsets (and masks) share."""

    #: Submodule -> its default learning rate multiplier, see `offset_parameters`.
    offset_branches: ClassVar[dict[str, float]] = {"offset_fc": BRANCH_LR_MULT, "mask_fc": BRANCH_LR_MULT}

    def reset_parameters(self) -> None:
        """Initialise the branch as `nn.Linear` does, and its last layers with zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


class DeformRoIPool(NotScriptable, SamplingModule):
    """Deformable RoI pooling whose offsets are an argument, with mmcv's name, arguments and **(x, y)** offsets.

    `out[r, c, p] = mean_s bilinear(input[n_r, c], corner_r + p * bin_r + s + gamma * size_r * offset[r, p])`

    over the samples s of a bin, without rounding. Without offsets it is torchvision's `roi_align(aligned=True)`.

    Args:
        output_size: bins, integer or (P_h, P_w).
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.
        sampling_ratio: samples along each side of a bin; 0 or -1: as many as the bin has pixels, rounded up.
        gamma: what an offset of 1 is of the RoI's size.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformRoIPool
        >>> layer = DeformRoIPool(output_size=2, sampling_ratio=1)
        >>> image = torch.arange(36.0).reshape(1, 1, 6, 6)  # grows by 1 to the right, by 6 downwards
        >>> rois = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]])
        >>> offset = torch.zeros(1, 2, 2, 2)
        >>> offset[:, 0] = 1.0  # channel 0 is x: all bins move by 0.1 * 4 pixels to the right
        >>> (layer(image, rois, offset) - layer(image, rois)).flatten()
        tensor([0.4000, 0.4000, 0.4000, 0.4000])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2, eq. 6.
    """

    #: No stand-in for a convolution: its forward takes RoIs.
    drop_in: ClassVar[bool] = False

    def __init__(
        self, output_size: Size, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
    ) -> None:
        super().__init__()
        self.output_size = _pair("output_size", output_size, 1)
        self.spatial_scale = number("spatial_scale", spatial_scale, positive=True)
        self.sampling_ratio = integer("sampling_ratio", sampling_ratio, -1)
        self.gamma = number("gamma", gamma, positive=True)

    def _deform(self, input: Tensor, rois: RoIs, offset: Tensor | None, mask: Tensor | None = None) -> Tensor:
        output = self._pool(input, rois, offset, mask)
        if self._sampling_hooks is not None:
            self._sampled(input, offset, mask, rois, None, self.gamma)
        return output

    def _pool(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pool with offsets in (y, x)."""
        return deform_roi_pool(
            input,
            rois,
            offset,
            mask,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
        )

    def forward(self, input: Tensor, rois: RoIs, offset: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            input: `[N, C, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.
            offset: `[R, 2, P_h, P_w]`, **(x, y)** as in mmcv, or None.

        Returns:
            `[R, C, P_h, P_w]`.
        """
        return self._deform(input, rois, _swap(offset))

    def extra_repr(self) -> str:
        return describe(self, ("output_size", "spatial_scale", "sampling_ratio", "gamma"))


class DeformRoIPoolPack(_Branched, DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets, with mmcv's name, arguments and state dict.

    `offset = offset_fc(roi_align(input, rois))`, then `DeformRoIPool`. The branch has three fully connected
    layers, the last one zero at first: a fresh layer is RoIAlign. As in mmcv, the rows of the last one are the x of all
    bins, then the y; `offsets` returns (y, x).

    Args:
        output_size: bins, integer or (P_h, P_w).
        output_channels: C of the input.
        deform_fc_channels: width of the branch.
        spatial_scale, sampling_ratio, gamma: as in `DeformRoIPool`.
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformRoIPoolPack
        >>> layer = DeformRoIPoolPack(output_size=7, output_channels=16, deform_fc_channels=32, spatial_scale=1 / 8)
        >>> rois = torch.tensor([[0, 8.0, 8.0, 40.0, 60.0], [1, 0.0, 0.0, 64.0, 64.0]])
        >>> layer(torch.rand(2, 16, 8, 8), rois).shape
        torch.Size([2, 16, 7, 7])

    Source: Dai et al. (2017), section 2.2, figure 3.
    """

    def __init__(
        self,
        output_size: Size,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = integer("output_channels", output_channels, 1)
        self.deform_fc_channels = integer("deform_fc_channels", deform_fc_channels, 1)
        factory = factory_arguments(device, dtype)
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = branch(bins * self.output_channels, self.deform_fc_channels, 2 * bins, factory)

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        """What `forward` pools with.

        Args:
            input: `[N, C, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.

        Returns:
            Offset `[R, 2, P_h, P_w]` in (y, x), in units of gamma times the RoI's size, and mask `[R, 1, P_h, P_w]`
            (None where the layer has none).
        """
        return self._offset(self._pooled(input, rois)), None

    def _pooled(self, input: Tensor, rois: RoIs) -> Tensor:
        _check_input(input, self.output_channels, next(self.parameters()))
        warn_if_redrawn(self)
        return self._pool(input, rois).flatten(1)

    def _offset(self, pooled: Tensor) -> Tensor:
        return self.offset_fc(pooled).unflatten(1, (2, *self.output_size)).flip(1)

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:  # type: ignore[override]
        """Pool `[N, C, H, W]` to `[R, C, P_h, P_w]`."""
        return self._deform(input, rois, *self.offsets(input, rois))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self, ('output_channels', 'deform_fc_channels'))}"


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """`DeformRoIPoolPack` with a learnt weight for each bin, with mmcv's name, arguments and state dict.

    `out[r, c, p] = mask[r, p] * (what DeformRoIPoolPack gives)`, `mask = sigmoid(mask_fc(roi_align(input, rois)))`

    **The mask of a fresh layer is 0.5, as in mmcv, and halves the output**: mmcv's checkpoints were trained so. Put in
    RoIAlign's place in a trained model, it changes what the model computes; `MultiScaleDeformRoIPool` and
    `DeformPSRoIPoolPack` start at 1.

    Args:
        output_size .. dtype: as in `DeformRoIPoolPack`.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import ModulatedDeformRoIPoolPack
        >>> layer = ModulatedDeformRoIPoolPack(output_size=2, output_channels=4, deform_fc_channels=8)
        >>> offset, mask = layer.offsets(torch.rand(1, 4, 8, 8), [torch.tensor([[1.0, 1.0, 6.0, 6.0]])])
        >>> offset.shape, mask.flatten().tolist()
        (torch.Size([1, 2, 2, 2]), [0.5, 0.5, 0.5, 0.5])

    Source: Zhu et al., Deformable ConvNets v2 (2019), section 3.2, eq. 2.
    """

    def __init__(
        self,
        output_size: Size,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma,
            device=device, dtype=dtype,
        )  # fmt: skip
        bins = self.output_size[0] * self.output_size[1]
        factory = factory_arguments(device, dtype)
        self.mask_fc = branch(bins * self.output_channels, self.deform_fc_channels, bins, factory, layers=2)
        self.mask_fc.append(nn.Sigmoid())

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        pooled = self._pooled(input, rois)
        return self._offset(pooled), self.mask_fc(pooled).unflatten(1, (1, *self.output_size))

    offsets.__doc__ = DeformRoIPoolPack.offsets.__doc__


class PSRoIPool(NotScriptable, nn.Module):
    """Position-sensitive RoI pooling of R-FCN: bin (i, j) averages the pixels it touches, in channels of its own.

    `out[r, d, p] = mean_{q in bin p of r} input[n_r, (d * k + g_y) * k + g_x, q]`, `k = group_size`

    Args:
        output_dim: D, channels of the output.
        group_size: k; the input has `D * k * k` channels.
        output_size: bins, integer or (P_h, P_w); k in the paper.
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import PSRoIPool
        >>> layer = PSRoIPool(output_dim=21, group_size=3, output_size=3, spatial_scale=1 / 16)
        >>> layer(torch.rand(1, 21 * 9, 14, 14), torch.tensor([[0, 16.0, 32.0, 150.0, 100.0]])).shape
        torch.Size([1, 21, 3, 3])

    Source: Dai et al., R-FCN (2016), eq. 1.
    """

    #: No stand-in for a convolution: its forward takes RoIs.
    drop_in: ClassVar[bool] = False

    def __init__(self, output_dim: int, group_size: int, output_size: Size, spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.output_dim = integer("output_dim", output_dim, 1)
        self.group_size = integer("group_size", group_size, 1)
        self.output_size = _pair("output_size", output_size, 1)
        self.spatial_scale = number("spatial_scale", spatial_scale, positive=True)

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:
        """Pool `[N, D * k * k, H, W]` to `[R, D, P_h, P_w]`."""
        return ps_roi_pool(
            input,
            rois,
            output_dim=self.output_dim,
            group_size=self.group_size,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
        )

    def extra_repr(self) -> str:
        return describe(self, ("output_dim", "group_size", "output_size", "spatial_scale"))


class DeformPSRoIPool(PSRoIPool, SamplingModule):
    """Deformable position-sensitive RoI pooling whose offsets (and mask) are arguments of `forward`.

    `out[r, d, p] = mask[r, e, p] * mean_s bilinear(input[n_r, (d * k + g_y) * k + g_x], start_r + p * bin_r + s +`
    `offset_scale * size_r * offset[r, e, p])` with the class `e = d // (D / classes)`, in the original's semantics:
    rounded RoIs, samples outside the map left out of the mean. With `group_size=1` it is plain deformable RoI pooling
    as the original has it.

    Args:
        output_dim: D, channels of the output.
        group_size: k; the input has `D * k * k` channels.
        output_size: bins, integer or (P_h, P_w).
        spatial_scale: pixels of `input` per pixel of the image, e.g. 1/16.
        part_size: cells that offsets and masks are given for, integer or (part_h, part_w); None: one for each bin.
        samples_per_part: samples along each side of a bin.
        offset_scale: what an offset of 1 is of the RoI's size.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformPSRoIPool
        >>> layer = DeformPSRoIPool(output_dim=4, group_size=3, output_size=3, spatial_scale=1 / 16)
        >>> scores, rois = torch.rand(1, 4 * 9, 14, 14), torch.tensor([[0, 16.0, 32.0, 150.0, 100.0]])
        >>> layer(scores, rois, offset=torch.zeros(1, 2, 3, 3)).shape  # one class: offsets for all 4 channels
        torch.Size([1, 4, 3, 3])

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.2.
    """

    def __init__(
        self,
        output_dim: int,
        group_size: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        part_size: Size | None = None,
        samples_per_part: int = 4,
        offset_scale: float = 0.1,
    ) -> None:
        super().__init__(output_dim, group_size, output_size, spatial_scale)
        self.part_size = self.output_size if part_size is None else _pair("part_size", part_size, 1)
        self.samples_per_part = integer("samples_per_part", samples_per_part, 1)
        self.offset_scale = number("offset_scale", offset_scale, positive=True)

    def forward(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            input: `[N, D * k * k, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.
            offset: `[R, 2 * classes, part_h, part_w]`, (y, x) for each class, or None.
            mask: `[R, classes, part_h, part_w]` or None.

        Returns:
            `[R, D, P_h, P_w]`.
        """
        output = self._pool(input, rois, offset, mask)
        if self._sampling_hooks is not None:
            self._sampled(input, offset, mask, rois, None, self.offset_scale)
        return output

    def _pool(self, input: Tensor, rois: RoIs, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return deform_ps_roi_pool(
            input,
            rois,
            offset,
            mask,
            output_dim=self.output_dim,
            group_size=self.group_size,
            output_size=self.output_size,
            part_size=self.part_size,
            samples_per_part=self.samples_per_part,
            spatial_scale=self.spatial_scale,
            offset_scale=self.offset_scale,
        )

    def extra_repr(self) -> str:
        more = describe(self, ("part_size", "samples_per_part", "offset_scale"))
        return f"{super().extra_repr()}, {more}"


class DeformPSRoIPoolPack(_Branched, DeformPSRoIPool):
    """Deformable position-sensitive RoI pooling that predicts its offsets from what it pools without them.

    `offset = offset_fc(pool(input, rois))`; with `modulated`, `mask = 2 * sigmoid(mask_fc(h))` on the last hidden
    layer h of `offset_fc`. The last layers are zero at first: a fresh layer is `DeformPSRoIPool` without
    offsets. The rows of `offset_fc`'s last layer are, for each class, the y of all cells, then the x.

    Args:
        output_dim .. offset_scale: as in `DeformPSRoIPool`.
        deform_fc_channels: width of the branch.
        offset_classes: classes with offsets (and masks) of their own; divides `output_dim`.
        modulated: learn a weight for each cell, too.
        mask_activation: `'2*sigmoid'` (mask 1 at first) or `'sigmoid'` (0.5 at first: what weights trained with
            earlier implementations expect).
        device: where the parameters live.
        dtype: floating-point type of the parameters.

    `offset_mask_fc.*` of CharlesShang's `DCNPooling` loads into a modulated layer with one class: its last layer is
    split, and its (x, y) turned to (y, x). Its masks are sigmoid. `offset_fc` of mmdetection 1.x'
    `DeformRoIPoolingPack` has this layer's names, but (x, y) in its last layer: turn them before loading.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DeformPSRoIPoolPack
        >>> layer = DeformPSRoIPoolPack(4, group_size=3, output_size=3, deform_fc_channels=16, modulated=True)
        >>> offset, mask = layer.offsets(torch.rand(1, 4 * 9, 14, 14), torch.tensor([[0, 1.0, 2.0, 12.0, 10.0]]))
        >>> offset.shape, mask.shape, bool((mask == 1).all())
        (torch.Size([1, 2, 3, 3]), torch.Size([1, 1, 3, 3]), True)

    Source: Dai et al. (2017), section 2.2; Zhu et al. (2019), section 3.2.
    """

    def __init__(
        self,
        output_dim: int,
        group_size: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        part_size: Size | None = None,
        samples_per_part: int = 4,
        offset_scale: float = 0.1,
        deform_fc_channels: int = 1024,
        offset_classes: int = 1,
        modulated: bool = False,
        mask_activation: str = "2*sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(output_dim, group_size, output_size, spatial_scale, part_size, samples_per_part, offset_scale)
        self.deform_fc_channels = integer("deform_fc_channels", deform_fc_channels, 1)
        self.offset_classes = integer("offset_classes", offset_classes, 1)
        if self.output_dim % self.offset_classes:
            raise ValueError(
                f"output_dim must be divisible by offset_classes, got {self.output_dim} and {self.offset_classes}"
            )
        self.modulated = flag("modulated", modulated)
        activation(mask_activation)
        self.mask_activation = mask_activation
        factory = factory_arguments(device, dtype)
        inputs = self.output_dim * self.output_size[0] * self.output_size[1]
        cells = self.offset_classes * self.part_size[0] * self.part_size[1]
        self.offset_fc = branch(inputs, self.deform_fc_channels, 2 * cells, factory)
        if self.modulated:
            self.mask_fc = ZeroLinear(self.deform_fc_channels, cells, **factory)

    def offsets(self, input: Tensor, rois: RoIs) -> tuple[Tensor, Tensor | None]:
        """What `forward` pools with.

        Args:
            input: `[N, D * k * k, H, W]`.
            rois: `[R, 5]` or a list of boxes for each image.

        Returns:
            Offset `[R, 2 * classes, part_h, part_w]`, (y, x) for each class, in units of
            offset_scale times the RoI's size, and mask `[R, classes, part_h, part_w]` (None unless `modulated`).
        """
        offset, mask = predict(self, self._pool(input, rois))
        offset = offset.unflatten(1, (2 * self.offset_classes, *self.part_size))
        return offset, None if mask is None else mask.unflatten(1, (self.offset_classes, *self.part_size))

    def forward(self, input: Tensor, rois: RoIs) -> Tensor:  # type: ignore[override]
        """Pool `[N, D * k * k, H, W]` to `[R, D, P_h, P_w]`."""
        return super().forward(input, rois, *self.offsets(input, rois))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        split_offset_mask_fc(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        more = describe(self, ("deform_fc_channels", "offset_classes", "modulated"))
        mask = f", mask_activation={self.mask_activation!r}" if self.modulated else ""
        return f"{super().extra_repr()}, {more}{mask}"


def predict(layer: Any, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run a branch whose mask shares the hidden layers of the offset: rows of offsets, rows of masks or None."""
    hidden = pooled.flatten(1)
    warn_if_redrawn(layer)
    if not layer.modulated:
        return layer.offset_fc(hidden), None
    *trunk, last = layer.offset_fc
    for module in trunk:
        hidden = module(hidden)
    return last(hidden), activation(layer.mask_activation)(layer.mask_fc(hidden))


def split_offset_mask_fc(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Rename and split, in place, CharlesShang's `offset_mask_fc` for modulated layers with one class.

    Its last layer has the x of all cells, the y, then the mask: here the y and x of `offset_fc`, and `mask_fc`.

    Args:
        module: the model or layer the keys are for.
        state_dict: changed in place.
        prefix: of the module's keys in `state_dict`, ending in a dot.

    Returns:
        Old names to new names, two where a tensor was split; empty where nothing was renamed.
    """
    renamed = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not (isinstance(layer, DeformPSRoIPoolPack) and layer.modulated and layer.offset_classes == 1):
            continue
        path = f"{prefix}{name}." if name else prefix
        cells = layer.part_size[0] * layer.part_size[1]
        for kind in ("weight", "bias"):
            for index in (0, 2, 4):
                old, new = (f"{path}{fc}.{index}.{kind}" for fc in ("offset_mask_fc", "offset_fc"))
                if old not in state_dict or new in state_dict or (index == 4 and len(state_dict[old]) != 3 * cells):
                    continue
                value = state_dict.pop(old)
                renamed[old] = new
                if index == 4:
                    x, y, mask = value.split(cells)
                    value = torch.cat((y, x))
                    state_dict[f"{path}mask_fc.{kind}"] = mask
                    renamed[old] += f" and {path}mask_fc.{kind}"
                state_dict[new] = value
    return renamed


def offset_parameters(model: nn.Module) -> dict[str, float]:
    """Names of the parameters that predict offsets and masks, with their usual learning rate multiplier.

    1.0 for every `conv_offset`, 0.01 for the fully connected branches of RoI pooling (Dai et al. 2017, section 2.3).
    A module class of your own says so with a class attribute: `offset_branches = {"<submodule>": <multiplier>}`.

    Args:
        model: any module.

    Returns:
        Parameter name, as in `model.named_parameters()`, to multiplier, in the model's order.

    Example:
        >>> from torch import nn
        >>> from dcn_plugin.layers import DCNv1, DeformRoIPoolPack, offset_parameters
        >>> model = nn.ModuleDict(dict(conv=DCNv1(4, 4, 3), pool=DeformRoIPoolPack(2, 4, deform_fc_channels=8)))
        >>> multipliers = offset_parameters(model)
        >>> multipliers["conv.conv_offset.weight"], multipliers["pool.offset_fc.0.weight"], len(multipliers)
        (1.0, 0.01, 8)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    declared: dict[int, float] = {}
    for module in model.modules():
        # Of the class, where a submodule or buffer of that name cannot be.
        for name, multiplier in getattr(type(module), "offset_branches", {}).items():
            predictor = getattr(module, name, None)
            if isinstance(predictor, nn.Module):
                declared.update((id(parameter), multiplier) for parameter in predictor.parameters())
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in declared:
            found[name] = declared[id(parameter)]
        elif "conv_offset" in name:
            found[name] = 1.0
    return found
