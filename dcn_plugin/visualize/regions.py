"""Pictures of detectors: what they find, and where deformable RoI pooling moves the bins of a box.

`record_bins` needs torch alone; what returns a figure needs matplotlib and works without a display. Boxes are (x1, y1,
x2, y2) in pixels of the image, as torchvision has them; points and shifts are (y, x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..layers import Samples, SamplingModule, sampling_layers
from ._figure import evaluating, new_figure, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Detections = Mapping[str, Tensor]
Names = Sequence[str] | Mapping[int, str]


@dataclass(frozen=True)
class BinRecord:
    """Where one call of a deformable RoI pooling layer put the bins of its boxes: what its `forward` sampled with.

    `images` [R] says on which image each of the `boxes` [R, 4] lies. `bins` [R, P_h, P_w, 2] are the centres of the
    undeformed bins, (y, x), and `shifts` [R, classes, P_h, P_w, 2] what is added to them, both in pixels of the image;
    a layer without class-aware offsets has one class. `mask` [R, classes, P_h, P_w] or None. `part` tells the two
    poolings of a call of R-FCN apart, `"scores"` and `"boxes"`.
    """

    name: str
    layer: nn.Module
    images: Tensor
    boxes: Tensor
    bins: Tensor
    shifts: Tensor
    mask: Tensor | None
    part: str = ""

    def shifted(self, labels: Tensor | None = None) -> Tensor:
        """Return the centres of the shifted bins, [R, P_h, P_w, 2]; `labels` [R] choose the class of each box."""
        index = torch.zeros(len(self.bins), dtype=torch.int64)
        if labels is not None and self.shifts.shape[1] > 1:
            index = labels.to(index)
        return self.bins + self.shifts[torch.arange(len(index)), index]


def record_bins(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    boxes: Sequence[Tensor] | None = None,
    layer: str | None = None,
) -> list[BinRecord]:
    """Run `model` on `images` and return a `BinRecord` of each call of its deformable RoI pooling layers, as they ran.

    What `forward` sampled with is read by a hook (`register_sampling_hook`), wherever the offsets come from and however
    the layer is called. R-FCN has two records a call: of its scores, then of its boxes.

    Args:
        model: a detector, or any module with such a layer; its training mode is left as it was.
        images: as the model takes them, [N, C, H, W] or a list of [C, H, W]; or one [C, H, W].
        boxes: boxes [L_n, 4] of each image, in its pixels, to look at: each layer that predicts its offsets is called
            with them once more, on the features it was called with. None takes those that the model itself pooled.
        layer: the layer's name as in `model.named_modules()`; None takes all.

    Raises:
        ValueError: no such layer, none that ran, boxes for another number of images, or for a layer whose offsets are
            arguments.

    Example:
        >>> from dcn_plugin.layers import DeformRoIPoolPack
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.pool = DeformRoIPoolPack(3, 4, deform_fc_channels=8)
        ...     def forward(self, x):
        ...         return self.pool(x, torch.tensor([[0.0, 0.0, 0.0, 12.0, 6.0]]))
        >>> (item,) = record_bins(Model(), torch.zeros(1, 4, 16, 16))
        >>> item.bins[0, 0, 0].tolist(), item.shifts.abs().max().item()
        ([1.0, 2.0], 0.0)
    """
    if isinstance(images, Tensor) and images.dim() == 3:
        images = images[None]
    names = {module: name for name, module in _pools(model, layer).items()}
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"boxes: expected those of {len(images)} images, got {len(boxes)}")
    for given in boxes or ():
        if given.dim() != 2 or given.shape[1] != 4:
            raise ValueError(f"boxes: expected [L, 4] for each image, got {list(given.shape)}")
    sizes = [tuple(image.shape[-2:]) for image in images]
    records: list[BinRecord] = []
    calls: list[tuple[SamplingModule, BoundArguments]] = []

    def look(layer: SamplingModule, samples: Samples) -> None:
        records.append(_bins(names[layer], layer, samples, sizes))

    def keep(layer: SamplingModule, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((layer, signature(layer.forward).bind(*args, **kwargs)))

    with evaluating(model), ExitStack() as hooks:
        for pool in names:
            if boxes is not None:
                hooks.callback(pool.register_forward_pre_hook(keep, with_kwargs=True).remove)
            else:
                hooks.callback(pool.register_sampling_hook(look).remove)
        parameter = next(model.parameters(), torch.empty(0))
        moved = [image.to(parameter.device, parameter.dtype) for image in images]
        model(torch.stack(moved) if isinstance(images, Tensor) else moved)
        hooks.close()
        for pool, call in calls:  # none where the model's own boxes are wanted
            if call.arguments.get("offset") is not None:
                raise ValueError(f"boxes: expected None, as {names[pool]} is given offsets for its own, got boxes")
            places = list(call.arguments)[1]
            like = call.arguments[places]
            like = like if isinstance(like, Tensor) else next(iter(like), moved[0])
            ratios = _ratios(call.arguments.get("image_shapes"), sizes)
            call.arguments[places] = [
                b.to(like) * r.flip(0).repeat(2).to(like) for b, r in zip(boxes or (), ratios, strict=True)
            ]
            with pool.register_sampling_hook(look):
                pool(*call.args, **call.kwargs)
    if not records:
        raise ValueError(
            f"model: expected deformable RoI pooling that runs, got {', '.join(names.values())}, which did not"
        )
    return records


def _pools(model: nn.Module, chosen: str | None) -> dict[str, SamplingModule]:
    found = {
        name: layer
        for name, layer in sampling_layers(model).items()
        if layer.offset_unit == "region" and layer.deformable
    }
    if not found:
        raise ValueError(
            f"model: expected a deformable RoI pooling layer inside, got {type(model).__name__} without any"
        )
    if chosen is not None and chosen not in found:
        raise ValueError(f"layer: expected a deformable RoI pooling layer out of {', '.join(found)}, got {chosen!r}")
    return {chosen: found[chosen]} if chosen is not None else found


def _ratios(resized: Any, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """How many pixels of the layer's image one of ours is, [N, 2], where the detector resizes the images."""
    if resized is None:
        return torch.ones(len(sizes), 2)
    return torch.tensor([tuple(size) for size in resized], dtype=torch.float32) / torch.tensor(sizes)


