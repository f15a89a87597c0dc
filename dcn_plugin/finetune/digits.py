"""The embedded data set: real handwritten digits on a larger canvas, upright or under random affine warps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

SPLITS = {"train": (0, 1197), "val": (1197, 1397), "test": (1397, 1797)}
_SYNONYMS = {"training": "train", "valid": "val", "validation": "val", "eval": "val"}


@cache
def _source() -> tuple[torch.Tensor, np.ndarray]:
    """Return scikit-learn's images (uint8 [1797, 1, 8, 8]) and their labels, in one fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    # RandomState's stream is frozen by numpy's compatibility promise, so the split is the same on every machine.
    order = np.random.RandomState(0).permutation(len(data.target))
    images = torch.from_numpy(data.images[order] * (255.0 / 16.0)).round().to(torch.uint8)
    return images[:, None], data.target[order]


class Digits(Dataset):
    """Draw scikit-learn's handwritten digits in the middle of a black canvas, upright or warped.

    Sample `i` of a split shows source image `i % n`, so `copies=4` gives each source image four times, every time
    under another warp. A warp (rotation, scale, shear, translation, each uniform) is drawn from `(seed, split, i)`
    alone: the data set is the same in every epoch, process and run, and a resumed run sees what it would have seen.
    Splits are made by source image (1197 train, 200 val, 400 test), so no digit appears in two of them.

    Args:
        split: 'train', 'val' or 'test' (timm's synonyms such as 'validation' work too).
        warp: warp the digits; otherwise they stand upright and `copies` are identical.
        size: height and width of the canvas in pixels.
        digit_size: height and width of an unwarped digit in pixels, at most `size`.
        copies: how often each source image appears in the split.
        degrees: largest rotation to either side.
        scale: smallest and largest scale.
        shear: largest shear in degrees, along either axis.
        translate: largest shift along either axis, as a fraction of `size`.
        limit: keep only the first `limit` source images of the split.
        seed: seed of the warps.
        transform: called with the PIL image (mode 'L') of a sample.

    Raises:
        ValueError: unknown split, or a size, count or range that makes no sense.

    Example:
        >>> image, label = Digits('test', warp=True, size=48)[0]
        >>> image.size, 0 <= label <= 9
        ((48, 48), True)

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998, as shipped by
    `sklearn.datasets.load_digits`.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(
        self,
        split: str = "train",
        *,
        warp: bool = False,
        size: int = 48,
        digit_size: int = 28,
        copies: int = 1,
        degrees: float = 60.0,
        scale: Sequence[float] = (0.6, 1.3),
        shear: float = 20.0,
        translate: float = 0.15,
        limit: int | None = None,
        seed: int = 0,
        transform: Callable | None = None,
    ) -> None:
        split = _SYNONYMS.get(split, split)
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if not 8 <= digit_size <= size:
            raise ValueError(f"digit_size: expected 8 <= digit_size <= size={size}, got {digit_size}")
        if copies < 1:
            raise ValueError(f"copies: expected at least 1, got {copies}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: expected (smallest, largest), both positive, got {tuple(scale)}")
        for name, value in dict(degrees=degrees, shear=shear, translate=translate).items():
            if value < 0:
                raise ValueError(f"{name}: expected a non-negative range, got {value}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1 or None, got {limit}")
        first, last = SPLITS[split]
        last = last if limit is None else min(last, first + limit)
        self.split, self.warp, self.seed, self.copies, self.size = split, warp, seed, copies, size
        self.degrees, self.scale, self.shear, self.translate = degrees, tuple(scale), shear, translate
        self.transform = transform
        images, labels = _source()
        drawn = F.resize(images[first:last], [digit_size] * 2, InterpolationMode.BICUBIC, antialias=True)
        left, right = (size - digit_size) // 2, (size - digit_size + 1) // 2
        self._upright = F.pad(drawn, [left, left, right, right])
        self.targets = labels[first:last].tolist()
        self._drawn: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.targets) * self.copies

    def parameters(self, index: int) -> dict:
        """Return angle, translate, scale and shear of sample `index`, as `torchvision`'s `affine` takes them."""
        rng = np.random.default_rng([self.seed, list(SPLITS).index(self.split), index])
        unit = rng.uniform(-1.0, 1.0, size=6)
        low, high = self.scale
        return dict(
            angle=float(unit[0] * self.degrees),
            translate=(unit[1:3] * self.translate * self.size).tolist(),
            scale=float(low + (high - low) * (unit[3] + 1) / 2),
            shear=(unit[4:6] * self.shear).tolist(),
        )

    def draw(self, index: int) -> torch.Tensor:
        """Return sample `index` before its transform, uint8 [1, size, size]."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 <= index < {len(self)}, got {index}")
        if not self.warp:
            return self._upright[index % len(self.targets)]
        if index not in self._drawn:  # a warp costs as much as everything else a sample needs, and never changes
            image, options = self._upright[index % len(self.targets)], self.parameters(index)
            self._drawn[index] = F.affine(image, **options, interpolation=InterpolationMode.BILINEAR, fill=0)
        return self._drawn[index]

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.draw(index)[0].numpy(), mode="L")
        if self.transform is not None:
            image = self.transform(image)
        return image, self.targets[index % len(self.targets)]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"digits/{self.split}/{index}"

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return [self.filename(index) for index in range(len(self))]
