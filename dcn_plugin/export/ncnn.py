"""Export to ncnn: a `.param` and a `.bin` file, written by pnnx from torchvision's form of the model, and compared.

Needs the packages pnnx and ncnn: `pip install pnnx ncnn`.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .agreement import require_agreement
from .torchvision import to_torchvision

try:
    import ncnn
    import pnnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dcn_plugin.export.ncnn needs {error.name}, which is not installed: pip install pnnx ncnn", name=error.name
    ) from error

__all__ = ["export_ncnn", "run_ncnn"]

# ncnn's own on a processor with half-precision arithmetic, or once asked for; offsets do not survive them.
_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


def export_ncnn(
    model: nn.Module,
    args: tuple[Tensor, ...],
    path: str | Path,
    *,
    other_args: tuple[Tensor, ...] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write `model`, in eval mode, to `<path>.param` and `<path>.bin`, and return the first; both once they agree.

    ncnn's DeformableConv2D has one group and one offset group, so layers with several become sums of such (see
    `to_torchvision`). Weights are float32. ncnn has no batches: every argument and every output has a batch of 1, which
    the file is without. The files are moved to their place after ncnn's outputs, in float32, have agreed with the
    model's on `args`, on random numbers of their shapes, and on `other_args`.

    Args:
        model: any module whose arguments are tensors; it stays as it is.
        args: its arguments, float32 on the CPU, `[1, ...]`.
        path: without or with `.param`.
        other_args: arguments of other sizes, if heights and widths are to vary: pnnx compares the two.
        tolerance: difference allowed, in parts of the largest value of an output.

    Raises:
        ValueError: arguments of another batch size, type or place.
        NotImplementedError: the model pools regions, calls an operator of this package itself, or needs a layer that
            ncnn does not have; the message names it. RuntimeError: ncnn does not compute what pnnx wrote, as where
            the model's very arguments are cut into groups. ArithmeticError: outputs that differ.

    Example:
        >>> import tempfile, torch
        >>> from dcn_plugin import DCNv2
        >>> layer, x = DCNv2(4, 6, 3, padding=1, offset_groups=2).eval(), torch.randn(1, 4, 8, 8)
        >>> path = export_ncnn(layer, (x,), tempfile.mkdtemp() + "/layer")
        >>> path.name, torch.allclose(run_ncnn(path, (x,))[0], layer(x), atol=1e-4)
        ('layer.param', True)
    """
    # A copy, in the mode that is written; `model` keeps its own.
    original = copy.deepcopy(model).eval()
    converted = to_torchvision(original, one_group=True)
    _check_args("args", args)
    if other_args is not None:
        _check_args("other_args", other_args)
    path = Path(path)
    path = path if path.suffix == ".param" else path.with_name(f"{path.name}.param")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        param, weights = Path(folder, "model.ncnn.param"), Path(folder, "model.ncnn.bin")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch has deprecated what pnnx reads
            traced: Any = torch.jit.trace(converted, args)
        _refuse_ours(traced)
        traced.save(f"{folder}/model.pt")
        _convert(f"{folder}/model.pt", args, other_args)
        _refuse_unknown(param)
        other = [tuple(torch.randn_like(value) for value in args), *([] if other_args is None else [other_args])]
        for given in (args, *other):
            require_agreement(run_ncnn(param, given), original(*given), tolerance)
        os.replace(weights, path.with_suffix(".bin"))
        os.replace(param, path)
    return path


