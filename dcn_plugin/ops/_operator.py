"""What every operator registers with torch: tracing, exporters, gradients of both orders, vmap, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._exporters import let_exporters_decompose, let_inductor_call
from ._layout import new_contiguous, new_image
from ._vmap import Fold, Prepare, register_vmap

_lib = torch.library.Library("dcn_plugin", "IMPL")

# Name of a tensor -> the bit of `wanted` that asks a backward for its gradient, as in csrc/core/wanted.h.
WANTED = {
    "input": 1, "offset": 2, "weight": 4, "mask": 8,
    "value": 16, "sampling_locations": 32, "attention_weights": 64, "reference_points": 128,
}  # fmt: skip
# The bit beside them, torch's deterministic mode: no sums whose order may vary.
ORDERED = 1 << 8


def wanted_bits(names: Iterable[str]) -> int:
    """Return `wanted` for a backward that is asked for the gradients of these tensors, in torch's mode."""
    return sum(WANTED[name] for name in names) | (ORDERED if torch.are_deterministic_algorithms_enabled() else 0)


def _arguments(op: Any) -> tuple[list[str], list[str]]:
    """Names of the operator's tensors, which come first, and of its options."""
    tensor = torch._C.OptionalType.ofTensor()  # a tensor is one, too
    arguments = op.default._schema.arguments
    tensors = [a.name for a in arguments if a.type.isSubtypeOf(tensor)]
    return tensors, [a.name for a in arguments[len(tensors) :]]


def register(
    name: str,
    *,
    positions: Sequence[str],
    reference: Callable[..., Tensor],
    out_shape: Callable[..., Sequence[int]],
    fold: Fold,
    prepare: Prepare | None = None,
    closed_form: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    images: bool = True,
) -> Callable[..., Tensor]:
    """Complete the compiled operator `name` and return it.

    What it takes is told once, by its schema: tensors, of which the first gives the result type, device and layout,
    then options. `<name>_backward` takes the output's gradient, those tensors but for `closed_form`'s, the same options
    and `wanted`, the bits of `WANTED` and `ORDERED`; it returns `grad_<tensor>` for each tensor that can be asked for.

    Args:
        name: of the operator in `torch.ops.dcn_plugin`.
        positions: names of the tensors that autocast keeps in float32: half precision rounds them to whole pixels.
        reference: the definition, called with all arguments by name; second gradients go through it.
        out_shape: checks arguments given by name and returns the shape of the result.
        fold, prepare: how the samples of a `torch.vmap` become one call (`_vmap.py`).
        closed_form: name of a tensor -> its gradient from that of the output, where no kernel is needed.
        images: the tensors are maps, whose layout results and gradients take; else these are contiguous.
    """
    op, backward_op = (getattr(torch.ops.dcn_plugin, n) for n in (name, f"{name}_backward"))
    tensors, options = _arguments(op)
    saved = _arguments(backward_op)[0][1:]
    gradients = [result.name.removeprefix("grad_") for result in backward_op.default._schema.returns]
    closed_form = closed_form or {}
    new_like = new_image if images else new_contiguous
    single = len(gradients) == 1  # the backward operator then returns a tensor, not a tuple

    @torch.library.register_fake(f"dcn_plugin::{name}")
    def fake(*args: Any) -> Tensor:
        let_inductor_call()
        return new_like(args[0], out_shape(**dict(zip((*tensors, *options), args, strict=True))))

    let_exporters_decompose(op.default, fake)

    @torch.library.register_fake(f"dcn_plugin::{name}_backward")
    def _(grad_output: Tensor, *args: Any) -> Any:
        *args, wanted = args  # type: ignore[assignment]
        given = dict(zip((*saved, *options), args, strict=True))
        out_shape(**dict.fromkeys(closed_form), **given)
        found = []
        for g in gradients:
            if (t := given[g]) is None:
                found.append(args[0].new_empty(0))
            else:
                found.append(new_like(t, t.shape) if wanted & WANTED[g] else t.new_empty(0))
        return found[0] if single else tuple(found)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        given = dict(zip((*tensors, *options), inputs, strict=True))
        ctx.save_for_backward(*(given[t] for t in saved))
        ctx.options = [given[o] for o in options]

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wants = dict(zip(tensors, ctx.needs_input_grad, strict=False))
        asked = [g for g in gradients if wants[g]]
        found: dict[str, Tensor] = {}
        if asked:
            result = backward_op(grad_output, *ctx.saved_tensors, *ctx.options, wanted_bits(asked))
            found = dict(zip(gradients, (result,) if single else result, strict=True))
        for t, formula in closed_form.items():
            if wants[t]:
                found[t] = formula(grad_output)
        return *(found.get(t) if wants[t] else None for t in tensors), *(None for _ in options)

    torch.library.register_autograd(f"dcn_plugin::{name}", backward, setup_context=setup_context)

    def setup_context_of_backward(ctx: Any, inputs: tuple, output: Any) -> None:
        grad_output, *rest, ctx.wanted = inputs
        ctx.save_for_backward(grad_output, *rest[: len(saved)])
        ctx.options = rest[len(saved) :]

    def double_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients through the reference: right for every argument, at the reference's speed."""
        with torch.enable_grad():
            every: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
            grad_output, given = every[0], dict(zip(saved, every[1:], strict=True))
            arguments = dict.fromkeys(closed_form) | given | dict(zip(options, ctx.options, strict=True))
            asked = {g: along for g, along in zip(gradients, grads, strict=True) if ctx.wanted & WANTED[g]}
            first = torch.autograd.grad(
                reference(**arguments), [given[g] for g in asked], grad_output, create_graph=True
            )
            pairs = [(g, along) for g, along in zip(first, asked.values(), strict=True) if along is not None]
            targets = [t for t, needed in zip(every, ctx.needs_input_grad, strict=False) if needed]
            result = torch.autograd.grad([g for g, _ in pairs], targets, [w for _, w in pairs], allow_unused=True)
        found = iter(result)
        needed = ctx.needs_input_grad[: len(every)]
        return *(next(found) if n else None for n in needed), *(None for _ in ctx.options), None

    torch.library.register_autograd(
        f"dcn_plugin::{name}_backward", double_backward, setup_context=setup_context_of_backward
    )

    def asked(*args: Any) -> list[str]:
        return [g for g in gradients if args[-1] & WANTED[g] and args[1 + saved.index(g)] is not None]

    register_vmap(name, tensors, ["out"], fold, prepare)
    register_vmap(f"{name}_backward", ["out", *saved], gradients, fold, prepare, asked)

    def autocast(device: str) -> Callable[..., Tensor]:
        def kernel(*args: Any) -> Tensor:
            half = torch.get_autocast_dtype(device)
            cast = [
                t if t is None or t.dtype == torch.float64 else t.to(torch.float32 if n in positions else half)
                for n, t in zip(tensors, args, strict=False)
            ]
            with torch.amp.autocast(device, enabled=False):
                return op(*cast, *args[len(tensors) :])

        return kernel

    _lib.impl(name, autocast("cuda"), "AutocastCUDA")
    _lib.impl(name, autocast("cpu"), "AutocastCPU")
    return op
