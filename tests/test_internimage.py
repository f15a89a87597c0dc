"""DCNv3, DCNv4 and InternImage against formulas written again, and against the official lists of names and shapes."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dcn_plugin.layers import DCNv3, DCNv4

DATA = Path(__file__).parent / "data"


def drawn(layer, seed=0):
    """In float64, with everything drawn, so that nothing is 0, and samples move by a pixel or two."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            scale = 0.3 if p.dim() > 1 else 0.7
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return layer.eval()


# The layers, from the descriptions of the papers: samples by torch's own grid_sample, tap by tap.


def sampled(value, y, x):
    """`value` [N, D, H, W] at positions [N, H', W'], in pixels."""
    height, width = value.shape[2:]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    return F.grid_sample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def aggregated(value, offset, weight, layer, removed):
    """Each group and tap by itself; `offset` [N, H', W', G, K, 2] and `weight` as the official layers have them."""
    k, s, groups = layer.kernel_size, layer.offset_scale, layer.group
    n, _, _, channels = value.shape
    out_h, out_w = offset.shape[1:3]
    depth = channels // groups
    maps = value.permute(0, 3, 1, 2)
    centre = layer.dilation * (k - 1) // 2
    rows = (torch.arange(out_h).double() * layer.stride - layer.pad + centre)[None, :, None]
    columns = (torch.arange(out_w).double() * layer.stride - layer.pad + centre)[None, None, :]
    taps = [(i, j) for i in range(k) for j in range(k)]  # i along x, outer; j along y
    if removed:
        taps.remove(((k - 1) // 2, (k - 1) // 2))
    out = torch.zeros(n, channels, out_h, out_w, dtype=value.dtype)
    for g in range(groups):
        part = slice(g * depth, (g + 1) * depth)
        for number, (i, j) in enumerate(taps):
            x = columns + s * (i * layer.dilation - centre + offset[:, :, :, g, number, 0])
            y = rows + s * (j * layer.dilation - centre + offset[:, :, :, g, number, 1])
            out[:, part] += weight[:, None, :, :, g, number] * sampled(maps[:, part], y, x)
    return out.permute(0, 2, 3, 1)


def affine(x, state, name):
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def depthwise(x, weight, bias):
    """A depthwise convolution of [N, H, W, C], by shifts."""
    reach = weight.shape[-1] // 2
    padded = F.pad(x, (0, 0, reach, reach, reach, reach))
    height, width = x.shape[1:3]
    out = torch.zeros_like(x) + bias
    for dy in range(weight.shape[-2]):
        for dx in range(weight.shape[-1]):
            out = out + padded[:, dy : dy + height, dx : dx + width] * weight[:, 0, dy, dx]
    return out


def normed(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def at_outputs(x, layer, size):
    first = layer.dilation * (layer.kernel_size - 1) // 2 - layer.pad
    rows, columns = (first + layer.stride * torch.arange(length) for length in size)
    return x[:, rows][:, :, columns]


def output_size(x, layer):
    reach = layer.dilation * (layer.kernel_size - 1) + 1
    return [(length + 2 * layer.pad - reach) // layer.stride + 1 for length in x.shape[1:3]]


def gate(out, value, feature, state, layer, size):
    weight = state.get("center_feature_scale_proj_weight")
    if weight is None:
        return out
    share = 1 / (1 + (-(feature @ weight.T + state["center_feature_scale_proj_bias"])).exp())
    share = share.repeat_interleave(layer.channels // layer.group, -1)
    return out * (1 - share) + at_outputs(value, layer, size) * share


def plain_dcnv3(layer, x):
    state = dict(layer.state_dict())
    size = output_size(x, layer)
    hidden = depthwise(x, state["dw_conv.0.weight"], state["dw_conv.0.bias"])
    hidden = normed(hidden, state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"])
    hidden = at_outputs(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), layer, size)
    taps = state["mask.weight"].shape[0] // layer.group
    logits = affine(hidden, state, "mask").reshape(*hidden.shape[:3], layer.group, taps)
    weight = logits.exp() / logits.exp().sum(-1, keepdim=True)
    offset = affine(hidden, state, "offset").reshape(*hidden.shape[:3], layer.group, taps, 2)
    value = affine(x, state, "input_proj")
    out = aggregated(value, offset, weight, layer, taps < layer.kernel_size**2)
    return affine(gate(out, value, hidden, state, layer, size), state, "output_proj")


def plain_dcnv4(layer, rows, shape):
    state = dict(layer.state_dict())
    x = rows.reshape(len(rows), *shape, -1)
    size = output_size(x, layer)
    hidden = x
    if "offset_mask_dw.weight" in state:
        hidden = depthwise(x, state["offset_mask_dw.weight"], state["offset_mask_dw.bias"])
    packed = affine(at_outputs(hidden, layer, size), state, "offset_mask")
    taps = layer.kernel_size**2 - bool(layer.remove_center)
    offsets, weights = [], []
    for g in range(layer.group):  # per group 2K numbers of offsets, then K weights
        own = packed[..., g * 3 * taps : (g + 1) * 3 * taps]
        offsets.append(own[..., : 2 * taps].reshape(*own.shape[:3], taps, 2))
        weights.append(own[..., 2 * taps :])
    pointwise = "value_proj.weight" in state
    value = affine(x, state, "value_proj") if pointwise else x
    out = aggregated(value, torch.stack(offsets, 3), torch.stack(weights, 3), layer, layer.remove_center)
    out = gate(out, value, out, state, layer, size)
    out = affine(out, state, "output_proj") if pointwise else out
    return out.flatten(1, 2)


V3 = {
    "tiny": dict(),
    "stretched": dict(offset_scale=2.0),
    "huge": dict(dw_kernel_size=5, center_feature_scale=True),
    "without the centre": dict(remove_center=True, offset_scale=0.5),
    "wide": dict(kernel_size=5, pad=2, remove_center=1, center_feature_scale=True),
    "dilated": dict(dilation=2, pad=2),
    "strided": dict(stride=2, center_feature_scale=True),
    "unpadded": dict(pad=0, stride=2, dilation=2, offset_scale=1.5),
    "even": dict(kernel_size=2, dw_kernel_size=3, pad=0, dilation=3),
}
V4 = V3 | {
    "strided": dict(stride=2),
    "huge": dict(dw_kernel_size=5, center_feature_scale=True, output_bias=False),
    "bare": dict(without_pointwise=True),
}


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("options", V3.values(), ids=V3)
def test_dcnv3_is_the_formula(options):
    layer = drawn(DCNv3(12, group=3, **options))
    x = torch.randn(2, 7, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = plain_dcnv3(layer, x)
    close(layer(x), wanted)
    first = drawn(DCNv3(12, group=3, channels_first=True, **options))
    close(first(x.permute(0, 3, 1, 2)), wanted.permute(0, 3, 1, 2))


@pytest.mark.parametrize("options", V4.values(), ids=V4)
def test_dcnv4_is_the_formula(options):
    layer = drawn(DCNv4(12, group=3, **options))
    x = torch.randn(2, 63, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = plain_dcnv4(layer, x, (7, 9))
    close(layer(x, (7, 9)), wanted)
    first = drawn(DCNv4(12, group=3, channels_first=True, **options))
    maps = x.reshape(2, 7, 9, 12).permute(0, 3, 1, 2)
    close(first(maps).flatten(2).transpose(1, 2), wanted)
