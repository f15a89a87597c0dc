"""What the operators cost, for counters that have to be told.

`torch.utils.flop_counter.FlopCounterMode` knows every operator of this package as soon as it is imported, and is the
one to ask: it counts two operations for a product and the sum it goes into. MMEngine's `get_model_complexity_info`
and `FlopAnalyzer` are told on import. fvcore, ptflops and thop take the costs with each call, from here. These four
count multiply-adds, half of `FlopCounterMode`'s number. torchinfo cannot be told, and leaves deformable layers out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .layers import LAYERS, SamplingModule

__all__ = ["fvcore_handles", "ptflops_hooks", "register_with_mmengine", "thop_ops"]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _operators() -> dict[str, Any]:
    """Our operators by their names in a graph; each has a formula, as its backward has."""
    ours = {str(operator).replace(".", "::"): operator for operator in flop_registry}
    return {name: ours[name] for name in ours if name.startswith("dcn_plugin::") and not name.endswith("_backward")}


def _argument(value: Any) -> Any:
    """What a node of a traced graph is given: a tensor's shape, without memory, and options as they are."""
    if value.type().kind() == "TensorType":
        return torch.empty(_shape(value), device="meta")
    if value.node().kind() == "prim::ListConstruct":
        return [item.toIValue() for item in value.node().inputs()]
    return value.toIValue()


def _handle(name: str, operator: Any) -> Callable[[Any, Any], Counter[str]]:
    """Multiply-adds of a node of a traced graph: half of the operations that the operator's formula counts."""

    def handle(inputs: Any, outputs: Any) -> Counter[str]:
        operations = flop_registry[operator](*map(_argument, inputs), out_val=_argument(outputs[0]))
        return Counter({name.removeprefix("dcn_plugin::"): operations // 2})

    return handle


def fvcore_handles() -> dict[str, Callable[[Any, Any], Counter[str]]]:
    """Multiply-adds of every operator, as `set_op_handle` of fvcore's (and MMEngine's) analyses takes them.

    A traced graph does not hold the regions: adaptive sampling and R-FCN's pooling are taken to read 2 x 2 samples, or
    pixels, for each bin.

    Example:
        >>> from dcn_plugin.flops import fvcore_handles
        >>> handles = fvcore_handles()  # FlopCountAnalysis(model, image).set_op_handle(**handles).total()
        >>> "dcn_plugin::deform_conv2d" in handles
        True
    """
    return {name: _handle(name, operator) for name, operator in _operators().items()}


def register_with_mmengine() -> None:
    """Tell MMEngine's analyses of operations and activations what the operators cost; what is there already stays."""
    try:
        from mmengine.analysis import complexity_analysis  # 15 ms, since MMEngine's registry has imported most of it
    except ImportError:  # versions before 0.6 have none
        return
    # MMEngine's function takes no handles, so its own table it is; a version without it counts as before.
    for table, handles in (
        ("_DEFAULT_SUPPORTED_FLOP_OPS", fvcore_handles()),
        ("_DEFAULT_SUPPORTED_ACT_OPS", {"dcn_plugin::deform_conv2d": _activations}),
    ):
        known: dict[str, Any] = getattr(complexity_analysis, table, {})
        for name, handle in handles.items():
            known.setdefault(name, handle)


def _activations(inputs: Any, outputs: Any) -> Counter[str]:
    return Counter(conv=int(torch.Size(_shape(outputs[0])).numel()))


def _multiply_adds(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """Multiply-adds of one call of a layer, those of what it predicts its offsets with included."""
    if isinstance(module, SamplingModule) and (known := module.multiply_adds(output)) is not None:
        return known
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # regions decide: count a second call
        module.forward(*inputs)
    return counter.get_total_flops() // 2


def _layers() -> list[type[nn.Module]]:
    """The package's layers, those included that are defined elsewhere, as far as they have been imported."""
    found = dict.fromkeys(LAYERS.values())
    waiting: list[type[nn.Module]] = [SamplingModule]
    while waiting:
        known = waiting.pop()
        if "forward" in vars(known):
            found[known] = None
        waiting += known.__subclasses__()
    return list(found)


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """Multiply-adds of every layer and operator, as `custom_modules_hooks` of ptflops takes them, for both backends.

    Classes derived from the layers need an entry of their own: ptflops goes by a module's very class.

    Example:
        >>> from dcn_plugin import DCNv2
        >>> from dcn_plugin.flops import ptflops_hooks
        >>> hooks = ptflops_hooks()  # get_model_complexity_info(model, (3, 64, 64), custom_modules_hooks=hooks)
        >>> import torch
        >>> DCNv2 in hooks, torch.ops.dcn_plugin.deform_conv2d in hooks
        (True, True)
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counted: Any = module
        counted.__flops__ += _multiply_adds(module, inputs, output)

    def of_operator(operator: Any) -> Callable[[tuple[Any, ...], tuple[Any, ...]], int]:
        return lambda args, outputs: flop_registry[operator](*args, out_val=outputs[0]) // 2

    return dict.fromkeys(_layers(), hook) | {operator: of_operator(operator) for operator in _operators().values()}


def thop_ops() -> Mapping[type[nn.Module], Callable[..., None]]:
    """Multiply-adds of every layer, as `custom_ops` of thop's `profile` takes them.

    Classes derived from the layers need an entry of their own: thop goes by a module's very class.

    Example:
        >>> from dcn_plugin import DCNv2
        >>> from dcn_plugin.flops import thop_ops
        >>> DCNv2 in thop_ops()  # profile(model, (image,), custom_ops=thop_ops())
        True
    """

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        counted: Any = module
        counted.total_ops += _multiply_adds(module, inputs, output)

    return dict.fromkeys(_layers(), count)
