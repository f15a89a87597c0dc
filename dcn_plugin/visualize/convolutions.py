"""Look inside deformable convolutions and attention to deformed grids: sampling points, offsets, effective dilation.

The functions that return tensors need torch alone; those that return a figure need matplotlib, touch none of its global
state and so work without a display. Positions are (y, x) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import Samples, SamplingModule, Window, sampling_layers
from ._figure import evaluating, new_figure, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = tuple[float, float]


@dataclass(frozen=True)
class LayerRecord:
    """What one call of a deformable layer did to one batch: what its `forward` sampled with.

    `offset` [N, G, K, 2, H', W'] in pixels of the layer's input, (y, x); `mask` [N, G, K, H', W'] or None. `places`
    [H', W', 2] is where samples lie at first, where all outputs share them (attention to a grid, K = 1), else None.
    `grid` maps a pixel p of the layer's input to image pixels, per axis `p * scale + shift`, as
    ((scale_y, shift_y), (scale_x, shift_x)); `out_grid` does the same for the layer's output. `call` counts the calls
    of the layer from 0. `window` is how the layer moved over its input; None where it has `places`.
    """

    name: str
    layer: SamplingModule
    offset: Tensor
    mask: Tensor | None
    input_size: tuple[int, int]
    grid: tuple[tuple[float, float], tuple[float, float]]
    out_grid: tuple[tuple[float, float], tuple[float, float]]
    call: int = 0
    places: Tensor | None = None
    window: Window | None = None

    def taps(self) -> Tensor:
        """Return where the taps of output pixel (0, 0) lie without offsets, [K, 2]; of a grid's sample from itself."""
        return torch.zeros(1, 2) if self.window is None else self.window.taps()

    def positions(self, y: int, x: int, group: int = 0, sample: int = 0) -> Tensor:
        """Return where output pixel (y, x) samples the layer's input, [K, 2]; of a grid all of its [H' * W', 2]."""
        if self.window is None:
            assert self.places is not None
            return (self.places + self.offset[sample, group, 0].permute(1, 2, 0)).reshape(-1, 2)
        stride = torch.tensor(self.window.stride, dtype=torch.float32)
        return torch.tensor([y, x]) * stride + self.taps() + self.offset[sample, group, :, :, y, x]


def effective_dilation(offset: Tensor, kernel_size: Sequence[int], dilation: Sequence[float] = (1, 1)) -> Tensor:
    """Return the mean distance between adjacent sampling points of a filter, [N, G, H', W'] in pixels.

    `mean over neighbouring taps k, l of |k*dilation + offset_k - l*dilation - offset_l|`; equals the dilation where the
    offsets are zero (and 0 for a 1x1 kernel, which has no neighbours).

    Args:
        offset: [N, 2*G*K, H', W'] in pixels, (y, x) interleaved per tap.
        kernel_size: (height, width) of the kernel.
        dilation: (y, x).

    Raises:
        ValueError: `offset` is not 4-dimensional or its channels do not fit the kernel.

    Example:
        >>> import torch
        >>> effective_dilation(torch.zeros(1, 18, 1, 1), (3, 3), (2, 2)).item()
        2.0

    Source: Dai et al., Deformable Convolutional Networks, 2017, table 2.
    """
    kh, kw = kernel_size
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * kh * kw):
        raise ValueError(
            f"offset: expected [N, 2*G*K, H', W'] with K={kh * kw} taps, got {list(offset.shape)} "
            f"for kernel_size {(kh, kw)}"
        )
    n, _, h, w = offset.shape
    taps = offset.float().reshape(n, -1, kh, kw, 2, h, w)
    along_y = taps.diff(dim=2)
    along_x = taps.diff(dim=3)
    step = torch.eye(2, device=offset.device) * torch.tensor(dilation, device=offset.device)
    pairs = [
        torch.linalg.vector_norm(d + s.reshape(2, 1, 1), dim=4).flatten(2, 3)
        for d, s in ((along_y, step[0]), (along_x, step[1]))
    ]
    distances = torch.cat(pairs, dim=2)
    return distances.mean(dim=2) if distances.shape[2] else offset.new_zeros(n, taps.shape[1], h, w)


# Kernel, stride, padding above and to the left, and dilation.
Geometry = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]


