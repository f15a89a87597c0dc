"""The module that stands in for `mmcv._ext`: the functions of its siblings, and a refusal of every other name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch

from ..._version import __version__
from . import _registry

NAME = "mmcv._ext"
# Each has `FUNCTIONS`: name in `mmcv._ext` -> function with the argument names of mmcv's. Beside it, what of the
# published configurations of mmdet 3.3.0, mmseg 1.2.2 and mmpretrain 1.2.0 calls it. What else they take of `mmcv.ops`
# (point_sample, corner pooling, criss-cross attention, cells of NAS-FPN) is plain PyTorch; mmpretrain's take nothing.
SIBLINGS = (
    "deform",  # dconv, mdconv, dpool, mdpool, SAC; RepPoints, VFNet, TOOD, FoveaBox, guided anchoring, DyHead, ...
    "nms",  # nms: every detector; softnms: CornerNet, CentripetalNet; nms_match: PISA; nms_rotated: none, but mmrotate
    "regions",  # roi_align: every two-stage detector and the targets of masks; roi_pool: none
    "losses",  # sigmoid: focal losses on a GPU (on a CPU mmdet and mmseg compute them by themselves); softmax: none
    "upsampling",  # CARAFE
    "masks",  # psamask: mmseg's PSANet; masked convolution: guided anchoring, when it predicts
    "norms",  # MMSyncBN: simple_copy_paste, strong_baselines
    "attention",  # Deformable DETR, DINO, DDQ, Grounding DINO, Mask2Former; on a CPU by a function of mmcv's own
)


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

    def __init__(self) -> None:
        super().__init__(NAME, "Operators of dcn_plugin, torchvision and torch under the names of mmcv's.")
        # mmcv's and mmdet's reports of the environment ask for these.
        self.get_compiler_version = lambda: f"none: dcn_plugin {__version__} stands in"
        self.get_compiling_cuda_version = lambda: torch.version.cuda or "not available"
        for sibling in SIBLINGS:
            self.__dict__.update(import_module(f".{sibling}", __package__).FUNCTIONS)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"{name}: expected an operator of mmcv's, got a name of Python's")
        return _refusal(name)


class Finder(MetaPathFinder, Loader):
    """Finds the stand-in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(NAME, self, origin=__file__) if fullname == NAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn()

    def exec_module(self, module: ModuleType) -> None:
        _registry.make_room()  # the next that mmcv.ops does is to register its layers
