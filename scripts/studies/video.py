"""What alignment buys a small recurrent network that takes the noise out of video, at the same budget.

The network goes through the frames in order and keeps a state. Where it meets the next frame, the states of the two
frames before are taken as they are, along optical flow, or by `SecondOrderDeformableAlignment` around that flow. All
else is the same: clips, flows, optimizer, schedule and number of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio

from dcn_plugin._config import check_keys
from dcn_plugin.finetune.run import quiet
from dcn_plugin.layers import SecondOrderDeformableAlignment
from dcn_plugin.ops import deform_conv2d

from .moving_digits import DIGIT, Clip, MovingDigits
from .stages import check_seeds, over_seeds, run_once, save_figures, seconds, write_results, write_table

# Arm -> what happens to the states of the two frames before.
ARMS = {"none": "as they are", "flow": "along the flow", "deformable": "deformable, around the flow"}
#: What `--cfg-options` may change: (value, least).
DEFAULTS: dict[str, tuple[float, float]] = {
    "frames": (6, 2), "size": (40, DIGIT), "digits": (2, 0), "speed": (3.0, 0), "noise": (0.25, 0),
    "flow_error": (1.0, 0), "train_clips": (480, 1), "test_clips": (48, 1), "channels": (16, 1),
    "offset_groups": (4, 2), "reach": (5.0, 0.1), "batch_size": (4, 1), "epochs": (2, 1), "lr": (2e-3, 1e-9),
}  # fmt: skip


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Return `[N, C, H, W]`, x where `flow` `[N, 2, H, W]`, (x, y) in pixels, points: one tap for each channel."""
    return deform_conv2d(x, flow.flip(1), x.new_ones(x.shape[1], 1, 1, 1))


class Aligned(nn.Module):
    """The states of the two frames before, where the frame in hand has them; `arm` is one of `ARMS`."""

    def __init__(self, arm: str, channels: int, offset_groups: int, reach: float) -> None:
        super().__init__()
        self.along = arm != "none"
        self.merge: nn.Module = nn.Conv2d(2 * channels, channels, 3, padding=1)
        if arm == "deformable":
            self.merge = SecondOrderDeformableAlignment(
                2 * channels, channels, 3, padding=1, offset_groups=offset_groups, max_residue_magnitude=reach
            )

    def forward(self, first: Tensor, second: Tensor, now: Tensor, flow_1: Tensor, flow_2: Tensor) -> Tensor:
        states = torch.cat((first, second), 1)
        if not self.along:
            return self.merge(states)
        there = warp(first, flow_1), warp(second, flow_2)
        if isinstance(self.merge, SecondOrderDeformableAlignment):
            return self.merge(states, torch.cat((there[0], now, there[1]), 1), flow_1, flow_2)
        return self.merge(torch.cat(there, 1))


class Restorer(nn.Module):
    """A recurrent network: features of each frame, the aligned state, what both say, and the frame without noise."""

    def __init__(self, arm: str, channels: int = 16, offset_groups: int = 4, reach: float = 5.0) -> None:
        super().__init__()

        def two(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, channels, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(channels, outputs, 3, padding=1)
            )

        self.features, self.body, self.last = two(1, channels), two(2 * channels, channels), two(channels, 1)
        self.align = Aligned(arm, channels, offset_groups, reach)

    def forward(self, frames: Tensor, flows: Tensor) -> Tensor:
        """Return `[N, T, 1, H, W]`, restored, of frames of that size and flows `[N, T - 1, 2, H, W]`, (x, y)."""
        features = self.features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        first = second = torch.zeros_like(features[:, 0])
        restored, flow = [], torch.zeros_like(flows[:, 0])
        for time, now in enumerate(features.unbind(1)):
            state = torch.zeros_like(first)
            if time:
                before, flow = flow, flows[:, time - 1]
                # A frame further back: from where the flow points to, along the flow that began there.
                further = flow + warp(before, flow) if time > 1 else torch.zeros_like(flow)
                state = self.align(first, second, now, flow, further)
            state = state + self.body(torch.cat((now, state), 1))
            first, second = state, first
            restored.append(frames[:, time] + self.last(state))
        return torch.stack(restored, 1)


