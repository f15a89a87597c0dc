"""Deformable convolution for PyTorch, plugged into timm and MMEngine by one import.

`import dcn_plugin` loads the compiled operators and registers the models with timm and the layers, backbones and
hooks with MMEngine, whichever of the two is installed.

Example:
    >>> import timm, dcn_plugin
    >>> model = timm.create_model("resnet18_dcn", num_classes=10)
    >>> isinstance(model.layer4[1].conv2, dcn_plugin.DCNv2)
    True
"""

import re as _re
import sys as _sys
import warnings as _warnings
from importlib import import_module as _import_module

from ._version import __version__

# While Python looks for what `-m` names, the arguments behind it are all there is of `sys.argv`.
_ASKED = "" if _sys.argv[:1] != ["-m"] else _sys.orig_argv[-len(_sys.argv)]
# `python -m dcn_plugin.collect_env` reports on installations whose operators do not load: they must not stop it here.
# `python -m dcn_plugin` becomes the interpreter that needs them.
_BARE = _re.fullmatch(r"(-\w*m)?dcn_plugin(\.collect_env)?", _ASKED) is not None

if not _BARE:
    from torch.onnx import is_in_onnx_export as _is_in_onnx_export

    from . import layers, ops, reference
    from .checkpoint import load_checkpoint
    from .convert import convert
    from .inference import prepare_for_inference
    from .layers import (
        ActiveConv2d,
        DAttention,
        DCNv1,
        DCNv2,
        DCNv2Pack,
        DCNv3,
        DCNv4,
        DeformConv1d,
        DeformConv2d,
        DeformMaxPool2d,
        DeformMaxPool2dPack,
        Dilated,
        MSDeformAttn,
        PCDAlignment,
        SecondOrderDeformableAlignment,
        SpatialTransformer,
    )
    from .ops._exporters import register_format as _register_format

# Of the layers all but those that pool regions and those with the name of another package; these are in `layers`.
__all__ = [
    "ActiveConv2d",
    "DAttention",
    "DCNv1",
    "DCNv2",
    "DCNv2Pack",
    "DCNv3",
    "DCNv4",
    "DeformConv1d",
    "DeformConv2d",
    "DeformMaxPool2d",
    "DeformMaxPool2dPack",
    "Dilated",
    "MSDeformAttn",
    "PCDAlignment",
    "SecondOrderDeformableAlignment",
    "SpatialTransformer",
    "__version__",
    "convert",
    "layers",
    "load_checkpoint",
    "ops",
    "prepare_for_inference",
    "reference",
]

# What to import of a framework to know that it works, and the module of ours that registers with it.
_PLUGS = (("timm", "dcn_plugin.models"), ("mmengine.registry", "dcn_plugin.registry"))


def _plug_in() -> None:
    for framework, module in _PLUGS:
        try:
            _import_module(framework)
        except ModuleNotFoundError as error:
            if error.name == framework.partition(".")[0]:
                continue  # not installed: nothing to register with
            cause: Exception = error
        except Exception as error:  # e.g. a torchvision built for another torch
            cause = error
        else:
            _import_module(module)
            continue
        name = framework.partition(".")[0]
        message = f"{name} is installed but cannot be imported, so dcn_plugin registers nothing with it "
        message += f"(operators and layers work): {type(cause).__name__}: {cause}"
        _warnings.warn(message, RuntimeWarning, stacklevel=3)


if not _BARE:
    _plug_in()
    _register_format(_is_in_onnx_export, "dcn_plugin.export._onnx_forms")
