"""How exporters that do not know our operators get ones that they know: through torch's table of decompositions.

An exporter decomposes the graph of `torch.export` with that table. What an operator becomes depends on the format, and
only the part that writes the format knows it: it is imported by name once that format is being written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

MOVED = ""  # why exporters are not told of our operators
try:
    from torch._decomp import register_decomposition
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
except ImportError as error:  # torch may move its own; the operators need none of them
    MOVED = str(error)


class _Format(NamedTuple):
    is_written: Callable[[], bool]
    module: str  # its `FORMS` has a function for each operator's name


_FORMATS: list[_Format] = []
_IN_TABLE: list[Any] = []


def register_format(is_written: Callable[[], bool], module: str) -> None:
    """Let graphs that are decomposed while `is_written()` have what the `FORMS` of `module` make of our operators."""
    _FORMATS.append(_Format(is_written, module))


def let_exporters_decompose(op: Any, fake: Callable[..., Tensor]) -> None:
    """Put the operator `op`, whose fake kernel is `fake`, into torch's table of decompositions."""
    if MOVED:
        return
    name = op.name().partition("::")[2]

    _IN_TABLE.append(op)

    @register_decomposition(op)
    def decompose(*args: Any) -> Any:
        if get_proxy_mode() is None:
            # No graph is written. Fake tensors of unknown sizes look into the table before they ask a fake kernel.
            return fake(*args) if isinstance(args[0], FakeTensor) else _refuse(name)
        for form in _FORMATS:
            if form.is_written():
                return import_module(form.module).FORMS[name](*args)
        return NotImplemented  # the graph keeps the operator

    # The exporter before torch.export, which has operators by name and would not say what to do.
    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"torch.onnx.export: expected dynamo=True for dcn_plugin::{name}, got dynamo=False")

    torch.onnx.register_custom_op_symbolic(op.name(), refuse, 9)  # type: ignore[attr-defined]  # no name of its list


def let_inductor_call() -> None:
    """Tell inductor that it calls our operators as they are; fake kernels ask for it, as they run before it lowers.

    It would do so unasked. But where the environment variable CI is set, it takes an operator that stands in torch's
    table of decompositions for a mistake of torch's own and does not compile.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    while _IN_TABLE and hasattr(lowering, "make_fallback"):
        op = _IN_TABLE.pop()
        if op not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(op, with_default=True))
            lowering.make_fallback(op, layout_constraint=constraint, warn=False)


def _refuse(name: str) -> Any:
    # What DTensor takes for "not known", as it is: shards of an image need their neighbours.
    raise NotImplementedError(f"dcn_plugin::{name}: expected an exporter to decompose it, got a call outside of one")
