"""torchvision's operators on our kernels, in what they are asked for."""

import torch
import torchvision

from dcn_plugin.integrations.torchvision import accelerate
from errors.case import Case


def without_compiled_operators(monkeypatch):
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: False)
    accelerate()


CASES = [
    Case(lambda: accelerate("roi_align"), TypeError, "operators", "expected a sequence of names", "got 'roi_align'"),
    Case(lambda: accelerate([1]), TypeError, "operators", "expected a sequence of names", "got [1]"),
    Case(lambda: accelerate([]), ValueError, "operators", "expected names among deform_conv2d, roi_align", "got []"),
    Case(lambda: accelerate(["nms"]), ValueError, "operators", "expected names among deform_conv2d", "got ['nms']"),
    Case(
        without_compiled_operators, RuntimeError, "torchvision", "expected its compiled operators",
        f"got torchvision {torchvision.__version__} that could not load them beside torch {torch.__version__}",
    ),
]  # fmt: skip