def _of_window(window: Window | None) -> Geometry | None:
    return window and (window.kernel_size, window.stride, window.padding[:2], window.dilation)


def _spatial(module: nn.Module) -> Geometry | None:
    """Return how a layer moves over the image, or None where it does not."""
    if isinstance(module, SamplingModule):
        return _of_window(module.window)
    kernel = getattr(module, "kernel_size", None)
    if kernel is None or isinstance(module, nn.modules.conv._ConvTransposeNd):
        return None

    def pair(value: Any) -> list[int]:
        return list(value[:2]) if isinstance(value, (tuple, list)) else [value, value]

    dilation = pair(getattr(module, "dilation", 1))
    padding = getattr(module, "padding", 0)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, pair(kernel), strict=True)]
    elif isinstance(padding, str):
        padding = 0
    return pair(kernel), pair(getattr(module, "stride", None) or kernel), pair(padding), dilation


def _knows_in_a_call(layer: SamplingModule) -> bool:
    """Tell whether a layer says how it moved, or where its places are, when it has seen its input."""
    own = type(layer)
    return own.places is not SamplingModule.places or own.window_in is not SamplingModule.window_in


def _size(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def record(
    model: nn.Module, images: Tensor, layers: Sequence[str] | None = None, call: int | None = None
) -> list[LayerRecord]:
    """Run `model` on `images` and return a `LayerRecord` of each call of its deformable layers, in the order they ran.

    What `forward` sampled with is read by a hook (`register_sampling_hook`), wherever the offsets come from. The link
    between a feature map and the image is followed through every strided or unpadded layer with a kernel.

    Args:
        model: any module with deformable convolutions (layers that have a `window`) or attention to deformed grids
            (layers that have `places`) inside; its training mode is left as it was.
        images: [N, C, H, W] as the model takes them (or [C, H, W] for one).
        layers: names of layers to keep, or one name, as in `model.named_modules()`; None keeps all.
        call: which call of each layer to keep, where one runs several times (shared over the levels of a pyramid): 0
            is the first, -1 the last; None keeps all.

    Raises:
        ValueError: no deformable layer in the model, a name that is not one of them, or one that did not run (so
            often).

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import DCNv2
        >>> model = torch.nn.Sequential(DCNv2(3, 8, 3, padding=1))
        >>> record(model, torch.zeros(1, 3, 8, 8))[0].offset.shape
        torch.Size([1, 1, 9, 2, 8, 8])
    """
    images = _batch(images)
    layers = [layers] if isinstance(layers, str) else layers
    found = {
        name: layer
        for name, layer in sampling_layers(model).items()
        if layer.window is not None or _knows_in_a_call(layer)
    }
    if not found:
        raise ValueError(f"model: expected deformable convolutions inside, got {type(model).__name__} without any")
    for name in layers or ():
        if name not in found:
            raise ValueError(f"layers: expected deformable layers out of {', '.join(found)}, got {name!r}")
    records: list[LayerRecord] = []
    calls = dict.fromkeys(found, 0)
    height, width = _size(images)
    # Size of a feature map -> how its pixels lie on the image. The first layer that makes a size defines it: parallel
    # branches of the same size agree up to their padding.
    grids = {(height, width): ((1.0, 0.0), (1.0, 0.0))}

    def grid_of(size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
        spread = [(full / part, (full / part - 1) / 2) for full, part in zip((height, width), size, strict=True)]
        return grids.setdefault(size, (spread[0], spread[1]))

    def advance(geometry: Geometry | None, before: tuple[int, int], after: tuple[int, int]) -> None:
        if geometry is not None and after not in grids and before in grids:
            moved = [
                (scale * s, shift + scale * ((k - 1) * d / 2 - p))
                for (scale, shift), k, s, p, d in zip(grids[before], *geometry, strict=True)
            ]
            grids[after] = (moved[0], moved[1])

    def follow(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and given.dim() == output.dim() == 4:
            advance(_spatial(module), _size(given), _size(output))

    def look(name: str, layer: SamplingModule, samples: Samples) -> None:
        offset, mask, input, window = samples.offset, samples.mask, samples.input, layer.window_in(samples)
        places = layer.places(samples)
        still = window is None and places is None
        if still or not isinstance(input, Tensor):
            got = "no window in this call" if still else "several maps"
            raise TypeError(f"model: expected layers with a window that read one map, got {name!r}, which has {got}")
        before = after = _size(input)
        taps = 1 if window is None else math.prod(window.kernel_size)
        if offset is None and window is not None:  # undeformed
            offset = torch.zeros(input.shape[0], 2 * taps, *window.output_size(*before))
        assert offset is not None
        if window is not None:
            after = _size(offset)
            advance(_of_window(window), before, after)
        item = LayerRecord(
            name,
            layer,
            (samples.scale * offset.float().cpu()).unflatten(1, (-1, taps, 2)),
            None if mask is None else mask.float().cpu().unflatten(1, (-1, taps)),
            before,
            grid_of(before),
            grid_of(after),
            calls[name],
            None if places is None else places.float().cpu(),
            window,
        )
        calls[name] += 1
        records.append(item)

    # What a layer has inside, such as its own predictor of offsets, says nothing about the map that it makes.
    inner = {module for layer in found.values() for module in layer.modules()}
    handles: list[Any] = [layer.register_sampling_hook(partial(look, name)) for name, layer in found.items()]
    for module in model.modules():
        if module not in inner and _spatial(module) is not None:
            handles.append(module.register_forward_hook(follow, with_kwargs=True))
    try:
        with evaluating(model):
            parameter = next(model.parameters(), images)
            model(images.to(parameter.device, parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers or ():
        if not calls[name]:
            raise ValueError(f"layers: expected layers that run, got {name!r}, which did not")
    kept = [item for item in records if layers is None or item.name in layers]
    if call is not None:
        most = max((calls[item.name] for item in kept), default=0)
        kept = [item for item in kept if item.call == (call if call >= 0 else calls[item.name] + call)]
        if not kept:
            raise ValueError(f"call: expected one of the calls of a layer, at most {most} of each, got {call}")
    if not kept:
        raise ValueError(f"model: expected deformable convolutions that run, got {', '.join(found)}, which did not")
    return kept


def _batch(images: Tensor) -> Tensor:
    if images.dim() not in (3, 4):
        raise ValueError(f"images: expected [N, C, H, W] or [C, H, W], got {list(images.shape)}")
    return images if images.dim() == 4 else images[None]


def _to_image(points: Tensor, grid: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    scale, shift = torch.tensor(grid).T
    return points * scale + shift


def _to_map(points: Tensor, grid: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    scale, shift = torch.tensor(grid).T
    return (points - shift) / scale


def trace(records: Sequence[LayerRecord], unit: Unit, sample: int = 0, group: int = 0) -> Tensor:
    """Return where on the image a unit samples through several deformable layers, [points, 2] in image pixels.

    The unit is the output pixel of the last record that is nearest to `unit`. Its K sampling points are carried to the
    output of the layer before, rounded to the nearest pixel there, and each is replaced by that pixel's own K points,
    down to the first record: K^L points for L layers. Points outside a map read zeros and are followed no further.
    Attention to a grid has the same points for all units: all of its samples, once.
    Taps of ordinary convolutions in between are not drawn.

    Args:
        records: consecutive layers in the order they ran, as `record` returns them.
        unit: (y, x) on the image in pixels.
        sample: index into the batch.
        group: offset group, counted modulo each layer's number of groups.
    """
    if not records:
        raise ValueError("records: expected at least one layer, got none")
    points = torch.tensor([unit], dtype=torch.float32)
    for index, item in enumerate(reversed(records)):
        height, width = item.offset.shape[-2:] if item.places is None else item.input_size
        cells = _to_map(points, item.out_grid).round().long()
        inside = (cells >= 0).all(dim=1) & (cells < torch.tensor([height, width])).all(dim=1)
        if index == 0 and not inside.all():
            raise ValueError(f"unit: expected (y, x) inside the image, got {unit}, outside the output of {item.name}")
        cells = cells[inside]
        if not len(cells):
            return torch.empty(0, 2)
        if item.window is None:
            points = _to_image(item.positions(0, 0, group % item.offset.shape[1], sample), item.grid)
            continue
        stride = torch.tensor(item.window.stride, dtype=torch.float32)
        offsets = item.offset[sample, group % item.offset.shape[1]][:, :, cells[:, 0], cells[:, 1]]
        sampled = (cells * stride)[:, None] + item.taps() + offsets.permute(2, 0, 1)
        points = _to_image(sampled.reshape(-1, 2), item.grid)
    return points


def dilation_by_layer(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the effective dilation of every deformable layer, name -> [N, G, H', W'] (see `effective_dilation`).

    A layer that runs several times has an entry for each call: `<name>[0]`, `<name>[1]`, ... in the order they ran.
    """
    return {key: dilation for key, _, dilation in _dilations(model, images)}


def _dilations(model: nn.Module, images: Tensor) -> list[tuple[str, Window, Tensor]]:
    records = [(item, item.window) for item in record(model, images) if item.window is not None]
    if not records:
        raise ValueError(f"model: expected deformable convolutions inside, got {type(model).__name__} without any")
    names = labels([item for item, _ in records])
    return [
        (name, window, effective_dilation(item.offset.flatten(1, 3), window.kernel_size, window.dilation))
        for name, (item, window) in zip(names, records, strict=True)
    ]


def labels(records: Sequence[LayerRecord]) -> list[str]:
    """Name records so that no two are alike: of a layer that ran several times `<name>[0]`, `<name>[1]`, ..."""
    several = {item.name for item in records if item.call}
    return [f"{item.name}[{item.call}]" if item.name in several else item.name for item in records]


# -- figures ----------------------------------------------------------------------------------------------------------


def sampling_points(
    model: nn.Module,
    image: Tensor,
    units: Unit | Sequence[Unit] | None = None,
    layers: int | Sequence[str] = 3,
    picture: Tensor | None = None,
    group: int = 0,
    call: int = 0,
) -> Figure:
    """Draw where units of the last deformable layer sample the image, through several layers (see `trace`).

    Args:
        model: any module with deformable convolutions inside.
        image: [C, H, W] as the model takes it, or [N, C, H, W] for several.
        units: (y, x) in image pixels, one or several; None draws the centre.
        layers: how many of the last deformable layers to follow, or their names.
        picture: what to draw instead of `image`, of the same size, for example before normalisation.
        group: offset group to follow.
        call: which call of each layer to draw, where one runs several times: 0 is the first, -1 the last.

    Returns:
        A matplotlib figure: the unit as a green cross, its sampling points in red; one column of panels per image and
        one row per unit (the units of a single image side by side).

    Source: Dai et al., Deformable Convolutional Networks, 2017, figure 6.
    """
    images = _batch(image)
    pictures = images if picture is None else _batch(picture)
    if len(pictures) != len(images):
        raise ValueError(f"picture: expected {len(images)} pictures, one for each image, got {len(pictures)}")
    records = record(model, images, None if isinstance(layers, int) else layers, call)
    if isinstance(layers, int):
        if layers < 1:
            raise ValueError(f"layers: expected at least 1 layer, got {layers}")
        records = records[-layers:]
    height, width = _size(images)
    if units is None:
        units = ((height - 1) / 2, (width - 1) / 2)
    chosen: list[Any] = list(units)
    if not isinstance(chosen[0], (tuple, list)):
        chosen = [tuple(chosen)]
    single = len(images) == 1
    figure, grid = new_figure(len(chosen) if single else len(images), 1 if single else len(chosen), 2.8, 2.8)
    for sample, column in enumerate(grid if single else grid.T):
        for axes, unit in zip(column, chosen, strict=True):
            points = trace(records, unit, sample, group)
            show_image(axes, images[sample], pictures[sample])
            # Many paths may end in one pixel: transparency shows how often.
            alpha = 0.9 if len(points) <= 9 else 0.5
            axes.scatter(points[:, 1], points[:, 0], s=10, c="#ff2d2d", alpha=alpha, linewidths=0)
            axes.plot(unit[1], unit[0], marker="+", color="#19ff4b", markersize=13, markeredgewidth=2.5)
            axes.set_xlim(-0.5 - 0.08 * width, width - 0.5 + 0.08 * width)
            axes.set_ylim(height - 0.5 + 0.08 * height, -0.5 - 0.08 * height)
    through = "one layer" if len(records) == 1 else f"{len(records)} layers"
    figure.suptitle(f"sampling points through {through}, ending at {records[-1].name}", fontsize=9)
    return figure


def offset_field(
    model: nn.Module,
    image: Tensor,
    layer: str | None = None,
    picture: Tensor | None = None,
    group: int = 0,
    call: int = 0,
) -> Figure:
    """Draw the offsets of one layer as arrows on the image: the mean over taps, and each tap of the kernel by itself.

    Args:
        model: any module with deformable convolutions inside.
        image: [C, H, W] as the model takes it.
        layer: name of the layer; None takes the first deformable one (the finest map).
        picture: [C, H, W] to draw instead of `image`.
        group: offset group to draw.
        call: which call of the layer to draw, where it runs several times: 0 is the first, -1 the last.

    Returns:
        A matplotlib figure; arrows have their true length in image pixels and are coloured by it.
    """
    batch = _batch(image)
    image = batch[0]
    item = record(model, batch, None if layer is None else [layer], call)[0]
    offset = item.offset[0, group % item.offset.shape[1]]
    scale = torch.tensor([item.grid[0][0], item.grid[1][0]]).reshape(1, 2, 1, 1)
    arrows = offset * scale
    h, w = arrows.shape[-2:]
    cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1).reshape(-1, 2)
    # Of attention the output's pixels are its queries: arrows start where samples do.
    first, grid_of_first = (cells.float(), item.out_grid) if item.places is None else (item.places, item.grid)
    start = _to_image(first.reshape(-1, 2), grid_of_first)
    longest = arrows.norm(dim=1).max().clamp(min=1e-6).item()
    height, width = image.shape[-2:]
    figure, grid = new_figure(2, width=4.0, height=3.8)

    def field(axes: Any, vectors: Tensor, limit: float, title: str) -> None:
        show_image(axes, image, picture)
        length = vectors.norm(dim=0).reshape(-1)
        drawn = axes.quiver(
            start[:, 1], start[:, 0], vectors[1].reshape(-1), vectors[0].reshape(-1), length,
            angles="xy", scale_units="xy", scale=1.0, cmap="plasma", width=0.006,
        )  # fmt: skip
        drawn.set_clim(0.0, limit)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        figure.colorbar(drawn, ax=axes, shrink=0.75, label="offset length (image pixels)")

    mean = arrows.mean(dim=0)
    field(grid[0, 0], mean, max(mean.norm(dim=0).max().item(), 1e-6), "mean over taps")
    axes = grid[0, 1]
    show_image(axes, image, picture)
    steps = item.taps() * torch.tensor([item.grid[0][0], item.grid[1][0]])
    base = start[:, None] + (steps - steps.mean(dim=0))
    tips = base + arrows.permute(2, 3, 0, 1).reshape(len(base), -1, 2)
    moved = (tips - base).norm(dim=-1)
    points = axes.scatter(tips[..., 1], tips[..., 0], c=moved, s=5, cmap="plasma", vmin=0.0, vmax=longest, linewidths=0)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_title("every sampling point", fontsize=9)
    figure.colorbar(points, ax=axes, shrink=0.75, label="offset length (image pixels)")
    figure.suptitle(f"offsets of {item.name}, {h} x {w} map", fontsize=10)
    return figure


def dilation_plot(model: nn.Module, images: Tensor) -> Figure:
    """Draw the effective dilation of every deformable layer: median, quartiles and 5th to 95th percentile.

    Each call of a layer that runs several times has a box of its own.

    Args:
        model: any module with deformable convolutions inside.
        images: [N, C, H, W] as the model takes them.

    Returns:
        A matplotlib figure; the dilation each layer would have with zero offsets is marked.
    """
    names, windows, values = zip(*_dilations(model, images), strict=True)
    figure, grid = new_figure(1, width=max(4.0, 0.55 * len(values) + 2.0), height=3.6)
    axes = grid[0, 0]
    boxes = axes.boxplot(
        [value.flatten().numpy() for value in values], whis=(5, 95), showfliers=False, patch_artist=True,
        medianprops=dict(color="black"),
    )  # fmt: skip
    for box in boxes["boxes"]:
        box.set_facecolor("#9ecae1")
    still = []
    for window in windows:
        zeros = torch.zeros(1, 2 * math.prod(window.kernel_size), 1, 1)
        still.append(effective_dilation(zeros, window.kernel_size, window.dilation).item())
    axes.plot(range(1, len(still) + 1), still, "_", color="#ff2d2d", markersize=18, label="with zero offsets")
    axes.set_xticks(range(1, len(values) + 1), list(names), rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("effective dilation (pixels)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    return figure
