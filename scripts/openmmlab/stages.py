"""What a configuration has to do, stage by stage: build, train, test, run an epoch, load weights."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from . import configurations, data

STAGES = ("builds", "trains a step", "tests a step", "Runner's epoch", "weights load")
QUICK = STAGES[:3]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns (MMEngine's data elements too)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "all_values"):
        yield from tensors(value.all_values())


def finite(what: str, values: Iterator[Tensor]) -> int:
    """Raise if a number is not finite or there is none; return how many tensors there were."""
    found = list(values)
    if not found:
        raise AssertionError(f"{what}: no tensors")
    for value in found:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AssertionError(f"{what}: not finite")
    return len(found)


def deformable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that are deformable by what they are called: mmcv's, ours, or a model's own on mmcv's functions."""
    words = ("DeformConv", "DCN", "DeformRoIPool", "MultiScaleDeformable")
    return {name: m for name, m in model.named_modules() if any(word in type(m).__name__ for word in words)}


class Run:
    """One configuration, in the current folder, whose stages are called in order."""

    def __init__(self, package: str, name: str, change: Callable[[Any], None] = lambda config: None) -> None:
        from mmengine.registry import init_default_scope

        self.written = ""
        self.config = configurations.read(package, name, os.path.abspath("work_dirs"))
        change(self.config)
        init_default_scope(self.config.default_scope)
        for part in ("models", "datasets"):
            import_module(f"{package}.{part}")
        self.data_sets = data.generate(self.config, import_module(f"{package}.registry").DATASETS)

    def runner(self, **changes: Any) -> Any:
        from mmengine.runner import Runner

        name = f"run_{time.monotonic_ns()}"
        self.config.update(changes, experiment_name=name)
        if self.config.get("visualizer"):  # there is one of a name in a process, which keeps its first folder
            self.config.visualizer.name = name
        return Runner.from_cfg(self.config)

    def build(self) -> str:
        torch.manual_seed(0)
        self.first = self.runner()
        self.model = self.first.model
        self.model.init_weights()
        for counter in ("iter", "epoch"):  # what a Runner's loop says; losses and augmentations ask
            self.first.message_hub.update_info(counter, 0)
        return f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M"

    def batch(self) -> dict:
        """A batch of the training data."""
        return next(iter(self.first.build_dataloader(self.config.train_dataloader)))

    def loss(self, batch: dict) -> Tensor:
        """The sum of the losses of a batch, which are finite."""
        prepared = self.model.data_preprocessor(batch, True)
        loss, log = self.model.parse_losses(self.model._run_forward(prepared, mode="loss"))
        finite("losses", iter([loss, *tensors(log)]))
        if not loss.requires_grad:
            raise AssertionError("the loss depends on no parameter")
        return loss

    def train_step(self) -> str:
        """One step of the optimizer; losses, the gradients that there are and the new parameters are finite."""
        self.model.train()
        optim_wrapper = self.first.build_optim_wrapper(self.config.optim_wrapper)
        batch = self.batch()
        with optim_wrapper.optim_context(self.model):
            loss = self.loss(batch)
        optim_wrapper.backward(loss)
        finite("gradients", (p.grad for p in self.model.parameters() if p.grad is not None))
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        finite("parameters after a step", iter(self.model.parameters()))
        return f"loss {loss.item():.3g}"

    @torch.no_grad()
    def test_step(self) -> str:
        self.model.eval()
        batch = next(iter(self.first.build_dataloader(self.config.val_dataloader)))
        self.results = self.model.test_step(batch)
        finite("results", tensors(self.results))
        return "ok"

    def epoch(self) -> str:
        """Train an epoch and validate, and find the checkpoint that the Runner wrote."""
        with contextlib.suppress(AttributeError):
            del self.first, self.model
        runner = self.runner()
        runner.train()
        finite("parameters after an epoch", iter(runner.model.parameters()))
        self.model = runner.model
        with open(os.path.join(runner.work_dir, "last_checkpoint")) as file:
            self.written = file.read().strip()
        return "1 step" if runner.iter == 1 else f"{runner.iter} steps"

    def load(self) -> str:
        """Load the Runner's own checkpoint, and one as they are published, into fresh models; all values are equal."""
        from mmengine.runner import load_checkpoint

        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        runner = self.runner(load_from=published(weights, self.config))
        zero(runner.model)
        runner.call_hook("before_run")  # the copy of averaged weights is made there, and loaded too
        runner.load_or_resume()
        same(runner.model, weights)
        if self.written:
            zero(runner.model)
            load_checkpoint(runner.model, self.written, map_location="cpu", strict=True)
            same(runner.model, weights)
        return "ok"


@torch.no_grad()
def zero(model: nn.Module) -> None:
    """Make it plain which values are loaded."""
    for value in model.state_dict().values():
        value.zero_()


def same(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise if a model holds other values than these."""
    for name, value in model.state_dict().items():
        if not torch.equal(value, weights[name]):
            raise AssertionError(f"{name}: other values after loading")


def published(weights: dict[str, Tensor], config: Any) -> str:
    """Write a file of the layout of the published ones: weights, and a record with objects of MMEngine and numpy."""
    from collections import OrderedDict

    import mmengine
    import numpy as np
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer(np.array([0.9, 0.8]), np.array([1, 1]))
    meta = dict(
        cfg=config.pretty_text, dataset_meta=dict(CLASSES=("cat", "dog"), PALETTE=[(1, 2, 3)]), epoch=np.int64(1),
        experiment_name="published", mmengine_version=mmengine.__version__, seed=0, time="20221201_000000",
        hook_msgs=dict(best_score=np.float64(0.4)),
    )  # fmt: skip
    hub = dict(log_scalars={"train/loss": history}, runtime_info=OrderedDict(epoch=1), resumed_keys={})
    torch.save(dict(meta=meta, state_dict=OrderedDict(weights), message_hub=hub), "published.pth")
    return os.path.abspath("published.pth")


def run(
    package: str, name: str, stages: tuple[str, ...] = STAGES, change: Callable[[Any], None] = lambda config: None
) -> dict[str, Any]:
    """Run the stages in an empty folder, and return what each said, or its error; one that fails ends the run."""
    cells: dict[str, Any] = dict(name=f"{package}/{name}", cells={}, error="", operators="", seconds=0.0)
    before, start = os.getcwd(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        os.chdir(folder)
        stage = STAGES[0]
        try:
            run = Run(package, name, change)
            calls = dict(zip(STAGES, (run.build, run.train_step, run.test_step, run.epoch, run.load), strict=True))
            for stage in stages:
                cells["cells"][stage] = calls[stage]()
                if stage == STAGES[0]:
                    cells["layers"] = len(deformable(run.model))
        except (Exception, SystemExit) as error:
            cells["cells"][stage] = "fails"
            cells["error"] = f"{type(error).__name__}: {error}"
            cells["traceback"] = traceback.format_exc()
        finally:
            os.chdir(before)
    from dcn_plugin.ops import kernels_used

    cells["operators"] = ", ".join(sorted(kernels_used()))
    cells["seconds"] = round(time.monotonic() - start, 1)
    return cells
