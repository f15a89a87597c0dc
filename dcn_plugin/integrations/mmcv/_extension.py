"""The module that stands in for `mmcv._ext`: the functions of its siblings, and a refusal of every other name."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch

from ..._version import __version__

# Each has `FUNCTIONS`: name in `mmcv._ext` -> function with the argument names of mmcv's. Beside it, what of the published
# configurations of mmdet 3.3.0, mmseg 1.2.2 and mmpretrain 1.2.0 calls it. What else they take of `mmcv.ops` (point_sample,
# corner pooling, criss-cross attention, cells of NAS-FPN) is plain PyTorch there; mmpretrain's take nothing.
SIBLINGS = (
    "deform",  # dconv, mdconv, dpool, mdpool, SAC; RepPoints, VFNet, TOOD, FoveaBox, guided anchoring, DyHead, ...
    "nms",  # nms: every detector; softnms: CornerNet, CentripetalNet; nms_match: PISA; nms_rotated: none, but mmrotate
    "regions",  # roi_align: every two-stage detector and the targets of masks; roi_pool: none
    "losses",  # sigmoid: focal losses on a GPU (on a CPU mmdet and mmseg compute them by themselves); softmax: none
    "upsampling",  # CARAFE
    "masks",  # psamask: mmseg's PSANet; masked convolution: guided anchoring, when it predicts
    "norms",  # MMSyncBN: simple_copy_paste, strong_baselines
    "attention",  # on a GPU: Deformable DETR, DINO, DDQ, Grounding DINO, Mask2Former
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
