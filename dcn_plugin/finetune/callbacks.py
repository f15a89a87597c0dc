"""Lightning callbacks that know deformable layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ..layers import Samples, sampling_layers
from ..visualize import effective_dilation


class _Moments(NamedTuple):
    number: int
    mean: Tensor
    variance: Tensor


class _Call(NamedTuple):
    """What one call of a layer says about its offsets: tensors without dimensions, read when the step is over."""

    name: str
    lengths: _Moments
    largest: Tensor
    masks: _Moments | None
    dilation: _Moments | None
    limit: float
    words: str


def _moments(values: Tensor) -> _Moments:
    return _Moments(values.numel(), values.mean(), values.var(correction=0))


def _together(parts: Sequence[_Moments]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all the values that went into `parts`."""
    counts = torch.tensor([float(part.number) for part in parts])
    means = torch.stack([part.mean.cpu() for part in parts])
    variances = torch.stack([part.variance.cpu() for part in parts])
    share = counts / counts.sum()
    mean = (share * means).sum()
    return mean, (share * (variances + (means - mean).square())).sum()


def _longest_side(maps: Any) -> int:
    """Of a map, or of the largest one of several, by name or in a row."""
    if isinstance(maps, Tensor):
        return max(maps.shape[-2:])
    return max(map(_longest_side, maps.values() if isinstance(maps, Mapping) else maps))


class OffsetMonitor(pl.Callback):
    """Log what the offsets of every deformable layer do, and warn when they run away.

    Every `every_n_steps` training steps, per layer: `offset/<layer>/mean` and `/max` (length |offset|), and for masks
    `/mask_mean` and `/mask_std`. A convolution's lengths are in pixels of its input, and it has a `/dilation` too
    (effective dilation in pixels); attention's are in pixels of the level a point lies in. Those of RoI pooling are
    shifts of the bins, in sizes of their RoI; R-FCN has `<layer>.scores` and `<layer>.boxes`.

    `/max` is the largest over all calls of the layer in the step, the others are over all calls together: a layer may
    be shared over the levels of a pyramid, run several times, or be given its offsets from elsewhere (DeformConv2d). A
    step is what one optimizer step is made of, so with `accumulate_grad_batches` all its batches. What `forward`
    sampled with is read by a hook (`register_sampling_hook`): nothing is computed twice, and between samples it costs
    nothing. Values are those of each process; what its first process sees makes the warnings.

    Args:
        every_n_steps: steps between two samples.
        limit: offset length that counts as running away. For a convolution as a multiple of the longer side of its
            input (the largest of several maps): beyond 1 a point lies outside the image from wherever it starts. For
            RoI pooling in sizes of the RoI.
        max_pixels: the same for convolutions in pixels, whatever the size; None sets no such limit.

    Each layer warns once per cause: beyond the limit of the call in question, or not finite. A model without deformable
    layers logs nothing.
    """

    def __init__(self, every_n_steps: int = 50, limit: float = 1.0, max_pixels: float | None = None) -> None:
        for name, value in dict(every_n_steps=every_n_steps, limit=limit, max_pixels=max_pixels).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.every_n_steps, self.limit, self.max_pixels = every_n_steps, limit, max_pixels
        self._handles: list[Any] = []
        # One function for each layer, always the same: torch.compile keeps a graph with it and one without.
        self._hooks: dict[str, Any] = {}
        self._seen: list[_Call] = []  # of this batch
        self._calls: list[_Call] = []  # of the batches of this step before it
        self._started: int | None = None  # the optimizer steps before the one that is sampled
        self._open = False
        self._warned: set[tuple[str, str]] = set()

    def _hook(self, name: str) -> Any:
        def look(layer: Any, samples: Samples) -> None:
            layer_input: Any = samples.input
            offset = samples.offset
            if offset is None or offset.numel() == 0:
                return
            label = f"{name}.{samples.part}" if samples.part else name
            shape, dilation = offset.shape, None
            length = samples.scale * offset.float().reshape(shape[0], -1, 2, *shape[2:]).norm(dim=2)
            if layer.offset_unit == "pixels":
                limit = self.limit * _longest_side(layer_input)
                limit = limit if self.max_pixels is None else min(limit, self.max_pixels)
                words = "samples up to {:.1f} pixels away (limit {:.1f})"
                if (window := layer.window) is not None:
                    dilation = _moments(effective_dilation(samples.scale * offset, window.kernel_size, window.dilation))
            else:
                limit, words = self.limit, "shifts bins by up to {:.1f} RoI sizes (limit {:.1f})"
            masks = None if samples.mask is None else _moments(samples.mask.float())
            self._seen.append(_Call(label, _moments(length), length.max(), masks, dilation, limit, words))

        return look

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hooks, self._calls, self._started, self._open = {}, [], None, False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        every, step = self.every_n_steps, trainer.global_step
        if not self._open and (self._started is None or step // every > self._started // every):
            self._open, self._started = True, step
        if not self._open:
            return
        # Anew for each sample: the layers may have changed, and validation between two batches is none of ours.
        for name, layer in sampling_layers(pl_module).items():
            name = name.replace("_orig_mod.", "").removeprefix("model.")
            hook = self._hooks.setdefault(name, self._hook(name))
            self._handles.append(layer.register_sampling_hook(hook))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not self._open:
            return
        self._look_away()
        if trainer.global_step == self._started:
            return  # gradients accumulate: the step goes on in the next batch
        values, calls = self._close()
        pl_module.log_dict(values, batch_size=1)
        self._warn(calls, trainer.global_step)

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls += self._seen
        self._seen.clear()

    def _close(self) -> tuple[dict[str, Tensor], dict[str, list[_Call]]]:
        calls: dict[str, list[_Call]] = {}
        for call in self._calls:
            calls.setdefault(call.name, []).append(call)
        self._calls, self._open = [], False
        values = {}
        for name, own in calls.items():
            values[f"offset/{name}/mean"] = _together([call.lengths for call in own])[0]
            values[f"offset/{name}/max"] = torch.stack([call.largest.cpu() for call in own]).max()
            if masks := [call.masks for call in own if call.masks is not None]:
                mean, variance = _together(masks)
                values |= {f"offset/{name}/mask_mean": mean, f"offset/{name}/mask_std": variance.sqrt()}
            if dilations := [call.dilation for call in own if call.dilation is not None]:
                values[f"offset/{name}/dilation"] = _together(dilations)[0]
        return values, calls

    def _warn(self, calls: dict[str, list[_Call]], step: int) -> None:
        for name, own in calls.items():
            sizes = [(float(call.largest), call) for call in own]
            broken = [largest for largest, _ in sizes if not largest < float("inf")]
            # The limit of a convolution follows from its input's size, which differs from call to call.
            largest, call = max(sizes, key=lambda pair: pair[0] / pair[1].limit)
            if broken:
                cause, said = "not finite", f"has offsets that are not finite (largest: {broken[0]})"
            elif largest > call.limit:
                cause, said = "too far", call.words.format(largest, call.limit)
            else:
                continue
            if (name, cause) in self._warned:
                continue
            self._warned.add((name, cause))
            rank_zero_warn(
                f"OffsetMonitor: {name} {said} at step {step}: the offsets run away. Lower "
                "optimizer.offset_lr_mult (roi_offset_lr_mult for RoI pooling) or the learning rate, clip gradients, "
                "or bound them with offset_bound"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_away()
        self._warn(self._close()[1], trainer.global_step)  # a step that never came

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
