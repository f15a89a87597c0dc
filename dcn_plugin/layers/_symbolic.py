"""How ``torch.fx`` records a layer: as one call of the module, like PyTorch's own convolutions.

Passes over a graph (fusing or folding norms) look for the module in front of a norm. What they do not know they leave
alone; traced through, the layer would be a function there, which some of them take for a module's name.
"""

from typing import Any

import torch.fx
from torch import nn


def recorded_call(layer: nn.Module, *args: Any) -> Any:
    """The call of ``layer`` in the graph that is being recorded; None where there is none, or where it has no name."""
    tracer: Any = next((arg.tracer for arg in args if isinstance(arg, torch.fx.Proxy)), None)
    if tracer is None or layer._forward_hooks or layer._forward_pre_hooks:  # hooks are traced with what is inside
        return None
    try:
        path = tracer.path_of_module(layer)
    except (AttributeError, NameError):  # a tracer of another kind; a layer that is no part of the model
        return None
    return tracer.create_proxy("call_module", path, args, {}) if path else None
