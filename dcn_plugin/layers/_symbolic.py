"""How `torch.fx` records a layer: as one call of the module, like PyTorch's own convolutions.

Passes over a graph (fusing or folding norms) look for the module in front of a norm. What they do not know they leave
alone; traced through, the layer would be a function there, which some of them take for a module's name.
"""

from typing import Any

import torch.fx
from torch import nn


def recorded_call(layer: nn.Module, *args: Any, **named: Any) -> Any:
    """The call of `layer` in the graph that is being recorded; None where there is none, or where it has no name."""
    for arg in (*args, *named.values()):
        if isinstance(arg, torch.fx.Proxy):
            return _record(layer, arg.tracer, args, named)
    return None


def _record(layer: nn.Module, tracer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if layer._forward_hooks or layer._forward_pre_hooks:  # traced with what is inside
        return None
    if hasattr(tracer, "node_to_qualname"):  # torchvision's extractor of features, which may be some of the inside
        return None
    try:
        path = tracer.path_of_module(layer)
    except (AttributeError, NameError):  # a tracer of another kind; a layer that is no part of the model
        return None
    return tracer.create_proxy("call_module", path, args, named) if path else None
