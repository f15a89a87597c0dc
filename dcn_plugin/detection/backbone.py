"""timm models for their feature maps, and as the backbones of torchvision's detectors."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from .._config import require_timm_model
from ..mm.timm_backbone import TimmBackbone


class TimmMaps(NamedTuple):
    """A timm model that gives feature maps, and what whoever stands on it has to know.

    Fields:
        body: the model.
        channels, strides: of the maps, fine to coarse.
        channels_last: whether the maps are [N, H, W, C].
        in_chans, mean, std: what the images are and how timm's preprocessing normalises them.
        frozen: names of the modules that do not train; their parameters say so already.
        norm_eval: whether batch norms keep their stored statistics while training.
    """

    body: nn.Module
    channels: list[int]
    strides: list[int]
    channels_last: bool
    in_chans: int
    mean: list[float]
    std: list[float]
    frozen: list[str]
    norm_eval: bool


def timm_maps(
    model: str | Mapping[str, Any], trainable_layers: int | None = None, norm_eval: bool | None = None
) -> TimmMaps:
    """Build a timm model for its feature maps and freeze its first stages; arguments as in `DetectionBackbone`."""
    arguments = dict(model) if isinstance(model, Mapping) else {"name": model}
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(f"backbone: expected a timm model's name or dict(name=..., ...), got {model!r}")
    require_timm_model("backbone", name)
    if "features_only" in arguments:
        got = arguments["features_only"]
        raise ValueError(f"backbone: expected no features_only, which is always set, got {got!r}")
    pretrained = bool(arguments.get("pretrained") or arguments.get("checkpoint_path"))
    in_chans = int(arguments.get("in_chans", 3))
    body = TimmBackbone(name, **arguments).model
    info: Any = body.feature_info
    cfg: Any = getattr(body, "pretrained_cfg", None) or {}
    last = max(index % len(info.info) for index in info.out_indices)
    stages = [stage["module"] for stage in info.info[: last + 1]]
    if trainable_layers is None:
        trainable_layers = min(3, len(stages)) if pretrained else len(stages)
    if not 0 <= trainable_layers <= len(stages):
        raise ValueError(
            f"trainable_backbone_layers: expected 0 to {len(stages)} ({', '.join(stages)} of {name}), "
            f"got {trainable_layers}"
        )
    held = len(stages) - trainable_layers
    frozen = _modules_up_to(body, stages[held - 1]) if held else []
    for module in map(body.get_submodule, frozen):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return TimmMaps(
        body,
        info.channels(),
        info.reduction(),
        str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC"),
        in_chans,
        _per_channel(cfg.get("mean", (0.485, 0.456, 0.406)), in_chans),
        _per_channel(cfg.get("std", (0.229, 0.224, 0.225)), in_chans),
        frozen,
        pretrained if norm_eval is None else norm_eval,
    )


def to_nchw(maps: Sequence[Tensor], channels_last: bool) -> list[Tensor]:
    """Return the maps of a timm model as [N, C, H, W], which some models give as [N, H, W, C]."""
    return [m.permute(0, 3, 1, 2) for m in maps] if channels_last else list(maps)


def hold_still(body: nn.Module, frozen: Sequence[str], norm_eval: bool) -> None:
    """Take out of training mode what does not train: frozen modules and, with `norm_eval`, batch norms."""
    for module in map(body.get_submodule, frozen):
        module.training = False
    for module in body.modules() if norm_eval else ():
        if isinstance(module, _BatchNorm):
            module.training = False


class DetectionBackbone(nn.Module):
    """Feature maps of a timm model, named "0", "1", ... from fine to coarse, as torchvision's detectors take them.

    With `fpn_channels` they pass through torchvision's feature pyramid, which adds the map "pool" at twice the last
    stride. The parts are named as in torchvision's `BackboneWithFPN`, so its weights fit where timm's names are
    torchvision's, which is so for ResNets.

    Args:
        model: name of a timm model, or `dict(name=..., **arguments of TimmBackbone and of that model)`.
        fpn_channels: channels of every map of the pyramid; None leaves the pyramid out.
        trainable_layers: how many stages train, counted from the last as in torchvision; the stem is one of them. None
            trains the last three of a pretrained model and all of any other.
        norm_eval: keep batch norms of the backbone at their stored statistics while training; None does so for a
            pretrained model. Scale and shift train anyway, except in frozen stages.

    Attributes:
        channels, strides: of the maps that the timm model returns.
        out_channels: channels of the pyramid, or of the last map.
        in_chans, mean, std: what the images are and how timm's preprocessing normalises them.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, by name; what timm says of its own arguments.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        fpn_channels: int | None = None,
        trainable_layers: int | None = None,
        norm_eval: bool | None = None,
    ) -> None:
        super().__init__()
        made = timm_maps(model, trainable_layers, norm_eval)
        self.body, self.channels, self.strides, self.channels_last = made[:4]
        self.in_chans, self.mean, self.std, self.frozen, self.norm_eval = made[4:]
        self.fpn = None
        self.out_channels = self.channels[-1]
        if fpn_channels is not None:
            name = model["name"] if isinstance(model, Mapping) else model
            if any(fine * 2 != coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
                raise ValueError(
                    f"backbone: expected maps whose strides double, for a pyramid, got {self.strides} of {name}"
                )
            self.fpn = FeaturePyramidNetwork(self.channels, fpn_channels, extra_blocks=LastLevelMaxPool())
            self.out_channels = fpn_channels

    def train(self, mode: bool = True) -> "DetectionBackbone":
        """Switch to training, but for frozen stages and, with `norm_eval`, batch norms."""
        super().train(mode)
        if mode:
            hold_still(self.body, self.frozen, self.norm_eval)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of [N, C, H, W] images, fine to coarse."""
        maps = to_nchw(self.body(images), self.channels_last)
        named: dict[str, Tensor] = OrderedDict((str(i), m) for i, m in enumerate(maps))
        return named if self.fpn is None else self.fpn(named)


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Fit preprocessing made for colour images to other numbers of channels: their mean, for each."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _modules_up_to(body: nn.Module, stage: str) -> list[str]:
    """Return the names of all modules up to a stage.

    These are those defined no later, as timm defines in the order of execution, and parts of the same stages that lie
    elsewhere (the projections between DAT's stages), which timm's groups of parameters tell.
    """
    names = [name for name, _ in body.named_modules()]
    for candidate in (stage, stage.replace(".", "_"), f"model.{stage}"):
        if candidate in names:
            inside = [i for i, name in enumerate(names) if name == candidate or name.startswith(f"{candidate}.")]
            found = names[: inside[-1] + 1]
            return found + [name for name in _grouped_up_to(body, candidate) if name not in found]
    raise ValueError(f"trainable_backbone_layers: {type(body).__name__} has no module {stage!r} to freeze up to")


def _grouped_up_to(body: nn.Module, stage: str) -> list[str]:
    """Return the names of modules that own parameters, all in timm's groups up to the first of a stage's."""
    model: Any = getattr(body, "model", None)
    if not hasattr(model, "group_matcher"):
        return []
    numbers: dict[str, int] = {
        f"model.{name}": number
        for name, number in group_parameters(model, model.group_matcher(coarse=True), reverse=True).items()
    }
    limit = min((number for name, number in numbers.items() if name.startswith(f"{stage}.")), default=-1)
    owned: dict[str, int] = {}
    for name, number in numbers.items():
        module = name.rpartition(".")[0]
        owned[module] = max(number, owned.get(module, number))
    return [name for name, number in owned.items() if number <= limit]
