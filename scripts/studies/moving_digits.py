"""Video that draws itself: digits that move over a moving texture, with noise, and the flow between its frames."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from dcn_plugin.finetune.digits import Digits
from dcn_plugin.finetune.seeded import mixed_seed

DIGIT = 20  # pixels, height and width
SPLITS = ("train", "test")


class Clip(NamedTuple):
    """One clip, or a batch of them (N in front).

    Fields:
        noisy: `[T, 1, H, W]`, what there is to see.
        clean: `[T, 1, H, W]`, from 0 to 1.
        flows: `[T - 1, 2, H, W]`, (x, y) in pixels: from each pixel of frames 1 to T - 1 to where it was in the frame
            before. Known from how the clip was drawn, and then spoilt, as an estimate would be.
    """

    noisy: Tensor
    clean: Tensor
    flows: Tensor


def read_at(image: Tensor, top: float, left: float, size: int) -> Tensor:
    """Return `[size, size]` of an image `[H, W]` from (top, left) on, in fractions of a pixel; zeros outside."""
    height, width = image.shape
    rows, columns = (torch.arange(size) + start for start in (top, left))
    y, x = torch.meshgrid(2 * rows / (height - 1) - 1, 2 * columns / (width - 1) - 1, indexing="ij")
    return F.grid_sample(image[None, None], torch.stack((x, y), -1)[None], align_corners=True)[0, 0]


class MovingDigits(Dataset[Clip]):
    """Clips of digits that move over a texture, each with a velocity of its own.

    Clip i follows from `(seed, split, i)` alone, so that a resumed run sees what it would have seen. Digits of the two
    splits are different ones.

    Args:
        split: 'train' or 'test'.
        clips: how many there are.
        frames: T.
        size: H and W.
        digits: how many move in a clip.
        speed: largest velocity along either axis, in pixels a frame.
        noise: standard deviation of the noise in each pixel.
        flow_error: standard deviation of what is added to the flow, in pixels; it varies smoothly over a frame.
        seed: of everything that is drawn.
    """

    def __init__(
        self, split: str, clips: int, frames: int, size: int, digits: int, speed: float, noise: float,
        flow_error: float, seed: int,
    ) -> None:  # fmt: skip
        self.clips, self.frames, self.size, self.digits = clips, frames, size, digits
        self.speed, self.noise, self.flow_error = speed, noise, flow_error
        self.key = [seed, SPLITS.index(split)]
        self.source = Digits(split, size=DIGIT, digit_size=DIGIT)

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.clips:
            raise IndexError(index)
        draw = torch.Generator().manual_seed(mixed_seed(*self.key, index))
        size, margin = self.size, math.ceil(self.speed * self.frames) + 1

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=draw)

        wide = size + 2 * margin
        grains = F.interpolate(uniform(0, 0.6, 1, 1, wide // 3, wide // 3), (wide, wide), mode="bicubic")
        texture = grains[0, 0].clamp(0, 1)
        drawn = torch.randint(len(self.source), (self.digits,), generator=draw).tolist()
        sprites = [pil_to_tensor(self.source[number][0])[0] / 255 for number in drawn]
        places, bright = uniform(0, size - DIGIT, self.digits, 2), uniform(0.7, 1, self.digits)
        velocities = uniform(-self.speed, self.speed, 1 + self.digits, 2)  # (y, x): of the texture, then of the digits
        clean, flows = [], []
        for time in range(self.frames):
            top, left = (margin - time * velocities[0]).tolist()
            frame, flow = read_at(texture, top, left, size), -velocities[0].flip(0)[:, None, None].expand(2, size, size)
            for sprite, place, velocity, light in zip(sprites, places, velocities[1:], bright, strict=True):
                top, left = (-place - time * velocity).tolist()
                cover = read_at(sprite, top, left, size)
                frame = torch.lerp(frame, light, cover)
                flow = torch.where(cover > 0.5, -velocity.flip(0)[:, None, None], flow)
            clean.append(frame)
            flows.append(flow)
        truth = torch.stack(clean)[:, None]
        error = torch.randn(self.frames - 1, 2, 4, 4, generator=draw)
        error = F.interpolate(error, (size, size), mode="bicubic", align_corners=True)
        noisy = truth + self.noise * torch.randn(truth.shape, generator=draw)
        return Clip(noisy, truth, torch.stack(flows[1:]) + self.flow_error * error)
