"""Modules that fold their convolutions into fewer for inference (RepVGG, MobileOne, ...), and what a layer would lose.

Such a module reads the weights of its convolutions, makes a plain one of them and throws them away: a deformable layer
among them would lose its offsets without a word. Names alone do not tell: a whole model's `fuse()` may leave most
convolutions alone, and a block that is folded already has nothing left to fold. So the folding is tried on a copy.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# timm's, the papers' own code, RT-DETR's, YOLO's and super-gradients' names for it.
_FOLDING = re.compile(
    r"fuse(_\w+)?|full_fusion|partial_fusion|re_?param\w*|(switch|convert)_to_deploy|merge_(\w+_)?(kernels?|branches)"
    r"|structural_re_?param\w*"
)


@functools.cache
def _folding_methods(kind: type) -> tuple[str, ...]:
    """Methods of a class that fold: by their name, and callable without arguments (a fusion of feature maps is not)."""

    def folds(name: str) -> bool:
        method = inspect.getattr_static(kind, name)
        if not inspect.isfunction(method):
            return False
        others = list(inspect.signature(method).parameters.values())[1:]
        return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)

    return tuple(name for name in dir(kind) if _FOLDING.fullmatch(name) and folds(name))


class Folded(NamedTuple):
    """A convolution that a module folds, and what its folding would do to a deformable layer in its place."""

    conv: nn.Module
    owner: nn.Module
    method: str
    reason: str


def find_folded(model: nn.Module, plan: Mapping[nn.Module, nn.Module]) -> Folded | None:
    """Return the first convolution of `plan` (to the layer that is to take its place) that must stay as it is.

    The model is left alone; every module of it, and it itself, is asked.
    """
    for module in reversed(list(model.modules())):  # what lies inside first
        kind: Any = type(module)  # hashable, which mypy doubts of classes of modules
        methods = _folding_methods(kind)
        if not methods:
            continue
        inside = {path: m for path, m in module.named_modules(remove_duplicate=False) if path and m in plan}
        for method in methods if inside else ():
            for path, reason in _try(module, method, {path: plan[m] for path, m in inside.items()}).items():
                return Folded(inside[path], module, method, reason)
    return None


def _try(module: nn.Module, method: str, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Fold a copy that holds deformable layers, and tell what becomes of those that do not survive it."""
    # Folding makes convolutions, which draw random numbers.
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            folded, placed = _copy_with(module, layers)
            before = {path: {k: v.clone() for k, v in layer.state_dict().items()} for path, layer in placed.items()}
            result = getattr(folded, method)()
        except Exception as error:
            try:
                getattr(_copy_with(module, {})[0], method)()
            except Exception:
                return {}  # cannot be folded as it is, either
            return {next(iter(layers)): f"fails with a deformable layer: {error!r}"}
        # `fuse` may return what is to take the module's place.
        left = set((result if isinstance(result, nn.Module) else folded).modules())
    lost = {}
    for path, layer in placed.items():
        if layer not in left or any(m not in left for m in layer.children()):
            lost[path] = "would put a plain convolution in the place of the deformable layer"
        elif not _still_right(before[path], layer):
            lost[path] = "would write other weights into the deformable layer without regard to its offsets"
    return lost


def _copy_with(module: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Copy a module with the layers in it to the CPU, with norms and weights that show where they are multiplied in."""
    made = copy.deepcopy(module).eval()
    copies: dict[int, nn.Module] = {}  # what the module holds under two names stays one
    placed = {}
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        placed[path] = copies.setdefault(id(layer), copy.deepcopy(layer).eval())
        made.get_submodule(parent).register_module(child, placed[path])
    made = made.to_empty(device="cpu") if any(t.is_meta for t in made.state_dict().values()) else made.cpu()
    distinct = list(copies.values())
    norms = [m for m in made.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    for tensor in (t for m in (*distinct, *norms) for t in m.state_dict().values()):
        if type(tensor) is Tensor and tensor.is_floating_point():
            tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor))
    return made, placed


def _still_right(before: Mapping[str, Tensor], layer: nn.Module) -> bool:
    """Whether a layer computes what it did but for a factor and a summand of each output, those of a norm behind it."""
    after = layer.state_dict()
    same = before.keys() - {"weight", "bias"}
    if after.keys() - {"weight", "bias"} != same or any(not torch.equal(after[k], before[k]) for k in same):
        return False
    factor = (after["weight"].float() / before["weight"].float()).flatten(1)
    return torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=0.05)