def _bins(name: str, layer: SamplingModule, samples: Samples, sizes: Sequence[tuple[int, int]]) -> BinRecord:
    found = layer.regions(samples)
    order = found.images.argsort(stable=True)  # the boxes of one image after the other
    of_image, boxes, bins, shifts = (t[order] for t in (found.images, found.boxes, found.bins, found.shifts))
    ratio = _ratios(samples.image_sizes, sizes)[of_image]
    mask = None if found.mask is None else found.mask[order]
    return BinRecord(
        name, layer, of_image, boxes / ratio.flip(1).repeat(1, 2), bins / ratio[:, None, None],
        shifts / ratio[:, None, None, None], mask, samples.part,
    )  # fmt: skip


# -- figures ----------------------------------------------------------------------------------------------------------

_YELLOW, _GREEN, _RED = "#ffd400", "#19ff4b", "#ff2d2d"


def _colour(label: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](label % 10)


def _name(label: int, names: Names | None) -> str:
    if names is None:
        return str(label)
    if isinstance(names, Mapping):
        return str(names.get(label, label))
    return str(names[label]) if 0 <= label < len(names) else str(label)


def _rectangle(axes: Any, box: Sequence[float], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    # A pixel's centre is at its index in matplotlib, its corner in a box.
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, **style))


def _label(axes: Any, box: Sequence[float], text: str, colour: Any) -> None:
    axes.text(
        box[0], box[1], text, fontsize=7, color="white", va="bottom", clip_on=False,
        bbox=dict(facecolor=colour, edgecolor="none", pad=0.8),
    )  # fmt: skip


def draw_detections(
    image: Tensor | Sequence[Tensor],
    detections: Detections | Sequence[Detections],
    targets: Detections | Sequence[Detections] | None = None,
    class_names: Names | None = None,
    threshold: float = 0.5,
) -> Figure:
    """Draw detections of one image or several, and the true boxes where they are known.

    Args:
        image: [C, H, W], or several of any sizes, the way the boxes have them: detections of files are in pixels of the
            upright image, as `dcn_plugin.finetune.images.read_image` reads it.
        detections: for each image `boxes` [L, 4], `labels` [L] and `scores` [L], as torchvision's models return.
        targets: for each image `boxes` and `labels`; drawn dashed.
        class_names: name of each label, by position (label 0 is the background) or by key; those of a loaded detector
            are `dict(enumerate(model.class_names, 1))`.
        threshold: leave out detections with a lower score.

    Returns:
        A matplotlib figure with one panel for each image, at most four in a row; one colour for each class.
    """
    images = [image] if isinstance(image, Tensor) and image.dim() == 3 else list(image)
    found: Any = [detections] if isinstance(detections, Mapping) else list(detections)
    truths: Any = [None] * len(images) if targets is None else [targets] if isinstance(targets, Mapping) else targets
    for name, items in (("detections", found), ("targets", truths)):
        if len(items) != len(images) or not images:
            raise ValueError(f"{name}: expected those of {len(images)} images, at least one, got {len(items)}")
    columns = min(len(images), 4)
    figure, grid = new_figure(columns, -(-len(images) // columns))
    panels = list(grid.flat)
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for axes, picture, boxes, truth in zip(panels, images, found, truths, strict=False):
        show_image(axes, picture, None)
        if truth is not None:
            for box, label in zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True):
                _rectangle(axes, box, edgecolor="white", linewidth=2.2)
                _rectangle(axes, box, edgecolor=_colour(label), linewidth=1.4, linestyle=(0, (3, 2)))
        for box, label, score in zip(*(boxes[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            if score >= threshold:
                _rectangle(axes, box, edgecolor=_colour(label), linewidth=1.6)
                _label(axes, box, f"{_name(label, class_names)} {score:.2f}", _colour(label))
    return figure


def bin_shifts(
    model: nn.Module,
    image: Tensor,
    boxes: Tensor | None = None,
    labels: Tensor | None = None,
    layer: str | None = None,
    count: int = 4,
    class_names: Names | None = None,
    picture: Tensor | None = None,
) -> Figure:
    """Draw where a detector's deformable RoI pooling moves the bins of boxes.

    Args:
        model: a detector (or any module) with deformable RoI pooling.
        image: [C, H, W] as the model takes it.
        boxes: [L, 4] in pixels of the image; None takes the `count` detections with the highest scores.
        labels: [L], with class-aware offsets the class whose bins are drawn; None takes the detected class, or class 0.
        layer: name of the layer, where there are several; None takes the first that ran. The first of
            several calls is drawn; of R-FCN's, the scores.
        count: how many detections to draw.
        class_names: name of each label, by position (label 0 is the background) or by key. None takes the model's own
            `class_names`, which a loaded or restored detector has: the names of the labels from 1 on.
        picture: [C, H, W] to draw instead of `image`.

    Returns:
        A matplotlib figure with one panel for each box (yellow): the centres of the undeformed bins as green crosses,
        of the shifted ones as red points, and a line from the one to the other.

    Raises:
        ValueError: no such layer in the model; no boxes given and none found.

    Source: Dai et al., Deformable Convolutional Networks, 2017, figure 7.
    """
    if image.dim() != 3:
        raise ValueError(f"image: expected [C, H, W], got {list(image.shape)}")
    if boxes is None:
        with evaluating(model):
            parameter = next(model.parameters())
            (found,) = model([image.to(parameter.device, parameter.dtype)])
        order = found["scores"].argsort(descending=True)[:count]
        boxes, labels = found["boxes"][order].cpu(), found["labels"][order].cpu()
        if not len(boxes):
            raise ValueError("boxes: expected some to look at, as the model finds nothing in this image, got None")
    elif not len(boxes):
        raise ValueError("boxes: expected at least one, got none")
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"labels: expected those of {len(boxes)} boxes, got {len(labels)}")
    if class_names is None and getattr(model, "class_names", None):
        class_names = dict(enumerate(cast(Sequence[str], model.class_names), 1))
    item = record_bins(model, [image], [boxes], layer)[0]
    points = item.shifted(labels)
    columns = min(len(boxes), 4)
    figure, grid = new_figure(columns, -(-len(boxes) // columns))
    panels = list(grid.flat)
    for axes in panels[len(boxes) :]:
        axes.set_axis_off()
    for index, axes in enumerate(panels[: len(boxes)]):
        show_image(axes, image, picture)
        _draw_bins(axes, item.boxes[index], item.bins[index], points[index])
        if labels is not None:
            axes.set_title(_name(int(labels[index]), class_names), fontsize=9)
    figure.suptitle(f"bins of {item.name}" + (f", {item.part}" if item.part else ""), fontsize=9)
    return figure


def _draw_bins(axes: Any, box: Tensor, bins: Tensor, points: Tensor) -> None:
    x1, y1, x2, y2 = box.tolist()
    size = torch.tensor([abs(y2 - y1), abs(x2 - x1)])
    height, width = (size / torch.tensor(bins.shape[:2])).tolist()
    # A pixel's centre is at its index in matplotlib.
    rest, moved = bins.reshape(-1, 2) - 0.5, points.reshape(-1, 2) - 0.5
    if len(rest) <= 16:  # more would hide the picture
        for y, x in points.reshape(-1, 2).tolist():
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            _rectangle(axes, corners, edgecolor=_RED, linewidth=0.7, alpha=0.6)
    _rectangle(axes, (x1, y1, x2, y2), edgecolor=_YELLOW, linewidth=2)
    axes.plot([rest[:, 1], moved[:, 1]], [rest[:, 0], moved[:, 0]], color=_RED, linewidth=0.8)
    axes.scatter(rest[:, 1], rest[:, 0], s=26, c=_GREEN, marker="+", linewidths=1.1, zorder=3)
    axes.scatter(moved[:, 1], moved[:, 0], s=12, c=_RED, linewidths=0, zorder=4)
    # Around the box, with whatever was moved out of it.
    margin = 0.15 * size.clamp(min=1)
    low = torch.minimum(moved.amin(0), torch.tensor([min(y1, y2), min(x1, x2)])) - margin
    high = torch.maximum(moved.amax(0), torch.tensor([max(y1, y2), max(x1, x2)])) + margin
    axes.set_xlim(low[1].item(), high[1].item())
    axes.set_ylim(high[0].item(), low[0].item())
