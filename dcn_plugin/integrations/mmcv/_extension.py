"""The module that stands in for `mmcv._ext`: the functions of its siblings, and a refusal of every other name."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch

from ..._version import __version__

# Each has `FUNCTIONS`: name in `mmcv._ext` -> function with the argument names of mmcv's.
SIBLINGS = ("deform", "nms", "regions", "losses", "upsampling", "masks", "norms", "attention")


def _refusal(name: str) -> Callable[..., NoReturn]:
    """Make what stands under a name that nothing here serves: importing `mmcv.ops` works, calling this does not."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: expected an operator that dcn_plugin has in place of mmcv's, got one that needs an mmcv with "
            "compiled operators"
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


class StandIn(ModuleType):
    """What `import mmcv._ext` gives."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Operators of dcn_plugin, torchvision and torch under the names of mmcv's.")
        self.get_compiler_version = lambda: f"none (dcn_plugin {__version__})"
        self.get_compiling_cuda_version = lambda: torch.version.cuda or "not available"
        for sibling in SIBLINGS:
            self.__dict__.update(import_module(f".{sibling}", __package__).FUNCTIONS)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"{name}: expected an operator of mmcv's, got a name of Python's")
        return _refusal(name)
