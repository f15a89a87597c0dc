"""torchvision's kernels of the same jobs: the PTX within its published library, launched as its host code does."""

from __future__ import annotations

from typing import Any

import torch
import torchvision

from .jobs import JOBS, SINGLE, CountingDevice, Launches

THREADS = 512  # of a block, in all of these
# Kernel -> the types of its parameters follow from its PTX; values are given in order.
CONV, ALIGN, PIXELS = "conv float32", "roi_align float32", "ps_roi_pool float32"


class Peer(CountingDevice):
    def start(self, name: str, elements: int, *values: Any) -> None:
        """Launch a thread for each element with these parameters, tensors as pointers, the elements' number first."""
        (full,) = [entry for entry in self.entries if entry.startswith(name)]
        module, entry = self.entries[full]
        places = module.kernel(entry).parameters
        given = [elements, *values]
        if len(given) != len(places):
            raise ValueError(f"{name}: expected {len(places)} parameters, got {len(given)}")
        parameters = bytearray(sum(places[-1]))
        for (begin, size), value in zip(places, given, strict=True):
            if torch.is_tensor(value):
                self.allow(value)
                value = value.data_ptr()
            if isinstance(value, float):
                value = int(torch.tensor(value, dtype=SINGLE).view(torch.int32)) & 0xFFFFFFFF
            parameters[begin : begin + size] = int(value).to_bytes(size, "little")
        self.launch(full, bytes(parameters), -(-elements // THREADS), THREADS, 0)


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """That the kernel was given its parameters in the right order."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise AssertionError(f"{what}: expected what torchvision computes on the CPU, off by {error:.2g}")


def count(texts: list[str]) -> dict[str, dict[str, dict[str, Launches]]]:
    """The same jobs on torchvision's kernels: {job: {"forward": ..., "backward": {kernel: launches}}}."""
    return {CONV: _convolution(texts), ALIGN: _align(texts), PIXELS: _pixels(texts)}


def _arguments(job: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return {k: v.to(SINGLE).contiguous() if torch.is_tensor(v) else v for k, v in JOBS[job].make().items()}


def _convolution(texts: list[str]) -> dict[str, dict[str, Launches]]:
    a = _arguments(CONV)
    x, offset, mask, weight = (a[name] for name in ("input", "offset", "mask", "weight"))
    (n, c, h, w), pixels = x.shape, offset.shape[2:].numel()
    forward, backward = Peer(texts), Peer(texts)
    sizes, steps = (h, w, 3, 3), (1, 1, 1, 1, 1, 1)  # of padding, stride and dilation
    columns = torch.zeros(c * 9, n * pixels)
    forward.start(
        "deformable_im2col_kernel<float, int>",
        n * c * pixels,
        x,
        offset,
        mask,
        *sizes,
        *steps,
        n,
        c,
        1,
        h,
        w,
        True,
        columns,
    )
    leaves = [t.clone().requires_grad_() for t in (x, offset, mask)]
    out = torchvision.ops.deform_conv2d(leaves[0], leaves[1], weight, padding=1, mask=leaves[2])
    close((weight.flatten(1) @ columns).view_as(out), out.detach(), "im2col")
    torch.manual_seed(1)
    grad = torch.randn(out.shape)
    truth = torch.autograd.grad(out, leaves, grad)
    columns = (weight.flatten(1).T @ grad.flatten(2)[0]).contiguous()
    gradients = [torch.zeros_like(t) for t in (x, offset, mask)]
    backward.start(
        "deformable_col2im_coord_kernel<float, int>", n * pixels * 18, columns, x, offset, mask, c, *sizes, *steps, n,
        18, 1, h, w, True, gradients[1], gradients[2],
    )  # fmt: skip
    backward.start(
        "deformable_col2im_kernel<float, int>", n * c * 9 * pixels, columns, offset, mask, c, *sizes, *steps, n, 1, h,
        w, True, gradients[0],
    )  # fmt: skip
    # For the weight's gradient it finds the columns again.
    backward.start(
        "deformable_im2col_kernel<float, int>", n * c * pixels, x, offset, mask, *sizes, *steps, n, c, 1, h, w, True,
        torch.zeros(c * 9, n * pixels),
    )  # fmt: skip
    for name, mine, its in zip(("input", "offset", "mask"), gradients, truth, strict=True):
        close(mine, its, f"gradient of {name}")
    return {"forward": forward.found, "backward": backward.found}


def _align(texts: list[str]) -> dict[str, dict[str, Launches]]:
    a = _arguments(ALIGN)
    x, rois, (ph, pw), scale = a["input"].requires_grad_(), a["rois"], a["output_size"], a["spatial_scale"]
    _, c, h, w = x.shape
    truth = torchvision.ops.roi_align(x, rois, (ph, pw), scale, 2, True)
    forward, backward = Peer(texts), Peer(texts)
    out = torch.zeros(truth.shape)
    forward.start(
        "roi_align_forward_kernel_impl<float>", out.numel(), x.detach(), scale, c, h, w, ph, pw, 2, True, rois, out
    )
    close(out, truth.detach(), "roi_align")
    torch.manual_seed(1)
    grad = torch.randn(out.shape)
    found = torch.zeros(x.shape)
    backward.start(
        "roi_align_backward_kernel_impl<float>", grad.numel(), grad, scale, c, h, w, ph, pw, 2, True, found, rois,
        *grad.stride(), found.numel(),
    )  # fmt: skip
    close(found, torch.autograd.grad(truth, x, grad)[0], "gradient of roi_align")
    return {"forward": forward.found, "backward": backward.found}


def _pixels(texts: list[str]) -> dict[str, dict[str, Launches]]:
    a = _arguments(PIXELS)
    x, rois, (ph, pw), scale = a["input"].requires_grad_(), a["rois"], a["output_size"], a["spatial_scale"]
    _, c, h, w = x.shape
    truth = torchvision.ops.ps_roi_pool(x, rois, (ph, pw), scale)
    forward, backward = Peer(texts), Peer(texts)
    out, channels = torch.zeros(truth.shape), torch.zeros(truth.shape, dtype=torch.int32)
    forward.start(
        "ps_roi_pool_forward_kernel_impl<float>", out.numel(), x.detach(), scale, c, h, w, ph, pw, rois, out.shape[1],
        out, channels,
    )  # fmt: skip
    close(out, truth.detach(), "ps_roi_pool")
    torch.manual_seed(1)
    grad = torch.randn(out.shape)
    found = torch.zeros(x.shape)
    backward.start(
        "ps_roi_pool_backward_kernel_impl<float>", grad.numel(), grad, channels, len(rois), scale, c, h, w, ph, pw,
        out.shape[1], found, rois, found.numel(),
    )  # fmt: skip
    close(found, torch.autograd.grad(truth, x, grad)[0], "gradient of ps_roi_pool")
    return {"forward": forward.found, "backward": backward.found}
