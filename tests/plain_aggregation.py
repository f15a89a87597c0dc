"""DCNv3, DCNv4 and InternImage written again from their descriptions, tap by tap and shift by shift, in float64."""

import math

import torch
from torch.nn import functional as F


def drawn(layer, seed=0):
    """In float64, with everything drawn, so that nothing is 0, and samples move by a pixel or two."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            scale = 0.3 if p.dim() > 1 else 0.7
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return layer.eval()


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


def plain_dcnv3(layer, x, state=None):
    state = dict(layer.state_dict()) if state is None else state
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


def plain_dcnv4(layer, rows, shape, state=None):
    state = dict(layer.state_dict()) if state is None else state
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


def conv(x, state, name, **options):
    return F.conv2d(x.permute(0, 3, 1, 2), state[f"{name}.weight"], state.get(f"{name}.bias"), **options).permute(
        0, 2, 3, 1
    )


def norm(x, state, name):
    return normed(x, state[f"{name}.weight"], state[f"{name}.bias"])


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def pooled_by_attention(x, state, name, heads):
    """`x` [N, L, C]: the mean pixel attends to all."""
    mean = norm(x.mean(1, keepdim=True), state, f"{name}.norm1_q.0")
    keys, values = norm(x, state, f"{name}.norm1_k.0"), norm(x, state, f"{name}.norm1_v.0")
    q, k, v = (
        given @ state[f"{name}.cross_dcn.{kind}.weight"].T + state[f"{name}.cross_dcn.{kind}_bias"]
        for kind, given in zip("qkv", (mean, keys, values), strict=True)
    )
    depth, found = q.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(depth)).exp()
        found.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
    return affine(torch.cat(found, -1)[:, 0], state, f"{name}.cross_dcn.proj")


def plain_internimage(model, images, order="pre", post_norm_blocks=()):
    """Logits and the maps of the levels; `order` is where norms stand: "pre", "post" or "res_post"."""
    state = dict(model.state_dict())
    x = images.permute(0, 2, 3, 1)
    x = gelu(norm(conv(x, state, "patch_embed.conv1", stride=2, padding=1), state, "patch_embed.norm1.1"))
    x = norm(conv(x, state, "patch_embed.conv2", stride=2, padding=1), state, "patch_embed.norm2.1")
    maps = []
    for i, level in enumerate(model.levels):
        for j, block in enumerate(level.blocks):
            name = f"levels.{i}.blocks.{j}"

            def aggregate(x, layer=block.dcn):
                if hasattr(layer, "input_proj"):
                    return plain_dcnv3(layer, x)
                return plain_dcnv4(layer, x.flatten(1, 2), x.shape[1:3]).reshape(x.shape)

            def mlp(x, name=name):
                return affine(gelu(affine(x, state, f"{name}.mlp.fc1")), state, f"{name}.mlp.fc2")

            for number, branch in ((1, aggregate), (2, mlp)):
                own = f"{name}.norm{number}.0"
                out = norm(branch(x), state, own) if order == "post" else branch(norm(x, state, own))
                if order == "res_post":
                    out = norm(out, state, f"{name}.res_post_norm{number}.0")
                x = x + out * state.get(f"{name}.gamma{number}", torch.ones(()))
            if i == 2 and j in post_norm_blocks:
                x = norm(x, state, f"levels.2.post_norms.{post_norm_blocks.index(j)}.0")
        if f"levels.{i}.norm.0.weight" in state:
            x = norm(x, state, f"levels.{i}.norm.0")
        maps.append(x)
        if f"levels.{i}.downsample.conv.weight" in state:
            x = norm(
                conv(x, state, f"levels.{i}.downsample.conv", stride=2, padding=1),
                state,
                f"levels.{i}.downsample.norm.1",
            )
    if "conv_head.0.weight" in state:
        x = conv(maps[-1], state, "conv_head.0")
        mean, var = state["conv_head.1.0.running_mean"], state["conv_head.1.0.running_var"]
        x = (x - mean) / (var + 1e-5).sqrt() * state["conv_head.1.0.weight"] + state["conv_head.1.0.bias"]
        x = gelu(x).mean((1, 2))
    else:
        coarse = conv(maps[-1], state, "dcnv3_head_x4.0")  # each pixel becomes 2 x 2
        n, height, width, channels = coarse.shape
        coarse = coarse.reshape(n, height, width, channels // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
        x = coarse.reshape(n, 2 * height, 2 * width, channels // 4) + conv(maps[-2], state, "dcnv3_head_x3")
        x = norm(pooled_by_attention(x.flatten(1, 2), state, "clip_projector", 16), state, "fc_norm.0")
    return affine(x, state, "head"), [m.permute(0, 3, 1, 2) for m in maps]


def close(found, wanted, tolerance=1e-9):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
