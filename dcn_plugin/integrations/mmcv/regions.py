"""mmcv's pooling of regions: averages by torchvision's `roi_align`, maxima by it and a plain maximum over its samples.

`roi_pool` is not torchvision's, which rounds the corners of a region to pixels; mmcv takes every pixel that a bin
touches. All write into tensors that mmcv has made, and add to gradients.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._check import shape, tensor
from ._wide import wide

# How many samples are looked at together: 64 MiB of them in float32. Many regions times many bins are more.
AT_ONCE = 2**24

# Its operators and not `torchvision.ops`: the backward has no other name.
VISION = torch.ops.torchvision


def _check(input: Tensor, name: str, rois: Tensor, pooled: tuple[int, int], outputs: dict[str, Tensor]) -> None:
    tensor(input, name, 4, "[N, C, H, W]")
    tensor(rois, "rois", 2, "[R, 5]")
    shape(rois, "rois", (len(rois), 5))
    for output, value in outputs.items():
        shape(value, output, (len(rois), input.shape[1], *pooled))


def _check_values(boxes: Tensor, images: int, inside_out: bool) -> None:
    """Check regions on a CPU, where torchvision would read outside of the map; a GPU would have to be waited for.

    Args:
        boxes: regions in the type that they are used in: it may round 0.999999999 to another image, and 1e39 to inf.
        images: how many there are.
        inside_out: whether a region may be; mmcv refuses it where that has no meaning.
    """
    if boxes.device.type != "cpu" or not len(boxes):
        return
    sides = boxes[:, 3:] - boxes[:, 1:3]
    right = boxes.isfinite().all(1) & sides.isfinite().all(1) & (boxes[:, 0] >= 0) & (boxes[:, 0] < images)
    if not inside_out:
        right &= (sides >= 0).all(1)
    if not right.all():
        kind = "regions" if inside_out else "regions of no negative size"
        raise ValueError(
            f"rois: expected finite {kind} of images 0 to {images - 1}, got {boxes[~right][0].tolist()} in row "
            f"{int((~right).nonzero()[0, 0])}"
        )


def _groups(sizes: Tensor, each: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the sizes `[R, 2]` that occur, each with the regions that have it, a part of them at a time.

    A region takes `each` times the product of its size; of none if the product is 0, as nothing is to be done.
    """
    found, of = torch.unique(sizes, dim=0, return_inverse=True)
    for i, (height, width) in enumerate(found.tolist()):
        if height > 0 and width > 0:
            for part in (of == i).nonzero()[:, 0].split(max(1, AT_ONCE // max(1, each * height * width))):
                yield height, width, part


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write to `output` the mean, or the largest, of the samples of each bin of each region.

    A bin in which no sample lies (a region without height or width, with `sampling_ratio=0`) gives 0. That is what the
    compiled mmcv does for means; its maxima are then -10000 on a CPU and the least float on a GPU.

    Args:
        input: `[N, C, H, W]`.
        rois: `[R, 5]`, number of the image, x1, y1, x2, y2.
        output: `[R, C, aligned_height, aligned_width]`.
        argmax_y: for maxima, where they lie, of the same shape; -1 where no sample is.
        argmax_x: likewise.
        aligned_height: bins of a region, one below the other.
        aligned_width: bins of a region, side by side.
        spatial_scale: pixels of the input for a unit of `rois`.
        sampling_ratio: samples of a bin along either axis; 0 for as many as it has pixels.
        pool_mode: 0 for maxima, 1 for means.
        aligned: whether the centre of the first pixel is at 0.5, and not at 0; regions may then be smaller than it.

    Raises:
        ValueError: sizes do not agree; on a CPU, a region is not finite, of no image, or, if `aligned`, inside out.
    """
    bins = (aligned_height, aligned_width)
    _check(input, "input", rois, bins, {"output": output})
    if pool_mode == 1:
        given = _supported(input, rois)
        _check_values(given[1], len(input), not aligned)
        output.copy_(VISION.roi_align(*given, spatial_scale, *bins, sampling_ratio, aligned))
        return
    _check(input, "input", rois, bins, {"argmax_y": argmax_y, "argmax_x": argmax_x})
    value = wide(input)
    boxes = wide(rois).to(value.dtype)
    _check_values(boxes, len(input), not aligned)
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    start, step, grid = _grid(rois, bins, spatial_scale, sampling_ratio, aligned)
    for height, width, part in _groups(grid, input.shape[1] * bins[0] * bins[1]):
        # As bins of one sample each, samples lie where they lay, and torchvision interpolates them.
        fine = (bins[0] * height, bins[1] * width)
        samples = VISION.roi_align(value, boxes[part], spatial_scale, *fine, 1, aligned)
        largest, at = F.max_pool2d(samples, (height, width), return_indices=True)
        output[part] = largest.to(output.dtype)
        for argmax, index, axis in ((argmax_y, at // fine[1], 0), (argmax_x, at % fine[1], 1)):
            first, by = (each[part, axis][:, None, None, None] for each in (start, step))
            argmax[part] = (first + (index + 0.5) * by).to(argmax.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add to `grad_input` what `grad_output` says of the samples that `roi_align_forward` took; arguments as there."""
    bins = (aligned_height, aligned_width)
    _check(grad_input, "grad_input", rois, bins, {"grad_output": grad_output})
    size = tuple(grad_input.shape)
    if pool_mode == 1:
        grad, boxes = _supported(grad_output, rois)
        _check_values(boxes, len(grad_input), not aligned)
        found = VISION._roi_align_backward(grad, boxes, spatial_scale, *bins, *size, sampling_ratio, aligned)
        grad_input.add_(found)
        return
    _check(grad_input, "grad_input", rois, bins, {"argmax_y": argmax_y, "argmax_x": argmax_x})
    # Each channel has chosen other samples, so a channel is an image of its own here. A sample within a pixel of the
    # map counts as on its border, as grid_sample has it; one further out took no part. (And -1 is no sample.)
    height, width = size[2:]
    y, x = wide(argmax_y), wide(argmax_x)
    grad = wide(grad_output)  # on a GPU, too: half precision would round positions
    _check_values(wide(rois), len(grad_input), not aligned)
    grad = grad.where((y > -1) & (y <= height) & (x >= -1) & (x <= width), 0)
    grid = torch.stack([2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1], -1).to(grad.dtype)
    grad, grid = grad.flatten(2), grid.flatten(2, 3)
    for image, found in enumerate(grad_input):
        part = (rois[:, 0] == image).nonzero()[:, 0]
        with torch.enable_grad():
            plane = found.new_zeros((size[1], 1, height, width), dtype=grad.dtype, requires_grad=True)
            read = F.grid_sample(plane, grid[part].transpose(0, 1), padding_mode="border", align_corners=True)
        found.add_(torch.autograd.grad(read, plane, grad[part].transpose(0, 1)[:, None])[0][:, 0])


def _supported(value: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to a type that torchvision's kernels take: half precision on a GPU, and no bfloat16."""
    if not (value.is_cuda and value.dtype == torch.float16):
        value = wide(value)
    return value.contiguous(), rois.to(value.dtype).contiguous()


def _grid(
    rois: Tensor, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, along y and x (`[R, 2]` each), where a region starts, how far samples lie apart, how many a bin has."""
    corners = wide(rois)[:, [2, 1, 4, 3]] * spatial_scale - 0.5 * aligned
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    by_bin = extent / extent.new_tensor(bins)
    grid = torch.full_like(by_bin, sampling_ratio) if sampling_ratio > 0 else by_bin.ceil().clamp(min=0)
    return start, by_bin / grid.clamp(min=1), grid.long()


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write to `output` the largest pixel that each bin of each region touches, and its place in the map to `argmax`.

    The last column and row of a region belong to it (`x2 + 1`, as boxes of pixels). A bin outside of the map, and every
    bin of a region without an area, gives 0 and place -1. (For the latter, the compiled mmcv leaves place 0, so that
    their gradients come to the first pixel.)

    Args:
        input: `[N, C, H, W]`.
        rois: `[R, 5]`, number of the image, x1, y1, x2, y2.
        output: `[R, C, pooled_height, pooled_width]`.
        argmax: integers of the same shape.
        pooled_height: bins of a region, one below the other.
        pooled_width: bins of a region, side by side.
        spatial_scale: pixels of the input for a unit of `rois`.
    """
    bins = (pooled_height, pooled_width)
    _check(input, "input", rois, bins, {"output": output, "argmax": argmax})
    boxes = wide(rois)
    _check_values(boxes, len(input), True)
    output.zero_()
    argmax.fill_(-1)
    corners = boxes[:, 1:] + boxes.new_tensor([0, 0, 1, 1])
    corners = corners[:, [1, 0, 3, 2]] * spatial_scale
    extent = corners[:, 2:] - corners[:, :2]
    edges = []  # along y, then x: the first pixel of each bin and the one behind its last, `[R, bins]`
    for axis, (number, most) in enumerate(zip(bins, input.shape[2:], strict=True)):
        places = torch.arange(number + 1, device=rois.device, dtype=boxes.dtype)
        places = places * (extent[:, axis, None] / number) + corners[:, axis, None]
        edges.append((places[:, :-1].floor().clamp(0, most).long(), places[:, 1:].ceil().clamp(0, most).long()))
    longest = torch.stack([(behind - first).amax(1) for first, behind in edges], 1)
    longest = torch.where((extent > 0).all(1, keepdim=True), longest, 0)
    image = boxes[:, 0].long()
    rows = input.permute(0, 2, 3, 1)
    # Bins of almost equal extent go together: a step beyond the end of a bin reads its last pixel once more.
    for height, width, part in _groups(_rounded_up(longest), input.shape[1] * bins[0] * bins[1]):
        (top, bottom), (left, right) = ((first[part], behind[part]) for first, behind in edges)
        y = torch.minimum(top[..., None] + torch.arange(height, device=top.device), bottom[..., None] - 1).clamp(min=0)
        x = torch.minimum(left[..., None] + torch.arange(width, device=top.device), right[..., None] - 1).clamp(min=0)
        y, x = y[:, :, None, :, None], x[:, None, :, None, :]
        pixels = rows[image[part, None, None, None, None], y, x].flatten(3, 4)  # [part, bins, bins, pixels, C]
        largest, at = pixels.max(3)
        places = (y * input.shape[3] + x).flatten(3)[..., None].expand(-1, -1, -1, -1, pixels.shape[-1])
        filled = ((bottom > top)[:, :, None] & (right > left)[:, None, :])[..., None]
        output[part] = torch.where(filled, largest, 0).permute(0, 3, 1, 2)
        place = torch.where(filled, places.gather(3, at[:, :, :, None])[:, :, :, 0], -1)
        argmax[part] = place.permute(0, 3, 1, 2).to(argmax.dtype)


def _rounded_up(sizes: Tensor) -> Tensor:
    """Round sizes up to one of two for each doubling (1, 2, 3, 4, 6, 8, 12, ...), so that few are left."""
    power = 2 ** sizes.clamp(min=1).log2().ceil().long()
    return torch.where(sizes <= power // 4 * 3, power // 4 * 3, power).where(sizes > 0, 0)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add `grad_output` to `grad_input` at the pixels that `roi_pool_forward` chose; arguments as there."""
    _check(
        grad_input, "grad_input", rois, (pooled_height, pooled_width), {"grad_output": grad_output, "argmax": argmax}
    )
    _check_values(wide(rois), len(grad_input), True)
    images, channels, height, width = grad_input.shape
    plane = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    place = plane[:, :, None, None] * (height * width) + argmax
    chosen = argmax >= 0
    found = wide(grad_output).new_zeros(images * channels * height * width)
    found.index_add_(0, place[chosen], wide(grad_output)[chosen])
    grad_input.add_(found.view_as(grad_input))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
    "roi_pool_forward": roi_pool_forward,
    "roi_pool_backward": roi_pool_backward,
}
