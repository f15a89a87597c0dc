"""Programs of others: the stand-in for mmcv's compiled module, torchvision's operators, functions of detectors."""

import sys
from types import ModuleType

import numpy as np
import torch
import torchvision

from dcn_plugin import integrations
from dcn_plugin.integrations import mmcv, ultralytics
from dcn_plugin.integrations.mmcv import _readers
from dcn_plugin.integrations.mmcv._extension import StandIn
from dcn_plugin.integrations.mmcv.deform import FUNCTIONS
from dcn_plugin.integrations.torchvision import accelerate
from dcn_plugin.ops import ms_deform_attn
from errors.case import Case


def without_mmcv(monkeypatch):
    monkeypatch.setattr(mmcv, "find_spec", lambda name: None)
    mmcv.install()


def modulated(offset, mask):
    """A 1x1 convolution of two images of 4 x 4, with offset and mask of these shapes."""

    def call():
        x, weight, none = torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 1, 1), torch.zeros(0)
        FUNCTIONS["modulated_deform_conv_forward"](
            x, weight, none, none, torch.zeros(offset), torch.zeros(mask), torch.zeros_like(x), none, kernel_h=1,
            kernel_w=1, stride_h=1, stride_w=1, pad_h=0, pad_w=0, dilation_h=1, dilation_w=1, group=1,
            deformable_group=1, with_bias=False,
        )  # fmt: skip

    return call


F4 = np.dtype("f4")


def array_state(*state, twice=False):
    array = _readers.Array()
    for _ in range(1 + twice):
        array.__setstate__(state or (1, (1,), F4, False, bytes(4)))


def log_state(**state):
    history = np.zeros(2)
    _readers.Log().__setstate__(dict(_log_history=history, _count_history=history, max_length=9) | state)


def told(input=(2, 3, 4, 4), offset=(2, 2, 4, 4), weight=(3, 3, 1, 1), **other):
    """The plain convolution of `modulated`, told something else."""
    x, none = torch.zeros(input), torch.zeros(0)
    options = dict(kW=1, kH=1, dW=1, dH=1, padW=0, padH=0, dilationW=1, dilationH=1, group=1, deformable_group=1)
    given = x, torch.zeros(weight), torch.zeros(offset), torch.zeros_like(x), none, none
    FUNCTIONS["deform_conv_forward"](*given, **options | other, im2col_step=1)


MMCV = [
    Case(lambda: told(input=(2, 3, 4)), ValueError, "input:", "expected a 4-D tensor", "got shape (2, 3, 4)"),
    Case(lambda: told(offset=(2, 2, 4)), ValueError, "offset:", "expected a 4-D tensor", "got shape (2, 2, 4)"),
    Case(lambda: told(group=0), ValueError, "group:", "expected at least 1", "got 0"),
    Case(lambda: told(deformable_group=0), ValueError, "deformable_group:", "expected at least 1", "got 0"),
    Case(lambda: told(group=3), ValueError, "weight:", "expected shape (3, 1, 1, 1)", "got (3, 3, 1, 1)"),
    Case(lambda: told(deformable_group=2), ValueError, "offset:", "expected shape (2, 4, 4, 4)", "got (2, 2, 4, 4)"),
    Case(
        lambda: _readers.statistic(torch, "load"),
        ValueError, "name:", "expected a statistic of MMEngine's HistoryBuffer", "got 'load' of",
    ),
    Case(lambda: _readers.dtype("O8"), ValueError, "dtype:", "expected one of numbers or text", "got 'O8'"),
    Case(
        lambda: _readers.dtype("f8").__setstate__((3, "<", None, None, None, -1, -1, 63)),
        ValueError, "dtype:", "expected the order of bytes and no fields or flags", "got (3, '<', None",
    ),
    Case(lambda: array_state(1, (2,), np.dtype("O"), False, b""), ValueError, "dtype:", "expected one", "dtype('O')"),
    Case(lambda: array_state(1, (2,)), ValueError, "array:", "expected version, shape, dtype", "got tuple"),
    Case(lambda: array_state(1, (-1,), F4, False, b""), ValueError, "array:", "expected a tuple of at", "got (-1,)"),
    Case(lambda: array_state(1, (2,), F4, False, b"1"), ValueError, "array:", "expected 8 bytes for shape", "got 1"),
    Case(lambda: array_state(twice=True), ValueError, "array:", "expected one state", "got a second"),
    Case(lambda: _readers.Log().__setstate__([]), ValueError, "HistoryBuffer:", "expected a dict", "got list"),
    Case(lambda: log_state(max_length=None), ValueError, "HistoryBuffer:", "expected a length and two", "['_count_his"),
    Case(
        lambda: log_state(statistics_methods={"mean": print}),
        ValueError, "HistoryBuffer:", "expected its own statistics, min, max, current, mean", "got {'mean'",
    ),
    Case(without_mmcv, ModuleNotFoundError, "mmcv:", "expected mmcv-lite to be installed", "got none"),
    Case(
        lambda: StandIn().furthest_point_sampling_forward(1, output=2),
        NotImplementedError, "furthest_point_sampling_forward:", "expected an operator that", "an mmcv with compiled",
    ),
    Case(
        lambda: StandIn().__wrapped__,
        AttributeError, "__wrapped__:", "expected an operator of mmcv's", "got a name of Python's",
    ),
    Case(
        modulated((2, 2, 3, 5), (2, 1, 4, 4)),
        ValueError, "offset:", "expected 2 images of at least 2 x 4 x 4 numbers", "got shape (2, 2, 3, 5)",
    ),
    Case(
        modulated((2, 2, 4, 5), (1, 1, 4, 4)),
        ValueError, "mask:", "expected 2 images of at least 1 x 4 x 4 numbers", "got shape (1, 1, 4, 4)",
    ),
]  # fmt: skip


