"""What all pictures stand on: a model held in eval mode, a figure of its own, an image under the drawing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def asking_for_matplotlib() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        message = "figures need matplotlib, which is not installed: pip install '.[visualize]' in a clone"
        raise ModuleNotFoundError(message, name=error.name) from error


def new_figure(columns: int, rows: int = 1, width: float = 3.2, height: float = 3.2) -> tuple[Figure, Any]:
    # A Figure of its own instead of pyplot's: no global state, no display, nothing to close.
    with asking_for_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def as_colours(image: Tensor, picture: Tensor | None) -> Any:
    """Return what is drawn under an image's points as an array [H, W, 3] from 0 to 1."""
    shown = (image if picture is None else picture).detach().float().cpu()
    if shown.dim() != 3 or shown.shape[-2:] != image.shape[-2:]:
        raise ValueError(f"picture: expected [C, {image.shape[-2]}, {image.shape[-1]}], got {list(shown.shape)}")
    low, high = shown.min(), shown.max()
    shown = ((shown - low) / (high - low).clamp(min=1e-8)).permute(1, 2, 0)
    if shown.shape[2] != 3:
        shown = shown.mean(dim=2, keepdim=True).expand(-1, -1, 3)
    return shown.numpy()


def show_image(axes: Any, image: Tensor, picture: Tensor | None) -> None:
    axes.imshow(as_colours(image, picture), interpolation="nearest")
    axes.set_axis_off()
