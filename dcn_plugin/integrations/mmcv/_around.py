"""What mm* packages ask while they are imported, and the answers that let them: each holds for that import alone."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_logger = logging.getLogger("dcn_plugin")
# Namespaces that were changed for good -> what `end` puts back.
_undo: list[Callable[[], Any]] = []


@contextmanager
def _accepted_version(module: ModuleType) -> Iterator[None]:
    """Show the least mmcv that a package accepts where ours is newer than it accepts.

    mmdet 3.3 and mmseg 1.2 say `assert mmcv_version < '2.2.0'` and run on 2.2.0.
    """
    spec = module.__spec__
    source = getattr(spec.loader, "get_source", lambda name: None)(module.__name__) if spec else None
    bounds = dict(re.findall(r"^mmcv_(min|max)\w*\s*=\s*['\"](.+?)['\"]", source or "", re.M | re.I))
    bounds = {name.lower(): bound for name, bound in bounds.items()}
    if bounds.keys() < {"min", "max"}:
        yield
        return
    from mmengine.utils import digit_version

    mmcv: Any = import_module("mmcv")
    version = mmcv.__version__
    if digit_version(version) < digit_version(bounds["max"]):
        yield
        return
    _logger.info("%s wants mmcv < %s, got %s: shown %s", module.__name__, bounds["max"], version, bounds["min"])
    mmcv.__version__ = bounds["min"]
    try:
        yield
    finally:
        mmcv.__version__ = version


# What mmpretrain 1.2 takes from transformers, whose version 5 has it elsewhere.
_OF_TRANSFORMERS = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


@contextmanager
def _without_multimodal(module: ModuleType) -> Iterator[None]:
    """Switch off mmpretrain's multimodal models where they cannot be imported: mmpretrain and mmdet fail with them."""
    yield
    _switch_off_multimodal(module)


def _switch_off_multimodal(module: ModuleType) -> None:
    spec = find_spec("transformers")
    if not getattr(module, "WITH_MULTIMODAL", False) or spec is None or spec.origin is None:
        return
    source = Path(spec.origin).with_name("modeling_utils.py").read_text(encoding="utf-8")
    if all(name in source for name in _OF_TRANSFORMERS):
        return
    _logger.info("mmpretrain's multimodal models need transformers 4: they are switched off, as without transformers")
    _set(module, "WITH_MULTIMODAL", False)


@contextmanager
def _given_to_those_that_asked(ops: ModuleType) -> Iterator[None]:
    """Give the names of `mmcv.ops` to modules of mm* packages that were imported without it and noted None."""
    yield
    _give_to_those_that_asked(ops)


def _give_to_those_that_asked(ops: ModuleType) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("mm") and "." in name and not name.startswith("mmcv.ops"):
            for asked in ops.__all__:
                if vars(module).get(asked, ops) is None:
                    _set(module, asked, getattr(ops, asked))


_ATTENTION = "mmcv.ops.multi_scale_deform_attn"


@contextmanager
def _with_our_attention(module: ModuleType) -> Iterator[None]:
    """Let models on a CPU reach our operator: mmcv asks its compiled module on a GPU alone."""
    yield
    _give_our_attention(module)


def _give_our_attention(module: ModuleType) -> None:
    from .attention import multi_scale_deformable_attn_pytorch as ours

    _set(module, ours.__name__, ours)


def _set(module: ModuleType, name: str, value: Any) -> None:
    had, was = name in vars(module), vars(module).get(name)

    def undo() -> None:
        setattr(module, name, was)
        if not had:
            delattr(module, name)

    _undo.append(undo)
    setattr(module, name, value)


def _around(name: str) -> Callable[[ModuleType], AbstractContextManager[None]] | None:
    if name == "mmcv.ops":
        return _given_to_those_that_asked
    if name == _ATTENTION:
        return _with_our_attention
    if name == "mmpretrain.utils.dependency":
        return _without_multimodal
    if name.startswith("mm") and "." not in name and name not in ("mmcv", "mmengine"):
        return _accepted_version
    return None


class _Around(MetaPathFinder):
    """Lets the others find a module, and has its execution done within the context manager that belongs to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        around = _around(fullname)
        if around is None:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)  # Python passes over such, too
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                # No package: `mmap` of Python's and the like. No loader: a folder without __init__.py.
                package = around is not _accepted_version or spec.submodule_search_locations is not None
                if package and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, around)
                return spec
        return None


class _Loader(Loader):
    """Executes a module as its own loader does, within a context manager; that loader may serve others and stays."""

    def __init__(self, loader: Any, around: Callable[[ModuleType], AbstractContextManager[None]]) -> None:
        self._loader, self._around = loader, around

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_loader"), name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if hasattr(self._loader, "create_module") else None

    def exec_module(self, module: ModuleType) -> None:
        # From here on nothing shows that it was not the only one.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with self._around(module):
            self._loader.exec_module(module)


_finder = _Around()


def begin() -> None:
    """Be asked first about every import, and catch up on what has been imported."""
    sys.meta_path.insert(0, _finder)
    if (ops := sys.modules.get("mmcv.ops")) is not None:  # `_registry` has brought it back
        _give_to_those_that_asked(ops)
    if (attention := sys.modules.get(_ATTENTION)) is not None:
        _give_our_attention(attention)
    if (dependency := sys.modules.get("mmpretrain.utils.dependency")) is not None:
        _switch_off_multimodal(dependency)
    # mmdet takes the attention from where mmcv.cnn has it, if mmcv.ops could be imported when that was.
    transformer, layer = sys.modules.get("mmcv.cnn.bricks.transformer"), "MultiScaleDeformableAttention"
    if transformer is not None and not hasattr(transformer, layer):
        _set(transformer, layer, getattr(import_module("mmcv.ops"), layer))


def end() -> None:
    """Undo `begin`, as far as it came, and what came of it."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    while _undo:
        _undo.pop()()