class Restoration(pl.LightningModule):
    """Training and test of a `Restorer`: Charbonnier loss, Adam with a cosine, PSNR."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def training_step(self, clip: Clip, index: int) -> Tensor:
        loss = ((self.network(clip.noisy, clip.flows) - clip.clean).square() + 1e-6).sqrt().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, clip: Clip, index: int) -> None:
        self.psnr.update(self.network(clip.noisy, clip.flows).clamp(0, 1), clip.clean)
        self.log("psnr", self.psnr)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [dict(scheduler=schedule, interval="step")]


def run_study(
    work_dir: str | Path,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = tuple(ARMS),
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the study and write `results.json`, `results.md` and a picture to `work_dir`.

    An arm that finished before with the same options is reused; one that was interrupted goes on after its last
    complete epoch.

    Args:
        work_dir: one folder per seed and arm is made below it.
        seeds: seeds of initial weights and clips.
        arms: which of `ARMS` to run.
        options: values in place of those in `DEFAULTS`.
        progress: show a progress bar.

    Returns:
        `dict(rows=..., table=..., files=...)`: numbers per arm, the Markdown table, and the paths of what was written.

    Raises:
        ValueError, TypeError: no seeds or no arms, one of them twice, an unknown arm or option, or a value too small.
    """
    seeds, arms, work_dir = check_seeds(seeds), list(arms), Path(work_dir)
    if not arms or not set(arms) <= set(ARMS) or len(set(arms)) < len(arms):
        raise ValueError(f"arms: expected some of {', '.join(ARMS)}, each once, got {arms}")
    values = check_options(options or {})
    outcomes: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for arm in arms:
        _network(arm, values)  # values that do not go together are told before the first hour of training
    with quiet():
        for seed in seeds:
            for arm in arms:
                outcomes[arm].append(_run_arm(work_dir / f"seed{seed}" / arm, arm, seed, values, progress))
    rows = [_summary(arm, outcomes[arm]) for arm in arms]
    table = _table(rows, values)
    written = write_results(work_dir, seeds, rows, table)
    networks = {arm: load_network(found[0]["export"]) for arm, found in outcomes.items()}
    pictures = save_figures(work_dir / "pictures", dict(restored=_picture(networks, _clips("test", seeds[0], values))))
    return dict(rows=rows, table=table, files=dict(results=written, **pictures))


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `DEFAULTS` with these values in place of its own, if they are of its kinds and large enough."""
    check_keys("options", options, DEFAULTS)
    values: dict[str, Any] = {}
    for name, (usual, least) in DEFAULTS.items():
        value = values[name] = options.get(name, usual)
        kinds = (int,) if isinstance(usual, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name}: expected {'an integer' if kinds == (int,) else 'a number'}, got {value!r}")
        if not least <= value < float("inf"):
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    return values


def _clips(split: str, seed: int, values: Mapping[str, Any]) -> MovingDigits:
    how = {name: values[name] for name in ("frames", "size", "digits", "speed", "noise", "flow_error")}
    return MovingDigits(split, values[f"{split}_clips"], seed=seed, **how)


def _network(arm: str, values: Mapping[str, Any]) -> Restorer:
    return Restorer(arm, values["channels"], values["offset_groups"], values["reach"])


def load_network(path: str | Path) -> Restorer:
    """Return the network of one arm with its trained weights, from the file that the study wrote."""
    saved = torch.load(path, weights_only=True)
    network = _network(saved["arm"], saved["options"])
    network.load_state_dict(saved["state_dict"])
    return network.eval()


def _run_arm(folder: Path, arm: str, seed: int, values: Mapping[str, Any], progress: bool) -> dict[str, Any]:
    key = hashlib.sha256(json.dumps([arm, seed, values], sort_keys=True).encode()).hexdigest()
    file = folder / "network.pt"

    def train(resume: Path | None) -> dict[str, Any]:
        pl.seed_everything(seed, verbose=False)
        module = Restoration(_network(arm, values), values["lr"])
        # Clips come in an order of their own: shuffled, a resumed run would see another one.
        batches = DataLoader(_clips("train", seed, values), values["batch_size"])
        trainer = pl.Trainer(
            max_epochs=values["epochs"], accelerator="auto", devices=1, logger=False, enable_model_summary=False,
            enable_progress_bar=progress, default_root_dir=folder, log_every_n_steps=1,
            callbacks=[ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        )  # fmt: skip
        trainer.fit(module, batches, ckpt_path=resume, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        (found,) = trainer.test(module, DataLoader(_clips("test", seed, values), values["batch_size"]), verbose=False)
        network = module.network.cpu()
        torch.save(dict(arm=arm, options=dict(values), state_dict=network.state_dict()), file)
        return dict(psnr=found["psnr"], parameters=sum(p.numel() for p in network.parameters()), export=str(file))

    return run_once(folder, key, ARMS[arm], train)


def _summary(arm: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = dict(arm=arm, states=ARMS[arm], **over_seeds(outcomes, ["psnr"]))
    return row | dict(parameters=outcomes[0]["parameters"])


def _table(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    lines = []
    for row in rows:
        psnr = row["psnr"]
        spread = "" if psnr["spread"] is None else f" ± {psnr['spread']:.2f}"
        lines.append([row["states"], f"{psnr['mean']:.2f}{spread}", f"{row['parameters'] / 1e3:.1f} k", seconds(row)])
    return write_table(["states of the frames before", "test PSNR dB", "parameters", "training s (CPU s)"], lines)


def _picture(networks: Mapping[str, Restorer], clips: MovingDigits, count: int = 3) -> Any:
    """Draw the last frames of clips: as seen, restored by each arm, as they were; and where taps lie, one before."""
    from matplotlib.figure import Figure

    chosen = [clips[index] for index in range(min(count, len(clips)))]
    batch = Clip(*(torch.stack(part) for part in zip(*chosen, strict=True)))
    columns = {"noisy": batch.noisy[:, -1, 0]}
    seen: list[Any] = []
    with torch.no_grad():
        for arm, network in networks.items():
            layer = network.align.merge
            if isinstance(layer, SecondOrderDeformableAlignment):
                with layer.register_sampling_hook(lambda layer, samples: seen.append(samples.offset)):
                    columns[arm] = network(batch.noisy, batch.flows)[:, -1, 0]
                taps = layer.window.taps()
            else:
                columns[arm] = network(batch.noisy, batch.flows)[:, -1, 0]
    columns["clean"] = batch.clean[:, -1, 0]
    if seen:
        columns["samples, a frame before"] = batch.clean[:, -2, 0]
    figure = Figure(figsize=(2 * len(columns), 2 * len(chosen)), layout="tight")
    grid = figure.subplots(len(chosen), len(columns), squeeze=False)
    size = batch.clean.shape[-1]
    for row, places in enumerate(grid):
        for axes, (name, images) in zip(places, columns.items(), strict=True):
            axes.imshow(images[row].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(name if row == 0 else "", fontsize=8)
            axes.set_axis_off()
        if seen:
            for y in range(size // 8, size, size // 4):
                for x in range(size // 8, size, size // 4):
                    # Of the first group of channels, which reads the nearer frame.
                    points = (torch.tensor([y, x]) + taps + seen[-1][row, :18, y, x].reshape(9, 2)).cpu().numpy()
                    places[-1].scatter(points[:, 1], points[:, 0], s=1.5, c="#ff2d2d", linewidths=0)
                    places[-1].plot(x, y, marker="+", color="#19ff4b", markersize=4)
    return figure