def run_ncnn(path: str | Path, args: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Return what ncnn makes of a model and its arguments on the CPU in float32, for comparison with the original.

    Args:
        path: of the `.param` file.
        args: tensors `[1, ...]`.
        options: of `ncnn.Option`, such as `num_threads=1`; half precision is off unless one of them says otherwise.

    Raises:
        ValueError: a file whose inputs and outputs have other names than pnnx gives them; another number of `args`.
        RuntimeError: ncnn does not load the files, or does not compute an output.

    Example:
        >>> import tempfile, torch
        >>> path = export_ncnn(torch.nn.Conv2d(3, 4, 1), (torch.randn(1, 3, 5, 5),), tempfile.mkdtemp() + "/layer")
        >>> run_ncnn(path, (torch.randn(1, 3, 5, 5),), num_threads=1)[0].shape
        torch.Size([1, 4, 5, 5])
    """
    with ncnn.Net() as net:
        for name, value in {**dict.fromkeys(_HALF, False), **options}.items():
            setattr(net.opt, name, value)
        files = (net.load_param, Path(path)), (net.load_model, Path(path).with_suffix(".bin"))
        for load, file in files:
            if load(str(file)):
                raise RuntimeError(f"path: expected a model that ncnn {ncnn.__version__} loads, got {file}")
        outputs = []
        with net.create_extractor() as extractor:
            inputs = _numbered("in", net.input_names())
            if len(inputs) != len(args):
                raise ValueError(f"args: expected {len(inputs)} of them for {path}, got {len(args)}")
            for name, value in zip(inputs, args, strict=True):
                # A copy: ncnn aligns the channels of what is its own.
                extractor.input(name, ncnn.Mat(value.squeeze(0).contiguous().numpy()).clone())
            for name in _numbered("out", net.output_names()):
                status, found = extractor.extract(name)
                if status:
                    raise RuntimeError(f"path: expected a model that ncnn computes, got {status} from {name} of {path}")
                outputs.append(torch.from_numpy(found.numpy().copy())[None])
        return outputs


def _numbered(start: str, names: list[str]) -> list[str]:
    """pnnx calls them in0, in1, ...; ncnn tells them in another order."""
    ordered = [f"{start}{i}" for i in range(len(names))]
    if set(ordered) != set(names):
        raise ValueError(f"path: expected a file of pnnx, with {', '.join(ordered)}, got one with {', '.join(names)}")
    return ordered


def _check_args(name: str, args: Any) -> None:
    fits = isinstance(args, tuple) and all(
        isinstance(value, Tensor)
        and value.dim() > 1
        and value.shape[0] == 1
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        for value in args
    )
    if not fits:
        got = [f"{list(v.shape)} {v.dtype} {v.device}" if isinstance(v, Tensor) else repr(v) for v in tree_leaves(args)]
        raise ValueError(f"{name}: expected a tuple of float32 tensors [1, ...] on the CPU, got {', '.join(got)}")


def _refuse_ours(traced: Any) -> None:
    for node in traced.inlined_graph.nodes():
        if node.kind().startswith("dcn_plugin::"):
            instead = ": call it by torchvision.ops.DeformConv2d, or in a layer"
            raise NotImplementedError(
                f"model: expected operators of this package in its layers alone, got a call of {node.kind()}, "
                f"which pnnx does not know{instead if node.kind() == 'dcn_plugin::deform_conv2d' else ''}"
            )


def _convert(file: str, args: tuple[Tensor, ...], other_args: tuple[Tensor, ...] | None) -> None:
    """Run pnnx itself: its Python function also imports a program that it has written, even one with mistakes."""
    command = [pnnx.EXEC_PATH, file, "fp16=0"]
    for option, values in (("inputshape", args), ("inputshape2", other_args or ())):
        if values:
            shapes = (",".join(map(str, value.shape)) for value in values)
            command.append(f"{option}=" + ",".join(f"[{shape}]f32" for shape in shapes))
    # It tells every pass that it makes; what it could not do stands in the file.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _refuse_unknown(param: Path) -> None:
    if not param.is_file():
        raise NotImplementedError("model: expected one that pnnx converts, got no file from it")
    kinds = [line.split()[0] for line in param.read_text().splitlines()[2:] if line.strip()]
    for kind in kinds:
        # ncnn's layers are plain names; pnnx leaves what it could not translate as torch calls it.
        if not re.fullmatch(r"\w+", kind):
            raise NotImplementedError(f"model: expected layers that ncnn has, got {kind}, which pnnx left as it is")
