"""timm's augmentation policies, tried out before any epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import PIL
from PIL import Image
from timm.data.auto_augment import AugmentOp

_SIGMAS = (
    5  # beyond, a normal distribution draws a few times in 10**7, of which one operation in fifteen gets its share
)


def operations(transform: Any) -> Iterator[AugmentOp]:
    """Yield the operations of every policy inside a transform."""
    if isinstance(transform, AugmentOp):
        yield transform
    for name in ("transforms", "ops", "policy"):
        for part in getattr(transform, name, ()):
            yield from operations(part)
    if isinstance(transform, (list, tuple)):
        for part in transform:
            yield from operations(part)


def magnitudes(operation: AugmentOp) -> tuple[float, float]:
    """Return the smallest and the largest magnitude that an operation draws."""
    upper, std = operation.magnitude_max or 10.0, operation.magnitude_std  # 10 is timm's own limit
    low = high = operation.magnitude
    if std == float("inf"):
        low = 0.0
    elif std > 0:
        low, high = low - _SIGMAS * std, high + _SIGMAS * std
    return max(0.0, min(low, upper)), max(0.0, min(high, upper))


def check_policy(transform: Any, policy: str | None, mode: str) -> None:
    """Try every operation of `transform` at the ends of its magnitudes.

    Raises:
        ValueError: an operation that fails there, as posterizing to 0 bits does from Pillow 13 on; in training it would
            after some hundred images.
    """
    image, state = Image.new(mode, (16, 16)), random.getstate()
    for operation in operations(transform):
        for magnitude in magnitudes(operation):
            arguments = () if operation.level_fn is None else operation.level_fn(magnitude, operation.hparams)
            try:
                operation.aug_fn(image, *arguments, **operation.kwargs)
            except Exception as error:
                raise ValueError(
                    f"augment: auto_augment={policy!r} draws magnitude {magnitude:g}, at which {operation.name} fails "
                    f"with Pillow {PIL.__version__}: {error}; expected a policy whose magnitudes end before, such as "
                    "'rand-m9-mstd0.5-mmax9-inc1'"
                ) from error
    random.setstate(state)  # signs and interpolation were drawn, which must not change what training draws
