"""What layers that pool regions share: the fully connected branch for offsets (and masks), and where their bins lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..reference.roi_pool import Frame, of_bins
from ._start import ZeroLinear, warn_if_redrawn
from .arguments import activation
from .samples import Regions, Samples
from .sampling import SamplingModule

RoIs = Tensor | Sequence[Tensor]


def branch(inputs: int, hidden: int, outputs: int, factory: dict[str, Any], layers: int = 3) -> nn.Sequential:
    """Fully connected layers with ReLU in between, the last one zero."""
    widths = [inputs] + [hidden] * (layers - 1)
    inner: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        inner += [nn.Linear(before, after, **factory), nn.ReLU(inplace=True)]
    return nn.Sequential(*inner, ZeroLinear(hidden, outputs, **factory))


class Branched(SamplingModule):
    """What layers with a fully connected branch for offsets (and masks) share."""

    # The learning rate of Dai et al. (2017), section 2.3.
    offset_branches: ClassVar[Mapping[str, float]] = {"offset_fc": 0.01, "mask_fc": 0.01}
    mask_fc: nn.Module | None  # None where the layer has no masks
    offset_lr_option = "roi_offset_lr_mult"
    offset_unit: ClassVar[Literal["pixels", "region"]] = "region"

    def reset_parameters(self) -> None:
        """Initialise the branch as `nn.Linear` does, and its last layers with zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


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


def numbered(rois: RoIs) -> Tensor:
    """Return regions as `[R, 5]` (batch index, x1, y1, x2, y2), whichever of the two ways they are given in."""
    if isinstance(rois, Tensor):
        return rois
    return torch.cat([torch.cat((torch.full_like(boxes[:, :1], n), boxes), 1) for n, boxes in enumerate(rois)])


def regions_of(samples: Samples, output_size: tuple[int, int], frame: Callable[[Tensor], Frame]) -> Regions:
    """Return where the bins of one call lie.

    Args:
        samples: of the call.
        output_size: bins of a region.
        frame: what the operator takes for start and size of regions `[R, 5]`, in pixels of the image.
    """
    rois = numbered(samples.rois).double().cpu()
    start, size = frame(rois)
    (height, width), offset, mask = output_size, samples.offset, samples.mask
    offset = torch.zeros(len(rois), 2, height, width) if offset is None else offset.float().cpu()
    cells = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = (torch.stack(cells, dim=-1) + 0.5) / torch.tensor(output_size)
    # Parts of a region that have an offset may be fewer or more than its bins.
    moves = of_bins(offset, output_size, offset.shape[-2:]).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2)
    return Regions(
        images=rois[:, 0].long(),
        boxes=rois[:, 1:].float(),
        bins=(start[:, None, None] + place * size[:, None, None]).float(),
        shifts=moves * (samples.scale * size)[:, None, None, None].float(),
        mask=None if mask is None else of_bins(mask.float().cpu(), output_size, mask.shape[-2:]),
    )
