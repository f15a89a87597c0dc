"""Where Python finds the stand-in: behind everything else, so that a compiled module of mmcv's own comes first."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

NAME = "mmcv._ext"


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(NAME, self, origin="dcn_plugin") if fullname == NAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from ._extension import StandIn

        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        registry = sys.modules.get("dcn_plugin.registry")
        if registry is not None:  # mmcv registers its own layers next
            registry.leave_mmcvs_place()


_finder = _Finder()


def installed() -> bool:
    """Tell whether the stand-in can be found."""
    return _finder in sys.meta_path


def install() -> str:
    """Let `mmcv._ext` be found where mmcv has none; return what was done, in a sentence."""
    spec = find_spec("mmcv")
    if spec is not None and PathFinder.find_spec(NAME, spec.submodule_search_locations) is not None:
        return "mmcv has compiled operators: nothing replaced"
    if not installed():
        sys.meta_path.append(_finder)
    return "dcn_plugin stands in for mmcv._ext"


def uninstall() -> None:
    """Take it away again."""
    if installed():
        sys.meta_path.remove(_finder)
