"""Finding what ours can serve, in a model and in transformers, by the texts that ours was written from."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import transformers
from torch import nn

from ._modules import OURS, MultiScaleDeformableAttention, sampled_v2

_NAME = r"multi_?scale_?deform|ms_?deform"
_CORE = "ms_deformable_attn_core"  # D-FINE's modules keep their sampler in this attribute
_CENTRES = "get_reference_points"


@cache
def _known(theirs: Any) -> Callable[..., Any] | None:
    """Return what we have for a function of theirs, or for ours itself; None: it is not known."""
    if theirs in OURS.values():
        return theirs
    try:
        text = inspect.getsource(theirs)
    except (OSError, TypeError):
        return None
    return OURS.get(hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12])


class Served:
    """Marks the classes that `_served` makes; copies and pickles make them anew from what they stand for."""

    _made_of: tuple[type, tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return _new, type(self)._made_of, *made[2:]


def _ours(kind: Any, name: str) -> Any:
    """Return what ours has in place of a member of a class, as a class holds it; None: nothing."""
    if name == _CORE:
        return property(lambda _: sampled_v2)
    found = _known(getattr(kind, name, None))
    return staticmethod(found) if found is not None and name == _CENTRES else found


@cache
def _served(kind: type, names: tuple[str, ...]) -> type:
    """Return the subclass that has ours of these members.

    It keeps the name, by which transformers, accelerate and others find modules, and is one of what it stands for.
    """
    own = {name: _ours(kind, name) for name in names}
    about = dict(__module__=kind.__module__, __qualname__=kind.__qualname__, __doc__=kind.__doc__)
    return type(kind.__name__, (Served, kind), {**about, **own, "_made_of": (kind, names)})


def _new(kind: type, names: tuple[str, ...]) -> Any:
    served: Any = _served(kind, names)
    return served.__new__(served)


# What is found in models and in transformers.


def _looks_deformable(module: nn.Module) -> bool:
    named = re.search(_NAME, type(module).__name__, re.I) is not None
    return named or {"sampling_offsets", "attention_weights"} <= module._modules.keys()


def found_in(model: nn.Module) -> tuple[dict[nn.Module, tuple[str, ...]], list[str]]:
    """Return the modules that ours can serve, with the members to replace; and the classes that it does not know."""
    serve: dict[nn.Module, tuple[str, ...]] = {}
    done: set[nn.Module] = set()  # served, or below what is
    unknown = []
    for module in model.modules():
        if module in done or not _looks_deformable(module) or type(module).__module__.startswith("dcn_plugin."):
            continue
        if isinstance(module, Served):
            done.update(module.modules())
        elif "forward" not in vars(module) and _known(type(module).forward) is not None:
            serve[module] = ("forward",)
            done.update(module.modules())
        elif _known(vars(module).get(_CORE)) is not None:
            serve[module] = (_CORE,)
        else:
            unknown.append(module)
    # Around a sampler that is served, modules may have what forward they like: their class's, or put onto them as
    # device hooks do.
    unknown = [module for module in unknown if not any(m in serve or m in done for m in module.modules())]
    for module in model.modules():
        # Precise centres are of use only where nothing below asks for the values' type.
        if not isinstance(module, Served) and _known(getattr(type(module), _CENTRES, None)) is not None:
            if not any(m in unknown for m in module.modules()):
                serve[module] = (_CENTRES,)
    return serve, sorted({type(module).__name__ for module in unknown})


@cache
def _families() -> dict[str, ModuleType]:
    """Import the files of transformers that define such attention; what is to be replaced is then in memory."""
    folder = Path(transformers.__path__[0], "models")
    found = {}
    for path in sorted(folder.glob("*/modeling_*.py")):
        if re.search(rf"^(class|def) \w*({_NAME})", path.read_text(encoding="utf-8"), re.I | re.M):
            found[path.parent.name] = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    return found


class Place(NamedTuple):
    """An attribute that was set: of a class, or the class of a module."""

    owner: Any
    name: str
    before: Any
    after: Any

    def now(self) -> Any:
        return type(self.owner) if self.name == "__class__" else vars(self.owner).get(self.name)


def places_in(model: nn.Module, serve: Mapping[nn.Module, tuple[str, ...]]) -> Iterator[Place]:
    for module, names in serve.items():
        kind: Any = type(module)
        yield Place(module, "__class__", kind, _served(kind, names))


def _replaceable(module: ModuleType) -> Iterator[tuple[type, str]]:
    """Yield the classes that a file of transformers defines, with the member that ours may replace."""
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            if "forward" in vars(kind) and re.search(_NAME, kind.__name__, re.I):
                yield kind, "forward"
            if _CENTRES in vars(kind):
                yield kind, _CENTRES


def everywhere() -> tuple[dict[str, list[Place]], list[str]]:
    """Return what to set in the classes of each family, and the classes that are not known."""
    places: dict[str, list[Place]] = {}
    unknown = []
    for family, module in _families().items():
        # Around a sampler that is known, modules may have what forward they like.
        sampler = getattr(getattr(module, MultiScaleDeformableAttention.__name__, None), "forward", None)
        for kind, name in _replaceable(module):
            before, ours = vars(kind)[name], _ours(kind, name)
            if ours is None and name == "forward" and _known(sampler) is None:
                unknown.append(f"{family}.{kind.__name__}")
            elif ours is not None and getattr(kind, name) not in OURS.values():
                places.setdefault(family, []).append(Place(kind, name, before, ours))
    return places, unknown
