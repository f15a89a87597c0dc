"""Write a model as a checked file of a graph: `python scripts/export.py MODEL --out model.onnx`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import dcn_plugin  # noqa: F401  (registers the models with timm)
from dcn_plugin.export.agreement import largest_difference

FORMATS = ("onnx", "exported_program", "ncnn", "executorch")
ONE_IMAGE = ("ncnn", "executorch")  # a call takes one, unless --batch says otherwise


def load(name: str, pretrained: bool) -> nn.Module:
    """A folder that fine-tuning wrote, or a timm model."""
    if not Path(name).is_dir():
        return timm.create_model(name, pretrained=pretrained).eval()
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    from dcn_plugin.export import load_exported

    model = load_exported(name)
    if isinstance(model, GeneralizedRCNN):
        raise ValueError(f"model: expected a classifier or a backbone, got a detector in {name}")
    return model


def image_shape(model: nn.Module, size: list[int] | None) -> tuple[int, int, int]:
    """Channels, height and width: of the first convolution; as asked for, or as the model was trained."""
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if channels is None:
        raise ValueError(
            "model: expected one that begins with a convolution of images, got one without any convolution"
        )
    if size is None:
        size = list(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])
    return channels, size[0], size[-1]


def write(model: nn.Module, path: Path, image: Tensor, dynamic: bool, args: argparse.Namespace) -> Callable:
    """Write the file, and return what runs it."""
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    if args.format == "exported_program":
        torch.export.save(torch.export.export(model, (image,), dynamic_shapes=sizes), path)
        return torch.export.load(path).module()
    if args.format == "ncnn":
        from dcn_plugin.export.ncnn import export_ncnn, run_ncnn

        export_ncnn(model, (image,), path, tolerance=args.tolerance)
        return lambda image: run_ncnn(path, (image,))
    if args.format == "executorch":
        from dcn_plugin.export.executorch import export_executorch, run_executorch

        export_executorch(model, (image,), path, tolerance=args.tolerance)
        return lambda image: run_executorch(path, (image,))
    from dcn_plugin.export.onnx import export_onnx, run_onnx

    export_onnx(model, (image,), path, dynamic_shapes=sizes, opset_version=args.opset)
    return lambda image: run_onnx(path, (image,))


def write_checked(args: argparse.Namespace) -> float:
    """Write to a folder beside the target and move from there once the outputs agree; return how well they do."""
    if args.format == "ncnn" and args.out.suffix != ".param":
        raise ValueError(f"--out: expected a name that ends in .param with --format ncnn, got {args.out.name}")
    if args.format == "ncnn" and args.batch not in (None, 1):
        raise ValueError(f"--batch: expected 1 with --format ncnn, got {args.batch!r}")
    if args.image_size is not None and (len(args.image_size) > 2 or min(args.image_size) < 1):
        raise ValueError(f"--image-size: expected one or two positive numbers, got {args.image_size}")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance: expected a positive number, got {args.tolerance}")
    if args.batch is None:
        args.batch = 1 if args.format in ONE_IMAGE else "dynamic"
    if args.format in ONE_IMAGE and args.batch == "dynamic":
        raise ValueError(f"--batch: expected a number with --format {args.format}, got 'dynamic'")
    model = load(args.model, args.pretrained)
    shape = image_shape(model, args.image_size)
    dynamic = args.batch == "dynamic"
    # Not traced with one image: a size of 1 may be taken to be 1 for ever. So one image is what is looked at.
    traced, others = (2, (1, 3)) if dynamic else (args.batch, (args.batch,))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as folder:
        run = write(model, Path(folder, args.out.name), torch.randn(traced, *shape), dynamic, args)
        images = [torch.randn(n, *shape) for n in others]
        worst = largest_difference([run(image) for image in images], [model(image) for image in images])
        # Neither is a difference that is not a number an agreement.
        if not worst <= args.tolerance:
            raise ArithmeticError(f"outputs differ by {worst:.2g} of the largest, more than {args.tolerance:g}")
        # ONNX keeps weights of more than 2 GB in a file of their own; the model comes last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == args.out.name):
            os.replace(file, args.out.parent / file.name)
    return worst


def batch_size(text: str) -> int | str:
    if text == "dynamic":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 'dynamic' or a number from 1 on, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a timm name such as resnet50_dcn, or a folder that fine-tuning exported")
    parser.add_argument("--out", type=Path, required=True, help="file to write; replaced only by one that agrees")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument(
        "--image-size", nargs="+", type=int, help="height and width, or both in one (default: as trained)"
    )
    parser.add_argument("--batch", type=batch_size, help="'dynamic' (default) or a number (1 for ncnn and executorch)")
    parser.add_argument(
        "--opset", type=int, default=19, help="of ONNX: 19 (default) or more, 16 without convolutions of ours"
    )
    parser.add_argument("--pretrained", action="store_true", help="published weights for a timm name")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="difference allowed, in parts of the largest output"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        worst = write_checked(args)
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines() or ["no reason given"]  # torch's exporter says much after its first line
        sys.exit(f"nothing written: {type(error).__name__}: {said[0]}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, within {worst:.1e} of the largest output")


if __name__ == "__main__":
    main()
