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

from .layers import LAYERS, DeformConv2d, SamplingModule
from .ops._flops import UNKNOWN

__all__ = ["fvcore_handles", "ptflops_hooks", "register_with_mmengine", "thop_ops"]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _conv_handle(inputs: Any, outputs: Any) -> Counter[str]:
    """Multiply-adds of a node of a traced graph."""
    operations = flop_registry[torch.ops.dcn_plugin.deform_conv2d](
        *(torch.empty(_shape(value), device="meta") for value in inputs[:3]),
        out_val=torch.empty(_shape(outputs[0]), device="meta"),
    )
    return Counter(deform_conv2d=operations // 2)


def _pooling_handle(name: str, reads: int, samples: int | None) -> Callable[[Any, Any], Counter[str]]:
    """Multiply-adds of pooling: `reads` pixels a sample; `samples` is the place of their number in the schema."""

    def handle(inputs: Any, outputs: Any) -> Counter[str]:
        along = 0 if samples is None else inputs[samples].toIValue()
        return Counter({name: reads * int(torch.Size(_shape(outputs[0])).numel()) * (along or UNKNOWN) ** 2})

    return handle


def fvcore_handles() -> dict[str, Callable[[Any, Any], Counter[str]]]:
    """Multiply-adds of every operator, as `set_op_handle` of fvcore's (and MMEngine's) analyses takes them.

    A traced graph does not hold the regions: adaptive sampling and R-FCN's pooling are taken to read 2 x 2 samples, or
    pixels, for each bin.

    Example:

        >>> from dcn_plugin.flops import fvcore_handles
        >>> for name in fvcore_handles():  # FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles()).total()
        ...     print(name)
        dcn_plugin::deform_conv2d
        dcn_plugin::deform_roi_pool
        dcn_plugin::deform_ps_roi_pool
        dcn_plugin::ps_roi_pool
    """
    return {
        "dcn_plugin::deform_conv2d": _conv_handle,
        "dcn_plugin::deform_roi_pool": _pooling_handle("deform_roi_pool", 4, 6),
        "dcn_plugin::deform_ps_roi_pool": _pooling_handle("deform_ps_roi_pool", 4, 8),
        "dcn_plugin::ps_roi_pool": _pooling_handle("ps_roi_pool", 1, None),
    }


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
    if isinstance(module, DeformConv2d):
        pixels = output.shape[0] * output.shape[2] * output.shape[3]
        taps = module.kernel_size[0] * module.kernel_size[1]
        predictor = getattr(module, "conv_offset", None)
        predicted = 0 if predictor is None else predictor.weight.numel()
        return pixels * (module.weight.numel() + 4 * taps * module.in_channels + predicted)
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

    operators = [getattr(torch.ops.dcn_plugin, name.partition("::")[2]) for name in fvcore_handles()]
    return dict.fromkeys(_layers(), hook) | {operator: of_operator(operator) for operator in operators}


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
