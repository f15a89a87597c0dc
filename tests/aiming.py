"""Convolutions whose samples all lie at stated places."""

import torch


def aim(arguments: dict, places: list[tuple[float, float]]) -> dict:
    """Let every sample read one of `places`, by turns."""
    offset, (kh, kw) = arguments["offset"], arguments["weight"].shape[2:]
    n, _, height, width = offset.shape
    pairs = {k: (v, v) if isinstance(v := arguments[k], int) else v for k in ("stride", "padding", "dilation")}
    starts = [
        torch.arange(size) * pairs["stride"][d]
        - pairs["padding"][d]
        + (torch.arange(k) * pairs["dilation"][d])[:, None]
        for d, (size, k) in enumerate([(height, kh), (width, kw)])
    ]
    base = torch.stack([starts[0][:, None, :, None].expand(kh, kw, height, width),
                        starts[1][None, :, None, :].expand(kh, kw, height, width)], 2)  # fmt: skip
    shape = (n, offset.shape[1] // (2 * kh * kw), kh, kw, 2, height, width)
    turn = torch.arange(n * shape[1] * kh * kw * height * width).reshape(*shape[:4], height, width) % len(places)
    aimed = torch.tensor(places, dtype=torch.float64)[turn].movedim(-1, 4) - base
    return {**arguments, "offset": aimed.reshape(offset.shape).to(offset)}
