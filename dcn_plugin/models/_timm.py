"""What timm asks of every backbone here: its usual arguments looked at, its feature extractors by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ..layers.arguments import check_sides, rate
from ..ops._check import integer
from ..ops._transforms import unrecorded


def check_arguments(in_chans: Any, num_classes: Any, **rates: Any) -> None:
    """Raise TypeError or ValueError for one of timm's usual arguments that no model can have."""
    integer("in_chans", in_chans, 1)
    integer("num_classes", num_classes, 0)
    for name, value in rates.items():
        rate(name, value)


@unrecorded
def check_images(x: Tensor, least: int) -> Tensor:
    """Return `x` if it has the axes of images, of so many pixels along each side at least."""
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {list(x.shape)}")
    return check_sides(x, 2, least, "x")


class FeatureDict(FeatureGetterNet):
    """The maps, fine to coarse, by the numbers of their stages as they are given, like timm's `FeatureDictNet`."""

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = 4, **options: Any) -> None:
        super().__init__(model, out_indices, **options)
        numbers: list[int] = vars(self)["out_indices"]  # of stages; those given may count from the last one
        given = numbers if isinstance(out_indices, int) else out_indices
        names = dict(sorted(zip(numbers, map(str, given), strict=True)))
        self.out_indices, self.names = list(names), list(names.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of `x`, [N, C, H, W], fine to coarse."""
        return OrderedDict(zip(self.names, super().forward(x), strict=True))


def by_getter(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a model in which `feature_cls` "list" and "dict" are extractors that ask the model for maps.

    timm's own run the parts of a model one after the other, which needs them in sequences, without anything between.
    """
    kind = kwargs.get("feature_cls")
    own: dict[str, Any] = {"list": FeatureGetterNet, "dict": FeatureDict}
    return kwargs | {"feature_cls": own[kind.lower()]} if isinstance(kind, str) and kind.lower() in own else kwargs