def without_torchvision(monkeypatch):
    monkeypatch.setattr(integrations, "find_spec", lambda name: None)
    integrations.enable("torchvision")


BY_NAME = [
    Case(lambda: integrations.enable("mmcvs"), ValueError, "unknown integration", "did you mean 'mmcv'?", "'mmcvs'"),
    Case(
        without_torchvision,
        ModuleNotFoundError, "torchvision:", "expected torchvision to be installed", "got none",
    ),
]  # fmt: skip


def without_compiled_operators(monkeypatch):
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: False)
    accelerate()


TORCHVISION = [
    Case(lambda: accelerate("roi_align"), TypeError, "operators", "expected a sequence of names", "got 'roi_align'"),
    Case(lambda: accelerate([1]), TypeError, "operators", "expected a sequence of names", "got [1]"),
    Case(lambda: accelerate([]), ValueError, "operators", "expected names among deform_conv2d, roi_align", "got []"),
    Case(lambda: accelerate(["nms"]), ValueError, "operators", "expected names among deform_conv2d", "got ['nms']"),
    Case(
        without_compiled_operators, RuntimeError, "torchvision", "expected its compiled operators",
        f"got torchvision {torchvision.__version__} that could not load them beside torch {torch.__version__}",
    ),
]  # fmt: skip


def package_with(attention):
    """A package in memory with this function in the place of ultralytics' own; it leaves sys.modules with the case."""

    def call(monkeypatch):
        for name in ("utils", "transformer"):
            module = ModuleType(f"ultralytics.nn.modules.{name}")
            if attention is not None:
                module.multi_scale_deformable_attn_pytorch = attention
            monkeypatch.setitem(sys.modules, module.__name__, module)
        ultralytics.accelerate()

    return call


def other_layout(value, shapes, locations, weights):
    """Values whose heads come before their pixels."""
    return ms_deform_attn(value.reshape(1, 2, 14, 3).transpose(1, 2), shapes, locations, weights)


def nothing_of_theirs(*_):
    raise TypeError("other arguments")


OF_FUNCTIONS = [
    Case(
        package_with(None), RuntimeError, "ultralytics",
        "expected multi_scale_deformable_attn_pytorch in ultralytics.nn.modules.utils", "without it",
    ),
    *(
        Case(
            package_with(function), RuntimeError, "ultralytics", "expected a multi_scale_deformable_attn_pytorch that",
            "which does not",
        )
        for function in (other_layout, nothing_of_theirs)
    ),
]  # fmt: skip

CASES = [*MMCV, *BY_NAME, *TORCHVISION, *OF_FUNCTIONS]
