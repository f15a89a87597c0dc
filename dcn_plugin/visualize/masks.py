"""Masks of classes, painted on the image: a predicted or an annotated one, as a tensor or a figure.

What `paint_mask` returns goes to `sampling_points(..., picture=)`, which draws where a pixel's class was read from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._figure import new_figure, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["class_colours", "draw_masks", "paint_mask"]


def class_colours(count: int = 256) -> Tensor:
    """Return the colours that PASCAL VOC's masks have for the classes 0, 1, ..., uint8 [count, 3].

    Bit 3k + c of a class is bit 7 - k of its channel c (red, green, blue), so class 0 is black, and neighbours differ.

    Raises:
        ValueError: not 1 to 256 colours.

    Example:
        >>> class_colours(4).tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    if not 1 <= count <= 256:
        raise ValueError(f"count: expected 1 to 256 colours, got {count}")
    classes = torch.arange(count)
    channels = [sum(((classes >> (3 * k + c)) & 1) << (7 - k) for k in range(3)) for c in range(3)]
    return torch.stack([torch.as_tensor(channel) for channel in channels], 1).to(torch.uint8)


def paint_mask(image: Tensor, mask: Tensor, *, alpha: float = 0.6, ignore_index: int = 255) -> Tensor:
    """Return an image with every class but 0 painted over in its colour (`class_colours`), [3, H, W] in 0..1.

    `out = (1 - alpha) * image + alpha * colour` where the mask has a class above 0; ignored pixels are light.

    Args:
        image: [C, H, W] in 0..1; of other than 3 channels the mean is shown.
        mask: integers [H, W]; from 256 on colours repeat.
        alpha: how much of the colour.
        ignore_index: what the mask has where no class is right.

    Raises:
        ValueError: shapes that do not fit, a mask of floating-point numbers.

    Example:
        >>> import torch
        >>> paint_mask(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]), alpha=1.0)[0].tolist()
        [[0.0, 0.501960813999176]]
    """
    if image.dim() != 3 or mask.shape != image.shape[-2:] or mask.is_floating_point():
        raise ValueError(
            f"mask: expected integers [H, W] for an image [C, H, W], got {list(mask.shape)} of {mask.dtype} for "
            f"{list(image.shape)}"
        )
    shown = image.detach().float().cpu()
    if len(shown) != 3:
        shown = shown.mean(0, keepdim=True).expand(3, -1, -1)
    classes = mask.cpu().long()
    colours = class_colours()[classes % 256].movedim(-1, 0) / 255
    colours[:, classes == ignore_index] = torch.tensor([[224.0], [224.0], [192.0]]) / 255
    return torch.where(classes == 0, shown, (1 - alpha) * shown + alpha * colours)


def draw_masks(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    truths: Sequence[Tensor] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    ignore_index: int = 255,
) -> Figure:
    """Draw images beside their masks, and beside the true ones where they are given.

    Args:
        images: [C, H, W] in 0..1 each.
        masks: integers [H, W] each, such as `model(image[None])["out"][0].argmax(0)`.
        truths: the same from annotations.
        class_names: name of each class, for a legend of those that occur; None leaves it out.
        ignore_index: what masks have where no class is right.

    Returns:
        A matplotlib figure with a row for each image.

    Raises:
        ValueError: no image, another number of masks, or shapes that do not fit.
    """
    columns = [("predicted", list(masks)), *([] if truths is None else [("annotated", list(truths))])]
    for title, given in columns:
        if not len(images) or len(given) != len(images):
            raise ValueError(f"masks: expected one {title} for each of some images, got {len(given)} for {len(images)}")
    figure, grid = new_figure(1 + len(columns), len(images))
    names = dict(class_names if isinstance(class_names, Mapping) else enumerate(class_names or ()))
    present: set[int] = set()
    for row, (panels, image) in enumerate(zip(grid, images, strict=True)):
        show_image(panels[0], image, None)
        for axes, (title, given) in zip(panels[1:], columns, strict=True):
            axes.imshow(paint_mask(image, given[row], ignore_index=ignore_index).movedim(0, -1).numpy())
            axes.set_axis_off()
            axes.set_title(title, fontsize=9)
            present |= set(given[row].unique().tolist())
    colours = class_colours().div(255).tolist()
    for key in sorted(present & set(names)):
        panels = grid[0]
        panels[0].plot([], [], "s", color=colours[key % 256], markeredgecolor="#808080", label=names[key])
    if present & set(names):
        figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure
