"""Pictures of detectors: what they find, and where deformable RoI pooling moves the bins of a box.

`record_bins` needs torch alone; what returns a figure needs matplotlib and works without a display. Boxes are (x1, y1,
x2, y2) in pixels of the image, as torchvision has them; points and shifts are (y, x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .visualize import _evaluating, _figure, _show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Detections = Mapping[str, Tensor]
Names = Sequence[str] | Mapping[int, str]


@dataclass(frozen=True)
class BinRecord:
    """Where one deformable RoI pooling layer put the bins of its boxes.

    `images` [R] says on which image each of the `boxes` [R, 4] lies. `bins` [R, P_h, P_w, 2] are the centres of the
    undeformed bins, (y, x), and `shifts` [R, classes, P_h, P_w, 2] what is added to them, both in pixels of the image;
    a layer without class-aware offsets has one class. `mask` [R, classes, P_h, P_w] or None.
    """

    name: str
    layer: nn.Module
    images: Tensor
    boxes: Tensor
    bins: Tensor
    shifts: Tensor
    mask: Tensor | None

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
    """Run `model` on `images` and return a `BinRecord` of each of its deformable RoI pooling layers.

    A layer is any module with ``offsets(...)`` and ``output_size``: MultiScaleDeformRoIPool, the ``...Pack`` layers,
    and the position-sensitive maps of a deformable R-FCN.

    Args:
        model: a detector, or any module with such a layer; its training mode is left as it was.
        images: as the model takes them, [N, C, H, W] or a list of [C, H, W]; or one [C, H, W].
        boxes: boxes [L_n, 4] of each image, in its pixels, to look at; None takes those that the model itself pooled.
        layer: the layer's name as in `model.named_modules()`; None takes all.

    Raises:
        ValueError: no such layer, or boxes for another number of images.

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
    calls: list[tuple[nn.Module, tuple]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append((module, (*args, *kwargs.values())))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in names]
    try:
        with _evaluating(model):
            parameter = next(model.parameters())
            moved = [image.to(parameter.device, parameter.dtype) for image in images]
            model(torch.stack(moved) if isinstance(images, Tensor) else moved)
            return [_bins(names[module], module, args, images, boxes) for module, args in calls]
    finally:
        for handle in handles:
            handle.remove()


def _pools(model: nn.Module, chosen: str | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        deformable = hasattr(module, "output_size") and callable(getattr(module, "offsets", None))
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if deformable and not inside and getattr(module, "deformable", True):
            found[name] = module
    if not found:
        raise ValueError(f"model: expected a deformable RoI pooling layer inside, {type(model).__name__} has none")
    if chosen is not None and chosen not in found:
        raise ValueError(f"layer: {chosen!r} is no deformable RoI pooling layer; there are {', '.join(found)}")
    return {chosen: found[chosen]} if chosen is not None else found


def _bins(name: str, layer: Any, args: tuple, images: Any, boxes: Sequence[Tensor] | None) -> BinRecord:
    features, rois, *rest = args
    if isinstance(rois, Tensor):
        rois = [rois[rois[:, 0] == n, 1:] for n in range(len(images))]
    # The layer works in pixels of the resized images, where the detector resizes them.
    ratios = torch.ones(len(images), 2)
    if rest:
        sizes = torch.tensor([tuple(size) for size in rest[0]], dtype=torch.float32)
        ratios = sizes / torch.tensor([tuple(image.shape[-2:]) for image in images])
    if boxes is not None:
        like = rois[0] if rois else torch.empty(0, 4)
        rois = [b.to(like) * r.flip(0).repeat(2).to(like) for b, r in zip(boxes, ratios, strict=True)]
    of_image = torch.cat([torch.full((len(r),), n) for n, r in enumerate(rois)])
    offset, mask = layer.offsets(features, rois, *rest)
    rois = torch.cat(list(rois)).float().cpu()
    ratio = ratios[of_image]
    (height, width), (part_h, part_w) = _pair(layer.output_size), offset.shape[-2:]
    frame = rois
    if hasattr(layer, "offset_scale"):  # position-sensitive pooling rounds the box and counts its last pixel
        frame = rois.sign() * (rois.abs() + 0.5).floor()
        frame = frame + torch.tensor([0.0, 0.0, 1.0, 1.0])
    start, size = frame[:, :2].flip(1), (frame[:, 2:] - frame[:, :2]).flip(1)
    cells = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = (torch.stack(cells, dim=-1) + 0.5) / torch.tensor([height, width])
    bins = (start[:, None, None] + grid * size[:, None, None]) / ratio[:, None, None]

    def of_bin(values: Tensor) -> Tensor:  # a bin takes the part that its corner lies in
        return values[..., (torch.arange(height) * part_h) // height, :][..., (torch.arange(width) * part_w) // width]

    scale = layer.gamma if hasattr(layer, "gamma") else layer.offset_scale
    moves = of_bin(offset.float().cpu()).reshape(len(rois), -1, 2, height, width).permute(0, 1, 3, 4, 2)
    shifts = moves * (scale * size / ratio)[:, None, None, None]
    in_image = rois / ratio.flip(1).repeat(1, 2)
    weights = None if mask is None else of_bin(mask.float().cpu())
    return BinRecord(name, layer, of_image, in_image, bins, shifts, weights)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)


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
        detections: for each image ``boxes`` [L, 4], ``labels`` [L] and ``scores`` [L], as torchvision's models return.
        targets: for each image ``boxes`` and ``labels``; drawn dashed.
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
    figure, grid = _figure(columns, -(-len(images) // columns))
    panels = list(grid.flat)
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for axes, picture, boxes, truth in zip(panels, images, found, truths, strict=False):
        _show_image(axes, picture, None)
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
        layer: name of the layer, where there are several; None takes the first that ran.
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
        with _evaluating(model):
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
    figure, grid = _figure(columns, -(-len(boxes) // columns))
    panels = list(grid.flat)
    for axes in panels[len(boxes) :]:
        axes.set_axis_off()
    for index, axes in enumerate(panels[: len(boxes)]):
        _show_image(axes, image, picture)
        _draw_bins(axes, item.boxes[index], item.bins[index], points[index])
        if labels is not None:
            axes.set_title(_name(int(labels[index]), class_names), fontsize=9)
    figure.suptitle(f"bins of {item.name}", fontsize=9)
    return figure


def _draw_bins(axes: Any, box: Tensor, bins: Tensor, points: Tensor) -> None:
    x1, y1, x2, y2 = box.tolist()
    size = torch.tensor([y2 - y1, x2 - x1])
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
    low = torch.minimum(moved.amin(0), torch.tensor([y1, x1])) - 0.15 * size
    high = torch.maximum(moved.amax(0), torch.tensor([y2, x2])) + 0.15 * size
    axes.set_xlim(low[1].item(), high[1].item())
    axes.set_ylim(high[0].item(), low[0].item())
