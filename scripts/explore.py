"""Write a page that shows where a model's layers sample an image: `python scripts/explore.py MODEL IMAGE`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.transforms.v2 import functional as F

from dcn_plugin.checkpoint import load_checkpoint
from dcn_plugin.export import load_exported
from dcn_plugin.finetune.classification.preprocessing import image_mode, resolve
from dcn_plugin.finetune.command_line import errors_in_one_line
from dcn_plugin.finetune.images import read_image
from dcn_plugin.models.build import build_model
from dcn_plugin.segmentation import Segmenter
from dcn_plugin.visualize import explore


def load(args: argparse.Namespace) -> nn.Module:
    """A folder that fine-tuning wrote, or a timm model, with the weights that are asked for."""
    if Path(args.model).is_dir():
        if args.pretrained:
            raise ValueError("--pretrained: expected a timm name, got a folder, which has its own weights")
        model = load_exported(args.model)
    else:
        model = build_model(dict(name=args.model, pretrained=args.pretrained))
    if args.checkpoint is not None:
        heads = heads_of(model)
        # What the classes are does not matter here, and every layer that is shown comes before.
        load_checkpoint(model, args.checkpoint, allow_missing=heads, allow_unexpected=heads, allow_mismatched=heads)
    return model


def heads_of(model: nn.Module) -> list[str]:
    """Return globs of the weights that depend on the number of classes."""
    if isinstance(model, Segmenter):
        return ["classifier.*", "aux_classifier.*"]
    if isinstance(model, GeneralizedRCNN):
        return ["roi_heads.*"]
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [f"{name}.*" for name in ([named] if isinstance(named, str) else named)]


def prepare(model: nn.Module, path: Path, size: list[int] | None) -> tuple[nn.Module, Tensor, Tensor]:
    """Return what is to run, the image as it takes it, and the same image before normalisation."""
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(f"--image-size: expected one or two positive numbers, got {size}")
    if isinstance(model, GeneralizedRCNN):  # its heads take what the backbone has made of the image
        if size is not None:
            raise ValueError("--image-size: expected none for a detector, which scales images itself, got one")
        pixels = F.to_image(read_image(path, image_mode((len(model.transform.image_mean), 1, 1))))
        images, _ = model.transform([F.to_dtype(pixels, torch.float32, scale=True)])
        mean, std = (torch.tensor(values) for values in (model.transform.image_mean, model.transform.image_std))
        return model.backbone, images.tensors[0], images.tensors[0] * std[:, None, None] + mean[:, None, None]
    if isinstance(model, Segmenter):  # it normalises images itself, and takes them in any size
        pixels = F.to_image(read_image(path, image_mode((model.in_chans, 1, 1))))
        pixels = pixels if size is None else F.resize(pixels, [size[0], size[-1]], antialias=True)
        image = F.to_dtype(pixels, torch.float32, scale=True)
        return model, image, image
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    trained = size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    config = resolve(dict(input_size=(channels, trained[0], trained[-1])), model)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    image = create_transform(**{key: config[key] for key in keys})(read_image(path, image_mode(config["input_size"])))
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return model, image, image * std + mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a timm name such as resnet50_dcn, or a folder that fine-tuning exported")
    parser.add_argument(
        "image",
        type=Path,
        help="an image file; it is scaled and cropped as for the model's evaluation (none of it for a segmenter)",
    )
    parser.add_argument("--out", type=Path, default=Path("page.html"), help="file to write (default: page.html)")
    parser.add_argument(
        "--layers", nargs="+", help="names of layers, or one number: how many of the last (default: all)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="weights to load into the model, in any layout that is known and for any number of classes",
    )
    parser.add_argument("--pretrained", action="store_true", help="published weights for a timm name")
    parser.add_argument(
        "--image-size", nargs="+", type=int, help="height and width, or both in one (default: as trained)"
    )
    parser.add_argument("--title", help="heading of the page (default: the names of model and image)")
    parser.add_argument("--limit-mb", type=float, default=32.0, help="largest page that is written (default: 32)")
    args = parser.parse_args()
    layers = args.layers
    if layers is not None and len(layers) == 1 and layers[0].lstrip("-").isdecimal():
        layers = int(layers[0])
    torch.manual_seed(0)
    with errors_in_one_line(also=Path(__file__).parent):
        model, image, picture = prepare(load(args), args.image, args.image_size)
        title = f"{Path(args.model).name} on {args.image.name}" if args.title is None else args.title
        explore(model, image, args.out, layers, picture, title=title, limit_mb=args.limit_mb)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()
