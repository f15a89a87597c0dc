"""Published weights of other projects, as timm hands them to a model: whatever they lie under, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..checkpoint import find_weights, match_wrappers


def official_weights(
    content: Mapping[str, Any], model: nn.Module, head: Sequence[str], features_only: bool
) -> dict[str, Any]:
    """Return the state dict in what a published file holds, under the names of `model`.

    Weights may lie under `model` and the like, averaged ones before others as everywhere (`find_weights`), and have
    `module.`, `model.` (transformers' form on the hub) or `backbone.` (detectors) before their names. timm turns its
    strict check off as soon as the number of classes differs, hence the check here: what is missing or unknown is an
    error by name, but for the classifier, and for all of the `head` where only feature maps are wanted.
    """
    state = match_wrappers(model, find_weights(content, None, "pretrained", []))
    own = model.state_dict()
    cfg = cast(Any, model).pretrained_cfg
    aside: tuple[str, ...] = ()
    if features_only:
        aside = tuple(f"{name}." for name in head)
    elif cast(Any, model).num_classes != cfg["num_classes"]:
        aside = (f"{cfg['classifier']}.",)
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked") and not k.startswith(aside)]
    unexpected = [k for k in state if k not in own and not k.startswith(aside)]
    if missing or unexpected:
        raise RuntimeError(
            f"pretrained: expected the weights of {cfg['architecture']} with these arguments, got some with missing "
            f"keys {missing}, unexpected keys {unexpected}"
        )
    return {key: value for key, value in state.items() if key in own} | {
        key: own[key] for key in own if key not in state and key.startswith(aside)
    }
