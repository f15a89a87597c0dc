"""DAT and DAT++ written again, from state dicts and with `F.grid_sample` and loops over pixels: slow, in any type."""

import torch
import torch.nn.functional as F


def linear(state, name, x):
    """A linear layer or a 1x1 convolution on `[N, C, H, W]`."""
    weight = state[f"{name}.weight"].flatten(1)
    return torch.einsum("oc,nchw->nohw", weight, x) + state[f"{name}.bias"][:, None, None]


def norm(state, name, x):
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.norm.weight"][:, None, None] + state[f"{name}.norm.bias"][:, None, None]


def part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def grid(size, whole, half):
    """(y, x) of each place, `[h, w, 2]`: (i + half) / whole * 2 - 1."""
    lines = [(torch.arange(n, dtype=torch.float64) + half) / m * 2 - 1 for n, m in zip(size, whole, strict=True)]
    return torch.stack([lines[0][:, None].expand(size), lines[1][None].expand(size)], -1)


def positions(state, x, groups, stride, factor, plus):
    """What the layer samples at, `[N * G, H_k, W_k, 2]`, and where it would without offsets."""
    n, c, h, w = x.shape
    query = linear(state, "proj_q", x).reshape(n * groups, c // groups, h, w)
    kernel = state["conv_offset.0.weight"].shape[-1]
    padding = 0 if plus and kernel == stride else kernel // 2
    raw = F.conv2d(
        query, state["conv_offset.0.weight"], state["conv_offset.0.bias"], stride, padding, groups=c // groups
    )
    raw = F.gelu(norm(state, "conv_offset.1", raw))
    raw = F.conv2d(raw, state["conv_offset.3.weight"]).permute(0, 2, 3, 1)
    size = raw.shape[1:3]
    whole = [side - 1 if plus else side for side in size]
    start = grid(size, whole, 0.5)
    if factor < 0:
        return (raw + start).clamp(-1, 1), start.clamp(-1, 1)
    return start + raw.tanh() * factor / torch.tensor(whole, dtype=torch.float64), start


def deformable(state, x, heads, groups, stride=1, factor=2.0, plus=False):
    n, c, h, w = x.shape
    depth = c // heads
    position, _ = positions(state, x, groups, stride, factor, plus)
    sampled = F.grid_sample(x.reshape(n * groups, c // groups, h, w), position.flip(-1), align_corners=True)
    sampled = sampled.reshape(n, c, *position.shape[1:3])
    query, key, value = (
        linear(state, name, map).reshape(n * heads, depth, -1)
        for name, map in (("proj_q", x), ("proj_k", sampled), ("proj_v", sampled))
    )
    to = grid((h, w), (h - 1, w - 1), 0.0) if plus else grid((h, w), (h, w), 0.5)
    way = (to.reshape(1, h * w, 1, 2) - position.reshape(n * groups, 1, -1, 2)) / 2
    table = state["rpe_table"].unflatten(0, (groups, -1)).repeat(n, 1, 1, 1)
    bias = F.grid_sample(table, way.flip(-1), align_corners=True).reshape(n * heads, h * w, -1)
    weights = (torch.einsum("bcm,bcn->bmn", query, key) / depth**0.5 + bias).softmax(-1)
    return linear(state, "proj_out", torch.einsum("bmn,bcn->bcm", weights, value).reshape(x.shape))


def attend(query, key, value, bias):
    """One query `[N, M, D]` to keys `[N, M, D, S]`."""
    scores = torch.einsum("nmd,nmds->nms", query, key) / query.shape[2] ** 0.5 + bias
    return torch.einsum("nms,nmds->nmd", scores.softmax(-1), value)


def windowed(state, x, heads, window, shift=0):
    """Pixel by pixel: those that a roll by `shift` brings into one window, and that were no further apart before."""
    n, c, h, w = x.shape
    high, wide = -(-h // window) * window, -(-w // window) * window
    parts = linear(state, "proj_qkv", F.pad(x, (0, wide - w, 0, high - h)))
    query, key, value = parts.reshape(n, 3, heads, c // heads, high, wide).unbind(1)
    table = state["relative_position_bias_table"].reshape(2 * window - 1, 2 * window - 1, heads)
    rows = []
    for y in range(h):
        for column in range(w):
            # Windows begin `shift` pixels into the map; the first one is what is left at both ends.
            reach = [
                [other for other in range(side) if (other - shift) // window == (place - shift) // window]
                for place, side in ((y, high), (column, wide))
            ]
            pairs = [(i, j) for i in reach[0] for j in reach[1]]
            ys, xs = torch.tensor(pairs).T
            bias = table[y - ys + window - 1, column - xs + window - 1].T
            rows.append(attend(query[..., y, column], key[..., ys, xs], value[..., ys, xs], bias))
    return linear(state, "proj_out", torch.stack(rows, -1).reshape(n, c, h, w))


def neighbours(state, x, heads, window):
    n, c, h, w = x.shape
    high, wide = max(h, window), max(w, window)
    parts = linear(state, "qkv", F.pad(x, (0, wide - w, 0, high - h)))
    query, key, value = parts.reshape(n, 3, heads, c // heads, high, wide).unbind(1)
    rows = []
    for y in range(h):
        for column in range(w):
            top, left = (min(max(place - window // 2, 0), side - window) for place, side in ((y, high), (column, wide)))
            bias = state["rpb"][:, top - y + window - 1 :, left - column + window - 1 :][:, :window, :window]
            here = (slice(None), slice(None), slice(None), slice(top, top + window), slice(left, left + window))
            rows.append(attend(query[..., y, column], key[here].flatten(3), value[here].flatten(3), bias.flatten(1)))
    return linear(state, "proj", torch.stack(rows, -1).reshape(n, c, h, w))


def block(state, kind, d, x, stage, heads, groups, window, plus):
    if plus:
        weight = state[f"local_perception_units.{d}.weight"]
        x = x + F.conv2d(x, weight, state[f"local_perception_units.{d}.bias"], padding=1, groups=len(weight))
    own, normed = part(state, f"attns.{d}"), norm(state, f"layer_norms.{2 * d}", x)
    if kind == "D":
        options = ((8, 4, 2, 1)[stage], -1.0, True) if plus else ()
        x = x + deformable(own, normed, heads, groups, *options)
    elif kind == "N":
        x = x + neighbours(own, normed, heads, window)
    else:
        x = x + windowed(own, normed, heads, window, (window + 1) // 2 if kind == "S" else 0)
    own, normed = part(state, f"mlps.{d}"), norm(state, f"layer_norms.{2 * d + 1}", x)
    if not plus:
        return x + linear(own, "chunk.linear2", F.gelu(linear(own, "chunk.linear1", normed)))
    hidden = linear(own, "linear1.0", normed)
    hidden = hidden + F.conv2d(hidden, own["dwc.weight"], own["dwc.bias"], padding=1, groups=hidden.shape[1])
    return x + linear(own, "linear2.0", F.gelu(hidden))


def model(state, x, spec, heads, groups, window, plus):
    """Maps of the stages, and the logits."""
    stem = part(state, "patch_proj")
    if plus:
        x = F.gelu(norm(stem, "1", F.conv2d(x, stem["0.weight"], stem["0.bias"], 2, 1)))
        x = norm(stem, "4", F.conv2d(x, stem["3.weight"], stem["3.bias"], 2, 1))
    else:
        x = norm(stem, "1", F.conv2d(x, stem["0.weight"], stem["0.bias"], 4))
    maps = []
    for i, kinds in enumerate(spec):
        if i:
            x = norm(
                state, f"down_projs.{i - 1}.1", F.conv2d(x, state[f"down_projs.{i - 1}.0.weight"], None, 2, int(plus))
            )
        for d, kind in enumerate(kinds):
            x = block(part(state, f"stages.{i}"), kind, d, x, i, heads[i], groups[i], window, plus)
        maps.append(x)
    pooled = norm(state, "cls_norm", x).mean((2, 3))
    return maps, pooled @ state["cls_head.weight"].T + state["cls_head.bias"]
