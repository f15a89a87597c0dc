"""Export to ExecuTorch: a `.pte` file without operators of this package, compared with the model.

ExecuTorch runs an operator of ours only where a kernel for it has been compiled into the runtime, and refuses it before
(`Missing out variants: {'dcn_plugin::deform_conv2d'}`). So the file holds `grid_sample` and a convolution in its place.
Needs the package executorch: `pip install executorch`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .agreement import require_agreement
from .grid_sample import grid_sample_decompositions

try:
    from executorch.exir import to_edge_transform_and_lower
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dcn_plugin.export.executorch needs {error.name}, which is not installed: pip install executorch",
        name=error.name,
    ) from error

__all__ = ["export_executorch", "run_executorch"]


def export_executorch(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    partitioners: Sequence[Any] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write `model` to `path` as a program of ExecuTorch and return it, once its outputs agree.

    `deform_conv2d` becomes what `grid_sample_decompositions` says. With other steps of your own, decompose first:
    `program.run_decompositions({**torch.export.default_decompositions(), **grid_sample_decompositions()})`.

    Args:
        model: in the mode that it is to have, so mostly `model.eval()`.
        args: its arguments, for tracing and comparing.
        dynamic_shapes: as `torch.export.export` takes it, with a `max` for each; None: every size is fixed.
        partitioners: of the backends that take parts of the program; None: XNNPACK's, `()`: none.
        tolerance: difference allowed, in parts of the largest value of an output.

    Returns:
        `path`, which is written once the outputs agree on `args`.

    Raises:
        NotImplementedError: the model pools regions.
        ArithmeticError: outputs that differ.
        Exception: ExecuTorch's and torch's own errors for whatever they do not take.

    Example:
        >>> import tempfile, torch
        >>> from dcn_plugin import DCNv2
        >>> from dcn_plugin.export.executorch import export_executorch, run_executorch  # doctest: +SKIP
        >>> layer, x = DCNv2(4, 6, 3, padding=1).eval(), torch.randn(1, 4, 8, 8)
        >>> path = export_executorch(layer, (x,), tempfile.mkdtemp() + "/layer.pte")  # doctest: +SKIP
        >>> torch.allclose(run_executorch(path, (x,))[0], layer(x), atol=1e-4)  # doctest: +SKIP
        True
    """
    program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions({**torch.export.default_decompositions(), **grid_sample_decompositions()})
    if partitioners is None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        partitioners = [XnnpackPartitioner()]
    lowered = to_edge_transform_and_lower(program, partitioner=list(partitioners)).to_executorch()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        written.write_bytes(lowered.buffer)
        with torch.no_grad():
            require_agreement(run_executorch(written, args), model(*args), tolerance)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
    return path


def run_executorch(path: str | Path, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what ExecuTorch makes of a file and its arguments, for comparison with the original.

    Args:
        path: of the `.pte` file.
        args: tensors, in any containers; the program's inputs in their order.

    Returns:
        The outputs, one after the other.

    Raises:
        RuntimeError: ExecuTorch does not load the file, or does not run it on `args`.

    Example:
        >>> from dcn_plugin.export.executorch import run_executorch  # doctest: +SKIP
        >>> outputs = run_executorch("layer.pte", (torch.randn(1, 4, 8, 8),))  # doctest: +SKIP
    """
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(Path(path)).load_method("forward")
    return [value.clone() for value in tree_leaves(method.execute(tree_leaves(args)))]
