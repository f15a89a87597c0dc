"""mm* packages on an mmcv without compiled operators: a stand-in for the module that it lacks.

`mmcv-lite` has all of `mmcv.ops` but the compiled `mmcv._ext`, so importing it fails. `install()` lets Python find a
module of that name, which calls this package's operators, torchvision's and plain PyTorch's. Configs name
`dcn_plugin.integrations.mmcv.auto` among their `custom_imports`.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec

from . import _around, _checkpoints, _registry
from ._extension import NAME, Finder, StandIn

__all__ = ["install", "installed", "uninstall"]

_finder = Finder()


def installed() -> bool:
    """Tell whether the stand-in is what `import mmcv._ext` finds.

    Example:
        >>> from dcn_plugin.integrations import mmcv
        >>> mmcv.installed()
        False
    """
    return _finder in sys.meta_path


def install() -> str:
    """Let Python find a stand-in for `mmcv._ext` where mmcv has none, so that `mmcv.ops` and what needs it import.

    It does not matter what has been imported before, or failed to. While a package that wants an older mmcv is
    imported, `mmcv.__version__` is the least that it accepts. Attention over levels, which mmcv computes by PyTorch on
    a CPU, runs on our operator there, too. `torch.load` takes the log history and NumPy numbers in
    MMEngine's checkpoints. An mmcv with compiled operators is left alone. A second call does nothing more. Processes
    that are started, not forked, need a call of their own.

    Returns:
        What was replaced, or why nothing was, in one line.

    Raises:
        ModuleNotFoundError: neither mmcv nor mmcv-lite is installed.

    Example:
        >>> from dcn_plugin.integrations import mmcv
        >>> print(mmcv.install())  # doctest: +SKIP
        dcn_plugin stands in for mmcv._ext, the compiled module that .../mmcv/__init__.py lacks; ...
        >>> import mmcv.ops, mmdet.models  # doctest: +SKIP
    """
    spec = find_spec("mmcv")
    if spec is None:
        raise ModuleNotFoundError("mmcv: expected mmcv-lite to be installed, got none", name="mmcv")
    compiled = PathFinder.find_spec(NAME, spec.submodule_search_locations)
    loaded = sys.modules.get(NAME)
    if compiled is not None or not isinstance(loaded, (StandIn, type(None))):
        where = compiled.origin if compiled else "a module of somebody else"
        return f"mmcv has compiled operators ({where}): nothing is replaced"
    if not installed():
        sys.meta_path.append(_finder)  # behind what finds a real one
        try:
            _registry.bring_back()
            _around.begin()
            _checkpoints.begin()
        except BaseException:
            uninstall()
            raise
    return (
        f"dcn_plugin stands in for mmcv._ext, the compiled module that {spec.origin} lacks; packages that want an "
        "older mmcv are shown one while they are imported, multi-scale deformable attention on a CPU is ours, "
        "torch.load takes MMEngine's checkpoints; "
        "dcn_plugin.integrations.mmcv.uninstall() undoes it"
    )


def uninstall() -> None:
    """Undo `install()`: `mmcv.ops` fails to import as before, and the registry has what it had.

    Modules of `mmcv.ops` that were imported leave `sys.modules`, and their layers the registry; `install()` brings the
    same ones back. What others have taken from them, as the models that were built, goes on working.

    Example:
        >>> from dcn_plugin.integrations import mmcv
        >>> mmcv.uninstall()  # nothing, where nothing was installed
    """
    if installed():
        sys.meta_path.remove(_finder)
        _around.end()
        _checkpoints.end()
        _registry.put_away()
