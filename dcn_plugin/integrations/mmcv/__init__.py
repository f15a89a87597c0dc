"""mm* packages on an mmcv without compiled operators: a stand-in for the module that it lacks.

`mmcv-lite` has all of `mmcv.ops` but the compiled `mmcv._ext`, so importing it fails. `install()` lets Python find a
module of that name that calls our operators, torchvision's and plain PyTorch.
"""

from ._finder import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
