"""What mm* packages of 2023 need of today's torch and transformers, beside operators: each mend says what it changes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

# The newest mmcv that their own checks let pass. mmcv 2.2.0 has the same `mmcv.ops`, argument for argument.
ACCEPTED = "2.1.0"
CHECKS = ("mmdet", "mmseg")  # packages whose `__init__` compares versions; mmpretrain takes 2.2.0


@contextmanager
def _accepted_version() -> Iterator[None]:
    """Show mmdet's and mmseg's check of mmcv's version one that it accepts, for as long as the check runs."""
    import mmcv

    real = mmcv.__version__
    mmcv.__version__ = ACCEPTED if real.startswith("2.2.") else real
    try:
        yield
    finally:
        mmcv.__version__ = real


@contextmanager
def _no_multimodal(module: ModuleType) -> Iterator[None]:
    """Leave out mmpretrain's models of text: they import names that transformers 5 no longer has."""
    yield
    from importlib.metadata import PackageNotFoundError, version

    try:
        too_new = int(version("transformers").partition(".")[0]) >= 5
    except PackageNotFoundError:
        too_new = False
    if too_new:
        module.__dict__["WITH_MULTIMODAL"] = False


AROUND: dict[str, Callable[[ModuleType], Any]] = {
    **{name: lambda module: _accepted_version() for name in CHECKS},
    "mmpretrain.utils.dependency": _no_multimodal,
}


class _Around(MetaPathFinder):
    """Run the few modules of `AROUND` inside of what they need; every other import passes by."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in AROUND else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Inside(spec.loader, AROUND[fullname])
        return spec


class _Inside(Loader):
    def __init__(self, loader: Loader, around: Callable[[ModuleType], Any]) -> None:
        self.loader, self.around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self.around(module):
            self.loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename ...: inspect and pkgutil ask for them
        return getattr(self.loader, name)


def _method(owner: Any, name: str) -> Any:
    """`getattr` for checkpoints, and of nothing else: MMEngine pickles the log's methods min, max, current and mean."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise ValueError(f"name: expected a statistic of MMEngine's HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(owner, name)


def _checkpoint_types() -> list[Any]:
    """What MMEngine's checkpoints hold beside tensors, under the names of NumPy 1 and 2."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    functions = [multiarray._reconstruct, multiarray.scalar]
    old_and_new = [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in functions]
    # Every kind of number has a class of its own (`numpy.dtypes.Float64DType`), which building a dtype makes.
    kinds = {type(np.dtype(kind)) for kind in (*np.sctypeDict.values(),) if np.dtype(kind).kind in "biufcSU"}
    return [HistoryBuffer, np.ndarray, np.dtype, *kinds, *old_and_new, (_method, "builtins.getattr")]


_around = _Around()
_allowed: list[Any] = []


def mend() -> list[str]:
    """Apply every mend that this installation needs, and say which."""
    if _around not in sys.meta_path:
        sys.meta_path.insert(0, _around)
    said = [f"mmcv {ACCEPTED}'s version shown to the checks of {' and '.join(CHECKS)}"]
    try:
        types = _checkpoint_types()
    except ModuleNotFoundError:  # no MMEngine: none of its checkpoints either
        types = []
    before = torch.serialization.get_safe_globals()
    _allowed.extend(kind for kind in types if kind not in before)
    if types:
        torch.serialization.add_safe_globals(types)
        said.append("torch.load takes MMEngine's log history and NumPy's numbers")
    return said


def unmend() -> None:
    """Undo all of it; modules that are imported stay."""
    if _around in sys.meta_path:
        sys.meta_path.remove(_around)
    kept = [kind for kind in torch.serialization.get_safe_globals() if kind not in _allowed]
    _allowed.clear()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)
