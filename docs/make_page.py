"""Write the page of the digits: `python docs/make_page.py page.html`.

A small network of three deformable layers learns the warped digits, in seconds and from a seed, and the page shows
where it samples one of them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from dcn_plugin.finetune import Digits
from dcn_plugin.layers import DCNv2
from dcn_plugin.visualize import explore

STEPS, BATCH, SHOWN = 200, 32, 6


def network(width: int = 16) -> nn.Sequential:
    def block(layer: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())

    return nn.Sequential(
        block(nn.Conv2d(1, width, 5, stride=2, padding=2)),
        *(block(DCNv2(width, width, 3, padding=1)) for _ in range(3)),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10),
    )  # fmt: skip


def images_of(split: str) -> tuple[Tensor, Tensor]:
    digits = Digits(split, warp=True, size=32, digit_size=22)
    images = torch.stack([digits.draw(index) for index in range(len(digits))])
    return images / 127.5 - 1, torch.tensor(digits.targets)


def train() -> nn.Sequential:
    """Return the network, trained; the same on every machine up to rounding."""
    torch.manual_seed(0)
    model, (images, labels) = network(), images_of("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def write(path: str) -> float:
    """Train, write the page, and return the share of the test split that is read right."""
    model, (images, labels) = train(), images_of("test")
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    explore(model, images[SHOWN], path, title="Three deformable layers on a warped digit")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="file to write")
    args = parser.parse_args()
    print(f"{args.path}: {write(args.path):.1%} of the warped digits read right")


if __name__ == "__main__":
    main()
