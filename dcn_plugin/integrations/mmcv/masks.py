"""mmcv's attention by masks of pixels (PSANet) and its convolution at chosen pixels (guided anchors), by indexing."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._check import shape, tensor

COLLECT = 0  # of psa_type; 1 is to distribute


def _places(size: tuple[int, int], window: tuple[int, int], half: tuple[int, int], device: torch.device) -> Tensor:
    """Return, for each pixel t and each pixel s (`[H*W, H*W]`), where in the window around s t lies, -1 if outside."""
    lies = []
    for pixels, most, middle in zip(size, window, half, strict=True):
        own = torch.arange(pixels, device=device)
        place = own[:, None] - own + middle  # of t (down) around s (across), along this axis
        lies.append(torch.where((place >= 0) & (place < most), place, -1))
    y, x = lies[0][:, None, :, None], lies[1][None, :, None, :]
    return torch.where((y >= 0) & (x >= 0), y * window[1] + x, -1).flatten(2).flatten(0, 1)


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread each pixel's window over the whole map: `output[n, t, s] = input[n, window of s at t, s]`, else 0.

    Args:
        input: `[num_, h_mask * w_mask, h_feature, w_feature]`, a window for each pixel s.
        output: `[num_, h_feature * w_feature, h_feature, w_feature]`, by t, then s; by s, then t, to distribute.
        psa_type: 0 to collect, 1 to distribute.
        num_: images.
        h_feature: rows of the map.
        w_feature: its columns.
        h_mask: rows of a window.
        w_mask: its columns.
        half_h_mask: row of a window that lies on its pixel.
        half_w_mask: such a column.
    """
    size, window = (h_feature, w_feature), (h_mask, w_mask)
    tensor(input, "input", 4, "[N, windows, H, W]")
    shape(input, "input", (num_, h_mask * w_mask, *size))
    shape(output, "output", (num_, h_feature * w_feature, *size))
    if not output.numel():
        return
    place = _places(size, window, (half_h_mask, half_w_mask), input.device)
    found = input.flatten(2).gather(1, place.clamp(min=0).expand(num_, -1, -1)).where(place >= 0, 0)
    output.copy_((found if psa_type == COLLECT else found.transpose(1, 2)).reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Bring gradients of the map back to the windows, into `grad_input`; arguments as for the forward."""
    size, window = (h_feature, w_feature), (h_mask, w_mask)
    tensor(grad_input, "grad_input", 4, "[N, windows, H, W]")
    shape(grad_input, "grad_input", (num_, h_mask * w_mask, *size))
    shape(grad_output, "grad_output", (num_, h_feature * w_feature, *size))
    if not grad_output.numel():
        return
    place = _places(size, window, (half_h_mask, half_w_mask), grad_input.device)
    grad = grad_output.flatten(2)
    grad = (grad if psa_type == COLLECT else grad.transpose(1, 2)).where(place >= 0, 0)
    # What lies outside adds 0 to the first place. Every other sum has one term: a place of a window is one pixel.
    windows = torch.zeros_like(grad_input).flatten(2)
    grad_input.copy_(windows.scatter_add_(1, place.clamp(min=0).expand_as(grad), grad).view_as(grad_input))


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the windows around chosen pixels to `col`, 0 outside of the image.

    Args:
        im: `[1, C, H, W]`.
        mask_h_idx: `[M]`, rows of the pixels.
        mask_w_idx: `[M]`, their columns.
        col: `[C * kernel_h * kernel_w, M]`.
        kernel_h: rows of a window.
        kernel_w: its columns.
        pad_h: rows of a window above its pixel.
        pad_w: columns to its left.
    """
    tensor(im, "im", 4, "[1, C, H, W]")
    shape(im, "im", (1, *im.shape[1:]))
    shape(mask_w_idx, "mask_w_idx", tuple(mask_h_idx.shape))
    shape(col, "col", (im.shape[1] * kernel_h * kernel_w, len(mask_h_idx)))
    padded = F.pad(im[0], (pad_w, kernel_w - 1, pad_h, kernel_h - 1))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write `col` `[channels, M]` to the chosen pixels of `im` `[1, channels, height, width]`; arguments as above."""
    shape(im, "im", (1, channels, height, width))
    shape(mask_w_idx, "mask_w_idx", tuple(mask_h_idx.shape))
    shape(col, "col", (channels, len(mask_h_idx)))
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "psamask_forward": psamask_forward,
    "psamask_backward": psamask_backward,
    "masked_im2col_forward": masked_im2col_forward,
    "masked_col2im_forward": masked_col2im_forward,
}
