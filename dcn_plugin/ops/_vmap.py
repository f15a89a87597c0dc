"""The batching rule of every operator: `torch.vmap` becomes one call, with the samples folded into its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Names of tensors that need a value of their own for each sample -> name of each tensor that the samples are folded
# into (`out` is the result) -> the dimension that takes them, sample by sample. The other tensors serve all samples.
Fold = Callable[[set[str]], Mapping[str, int]]
# Changes tensors [samples, ...], by name, before they are folded.
Prepare = Callable[[dict[str, Tensor]], None]


def register_vmap(
    name: str,
    tensors: Sequence[str],
    results: Sequence[str],
    fold: Fold,
    prepare: Prepare | None = None,
    asked: Callable[..., Sequence[str]] | None = None,
) -> None:
    """Give an operator its batching rule.

    Args:
        name: of the operator in `torch.ops.dcn_plugin`.
        tensors: names of its first arguments, the tensors.
        results: names of what it returns: `out`, or of the tensors whose gradients they are.
        fold: where the samples go.
        prepare: what else sets the samples apart.
        asked: all arguments -> names of the results that are computed; the others are empty tensors. None: all.
    """
    op = getattr(torch.ops.dcn_plugin, name)

    @torch.library.register_vmap(f"dcn_plugin::{name}")
    def _(info: Any, in_dims: tuple, *args: Any) -> Any:
        size, options = info.batch_size, args[len(tensors) :]
        given = {n: t for n, t in zip(tensors, args, strict=False) if t is not None}
        mapped = {n: given[n].movedim(d, 0) for n, d in zip(tensors, in_dims, strict=False) if d is not None}
        computed = results if asked is None else asked(*args)
        if size == 0:
            # One call on zeros tells shapes and types, and keeps the results in the graph of the arguments.
            folded = {n: t.sum(0, dtype=t.dtype) for n, t in mapped.items()}
        else:
            dims = fold({*mapped, *computed})
            samples = {n: mapped[n] if n in mapped else t.expand(size, *t.shape) for n, t in given.items() if n in dims}
            if prepare is not None:
                prepare(samples)
            folded = {n: t.movedim(0, dims[n]).flatten(dims[n], dims[n] + 1) for n, t in samples.items()}
        found = op(*((given | folded).get(n) for n in tensors), *options)

        def unfold(of: str, result: Tensor) -> tuple[Tensor, int | None]:
            if of not in computed:
                return result, None
            if size == 0:
                return result.expand(0, *result.shape), 0
            return result.unflatten(dims[of], (size, result.shape[dims[of]] // size)), dims[of]

        if isinstance(found, Tensor):
            return unfold(results[0], found)
        return tuple(zip(*map(unfold, results, found), strict=True))
