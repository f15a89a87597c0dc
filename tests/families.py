"""The models of this package as timm lists them: what is registered is tested, whichever family it belongs to."""

import functools

import timm
import torch

import dcn_plugin  # noqa: F401  (registers the models)
from dcn_plugin.layers import offset_parameters
from dcn_plugin.models import FAMILIES

#: Family -> the names of its models.
MODELS = {family: timm.list_models(module=family) for family in FAMILIES}
NAMES = [name for names in MODELS.values() for name in names]


@functools.cache
def smallest(family):
    """The smallest model of a family, and of several that predict offsets alike small the one that predicts most."""

    def size(name):
        model = without_weights(name)
        sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
        predicting = sum(sizes[key] for key in offset_parameters(model))
        return sum(sizes.values()) - predicting, -predicting

    return min(MODELS[family], key=size)


def short(name):
    """Arguments that leave two blocks a stage: those that follow repeat them, and take longest to trace."""
    if name in MODELS["dcn_resnet"]:
        return dict(layers=(2, 2, 2, 2))
    if name in MODELS["dcn_dat"]:
        kinds = ("ND", "ND", "ND", "DD") if "plus" in name else ("LS", "LS", "LD", "LD")
        return dict(depths=(2, 2, 2, 2), spec=kinds)
    return dict(depths=(2, 2, 6, 2))  # the sixth block of the third stage may have a norm of its own


def without_weights(name):
    """A model whose tensors have shapes and no values."""
    with torch.device("meta"):
        return timm.create_model(name)


def images(size=64, channels=3, batch=2):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
