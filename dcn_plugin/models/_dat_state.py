"""State dicts of DAT for other sizes of images and windows: tables of position biases resized, the rest computed."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

#: Names of position biases, whose size follows the image's.
TABLES = ("rpe_table", "rpb", "relative_position_bias_table")
_COMPUTED = ("relative_position_index", "attn_mask")


def _resized(table: Tensor, wanted: Tensor) -> Tensor:
    """Return a table for maps or windows of another size, resized bicubically; as it is where heads differ, too."""
    if table.dim() != wanted.dim():
        return table
    if table.dim() == 2:  # [side * side, heads], of windows
        before, after = round(len(table) ** 0.5), round(len(wanted) ** 0.5)
        if table.shape[1] != wanted.shape[1] or before**2 != len(table):
            return table
        square = table.T.reshape(1, -1, before, before).float()
        return F.interpolate(square, (after, after), mode="bicubic").flatten(2)[0].T.to(table.dtype)
    if table.shape[0] != wanted.shape[0]:
        return table
    return F.interpolate(table[None].float(), tuple(wanted.shape[1:]), mode="bicubic")[0].to(table.dtype)


def _computed(model: nn.Module, name: str, state: dict[str, Any]) -> Tensor:
    """Return a buffer whose memory is given later, which holds nothing yet, on the device of the weights."""
    owner, _, kind = name.rpartition(".")
    like = next(value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point())
    return cast(Any, model.get_submodule(owner)).computed(like)[kind]


def fit_tables(model: nn.Module, state: dict[str, Any], prefix: str) -> list[str]:
    """Fit those names of `state` that begin with `prefix` to the sizes of `model`; say what was resized."""
    resized = 0
    for name, own in model.state_dict().items():
        key, kind = f"{prefix}{name}", name.rpartition(".")[2]
        given = state.get(key)
        if kind in _COMPUTED:
            state[key] = _computed(model, name, state) if own.is_meta else own
        elif kind in TABLES and isinstance(given, Tensor) and given.shape != own.shape:
            state[key] = _resized(given, own)
            resized += state[key] is not given
    return [f"{resized} tables of position biases resized for this model's sizes"] if resized else []
