"""From an MMEngine config to a Lightning run; `scripts/finetune.py` is its command line."""

from __future__ import annotations

import errno
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import pytorch_lightning.callbacks
import pytorch_lightning.loggers
import pytorch_lightning.strategies
from mmengine.config import Config

from .._config import arguments, build_object, check_keys, check_kinds, plain, unknown
from ..checkpoint import match_wrappers, read_file
from . import classification, detection, segmentation
from .callbacks import OffsetMonitor
from .command_line import at
from .data import TunedData
from .freezing import BackboneFinetuning
from .guard import require_batches
from .module import TunedModule
from .task import Task
from .writer import EpochWriter

#: What a config's `module` may name.
TASKS: dict[str, Task] = {
    "FinetuneModule": classification.TASK,
    "DetectionModule": detection.TASK,
    "SegmentationModule": segmentation.TASK,
}
# What `run` may be asked to do.
ACTIONS = ("fit", "validate", "test", "predict")
_OURS = {cls.__name__: cls for cls in (BackboneFinetuning, OffsetMonitor)}


def _classes(module: Any, base: type) -> dict[str, type]:
    return {name: value for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}


# Without those that do nothing until they are subclassed.
_BASES = ("Callback", "Checkpoint", "ProgressBar", "BaseFinetuning", "BasePredictionWriter")
CALLBACKS = {k: v for k, v in _classes(pytorch_lightning.callbacks, pl.Callback).items() if k not in _BASES} | _OURS
LOGGERS = _classes(pytorch_lightning.loggers, pytorch_lightning.loggers.Logger)
STRATEGIES = _classes(pytorch_lightning.strategies, pytorch_lightning.strategies.Strategy)
RUN_KEYS = ("module", "data", "trainer", "callbacks", "logger", "seed")


def task_of(config: Mapping[str, Any]) -> Task:
    """Return what a config's `module` names; without one it is the first of `TASKS`."""
    name = config.get("module", next(iter(TASKS)))
    if name not in TASKS:
        raise ValueError(unknown("module", name, TASKS, "config"))
    return TASKS[name]


def known_callbacks() -> dict[str, Any]:
    """Return the callbacks that a config may name: Lightning's, this package's, and the writer of every task."""
    return CALLBACKS | {task.writer.__name__: task.writer for task in TASKS.values()}


def known_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the top-level keys that a config may have."""
    return [*arguments(task_of(config).module), *RUN_KEYS]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's remarks on hardware, loaders without workers and folders that are meant to be used again."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in (
                "does not have many workers",
                "LeafSpec",
                "exists and is not empty",
                "but not used",
                "__len__",
            ):
                warnings.filterwarnings("ignore", f".*{text}.*", module="pytorch_lightning.*")
            yield
    finally:
        logger.setLevel(level)


# What the system says of a file that is open, without its name.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def writing_to(work_dir: Path) -> Iterator[None]:
    """Find out before any work whether `work_dir` can be written to, and name it where writing fails later.

    Raises:
        OSError: with the path. Checkpoints are written beside the old ones and then moved, so those are whole.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=work_dir):
        pass
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        said = f"{error.strerror}; what was saved before is whole, and a checkpoint there can be continued from"
        raise OSError(error.errno, said, str(work_dir)) from error


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read an MMEngine config file (text style, with `_base_`), apply `options` and check its keys.

    Top-level keys are `module` (a name in `TASKS`: 'FinetuneModule', the default, 'DetectionModule' or
    'SegmentationModule'), the arguments of that module, `data` (arguments of the task's data module), `trainer`
    (arguments of Lightning's `Trainer`; `strategy` may be `dict(type=...)`), `callbacks` (name -> `dict(type=...)` of
    Lightning's or this package's callbacks, or None to drop one of a base config), `logger` (`dict(type=...)`, or
    False) and `seed`.

    Args:
        path: the config file.
        options: overrides such as `{'trainer.max_epochs': 3}`, as MMEngine's `--cfg-options` gives them.

    Raises:
        FileNotFoundError, ValueError: no such file; an unknown key, with its place and the known ones.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config: expected a file, got {str(path)!r}, which does not exist")
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # the file is a program of the user's
        raise ValueError(f"config: {path} does not load: {type(error).__name__}: {error}") from error
    if options:
        with at(f"options {dict(options)}"):
            config.merge_from_dict(dict(options))
    values = plain(config.to_dict())
    check_config(values)
    return values


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first key of a config, or of one of its sections, that nothing would read."""
    task = task_of(config)
    check_keys("config", config, known_keys(config))
    for key in ("model", "data"):
        if key not in config:
            raise ValueError(f"config: key {key!r} is missing; it has {', '.join(map(repr, config)) or 'none'}")
    check_keys("data", config["data"], arguments(task.data))
    check_keys("trainer", config.get("trainer", {}), arguments(pl.Trainer, "callbacks", "logger"))
    task.module.check_config(config)
    task.data.check_config(config["data"])
    check_kinds("trainer.", config.get("trainer", {}), pl.Trainer)
    callbacks = config.get("callbacks", {})
    if not isinstance(callbacks, Mapping):
        raise TypeError(f"callbacks: expected a dict, got {type(callbacks).__name__} {callbacks!r}")
    known = known_callbacks()
    for name, spec in callbacks.items():
        if spec is not None and (not isinstance(spec, Mapping) or spec.get("type") not in known):
            got = spec.get("type") if isinstance(spec, Mapping) else spec
            raise ValueError(unknown("type", got, known, f"callbacks.{name}"))


def build_callbacks(config: Mapping[str, Any], work_dir: Path) -> list[pl.Callback]:
    """Build the callbacks of a config; what writes files without saying where writes them to `work_dir`."""
    known, callbacks = known_callbacks(), []
    for name, spec in config.items():
        if spec is None:
            continue
        spec = dict(spec)
        if spec.get("type") in ("ModelCheckpoint", "OnExceptionCheckpoint"):
            spec.setdefault("dirpath", str(work_dir))
        if issubclass(known.get(str(spec.get("type")), object), EpochWriter):
            spec.setdefault("directory", str(work_dir))
        with at(f"callbacks.{name}"):
            callbacks.append(build_object(f"callbacks.{name}", spec, known))
    return callbacks


def build(config: Mapping[str, Any], work_dir: str | Path) -> tuple[pl.Trainer, TunedModule, TunedData]:
    """Build trainer, module and data of a checked config; its `seed` is set first.

    The number of classes, of a module that takes one, is the data's unless the config says otherwise.
    """
    work_dir = Path(work_dir)
    config = plain(config)
    check_config(config)
    if config.get("seed") is not None:
        with at("seed"):
            pl.seed_everything(config["seed"], workers=True, verbose=False)
    task = task_of(config)
    with at("data"):
        data = task.data(**config["data"])
    known = arguments(task.module)
    values = {key: config[key] for key in known if key in config}
    model = values["model"]
    said = "num_classes" in values or (isinstance(model, dict) and ("num_classes" in model or "type" in model))
    if "num_classes" in known and not said:
        with at("data"):
            values["num_classes"] = cast(Any, data).num_classes
    with at("config"):
        module = task.module(**values)

    options = dict(config.get("trainer", {}))
    if isinstance(options.get("strategy"), Mapping):
        with at("trainer.strategy"):
            options["strategy"] = build_object("trainer.strategy", options["strategy"], STRATEGIES)
    logger = config.get("logger", True)
    logger = dict(type="CSVLogger", name="logs") if logger is True else logger
    if logger:
        with at("logger"):
            given = dict(save_dir=str(work_dir)) | plain(logger) if isinstance(logger, Mapping) else logger
            logger = build_object("logger", given, LOGGERS)
    callbacks = build_callbacks(config.get("callbacks", {}), work_dir)
    with at("trainer"):
        trainer = pl.Trainer(**options, callbacks=callbacks, logger=logger, default_root_dir=str(work_dir))
    return trainer, module, data


def find_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest checkpoint to continue from in `work_dir`, or None."""
    found = [path for path in Path(work_dir).glob("last*.ckpt") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def run(
    config: Mapping[str, Any],
    work_dir: str | Path,
    task: str = "fit",
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Do what `task` says with a config and return its numbers and the paths of what it wrote.

    Args:
        config: a config as `load_config` returns it.
        work_dir: folder for checkpoints, logs and the exported model.
        task: 'fit' (then tests and exports the best checkpoint), 'validate', 'test' or 'predict'.
        checkpoint: Lightning checkpoint. 'fit' continues from it; the other tasks evaluate it. 'auto' is `last.ckpt` in
            `work_dir`, if there is one.

    Returns:
        Metrics by name, and under 'checkpoint', 'export', 'predictions' the paths written.

    Raises:
        ValueError, TypeError, FileNotFoundError: an unknown task or key, a checkpoint that is missing, damaged or
            another model's, a split without samples, a `fit` without a step of training (nothing is exported then).
        OSError: `work_dir` cannot be written to, or no longer.
    """
    if task not in ACTIONS:
        raise ValueError(f"task: expected one of {', '.join(ACTIONS)}, got {task!r}")
    with writing_to(Path(work_dir)):
        return _run(config, Path(work_dir), task, checkpoint)


def _run(config: Mapping[str, Any], work_dir: Path, task: str, checkpoint: str | Path | None) -> dict[str, Any]:
    if checkpoint == "auto":
        checkpoint = find_checkpoint(work_dir)
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint: expected a file, got {str(checkpoint)!r}, which does not exist")
        saved = read_file(checkpoint)  # says what is wrong with a file, which Lightning's own reader does not
        if not isinstance(saved, Mapping) or "state_dict" not in saved:
            has = ", ".join(map(repr, list(saved)[:4])) if isinstance(saved, Mapping) else type(saved).__name__
            raise ValueError(
                f"checkpoint: expected one of Lightning, with 'state_dict', got {str(checkpoint)!r} with {has}; "
                "other weights to start from are named by `checkpoint` in the config"
            )
        shapes = {name: tuple(value.shape) for name, value in saved["state_dict"].items()}
        del saved
        module_class = task_of(config).module
        keys = arguments(module_class)
        config = {**config, **module_class.without_initial_weights({k: v for k, v in config.items() if k in keys})}
    elif task != "fit" and not task_of(config).module.names_weights(config):
        raise ValueError(
            f"checkpoint: expected one for {task} (or model.pretrained or checkpoint in the config), got none"
        )
    trainer, module, data = build(config, work_dir)
    if module.conversion is not None and trainer.is_global_zero:
        print(module.conversion)
    if checkpoint is not None:
        _check_fits(module, shapes, checkpoint)
    if task != "fit":
        if checkpoint is not None:
            module.load_saved(read_file(checkpoint))
        if task in ("validate", "test"):
            return _evaluate(trainer, module, data, task)
        writer = task_of(config).writer
        if not any(isinstance(callback, writer) for callback in trainer.callbacks):
            trainer.callbacks.append(writer(work_dir))
        trainer.predict(module, data, return_predictions=False)
        _check_limit(trainer, "predict")
        require_batches(trainer, "predict", sum(trainer.num_predict_batches))
        return dict(predictions=str(work_dir / writer.filename))

    try:
        trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except ValueError as error:
        if not str(error).startswith("loaded state dict"):
            raise
        said = "the optimizer of the config (its groups, what is frozen, its callbacks) is not that of"
        raise ValueError(f"checkpoint: {said} {str(checkpoint)!r}: {error}") from error
    _require_training(trainer)
    results: dict[str, Any] = {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_")
    }
    saver = trainer.checkpoint_callback
    best = getattr(saver, "best_model_path", "") or getattr(saver, "last_model_path", "")
    if best:
        # From here on everything is said of the best checkpoint: its score, the test, the export.
        results["checkpoint"] = best
        if saver.monitor is not None and saver.best_model_score is not None:
            results = {"checkpoint": best, saver.monitor: float(saver.best_model_score)}
        # Lightning's trainer would, of weights that are averaged, put back those that training goes on with.
        module.load_saved(read_file(best))
    if data.splits["test"] is not None and trainer.limit_test_batches != 0:
        results |= _evaluate(trainer, module, data, "test")
    if trainer.is_global_zero:
        results["export"] = str(module.write_folder(work_dir / "export"))
    return results


def _evaluate(trainer: pl.Trainer, module: TunedModule, data: TunedData, task: str) -> dict[str, Any]:
    """Return the numbers of 'validate' or 'test'."""
    stage = "val" if task == "validate" else "test"
    found = getattr(trainer, task)(module, data, verbose=False)
    _check_limit(trainer, stage)
    require_batches(trainer, stage, len(found))  # Lightning passes over an empty set that knows its length
    return dict(found[0])


def _check_limit(trainer: pl.Trainer, stage: str) -> None:
    key = f"limit_{stage}_batches"
    if getattr(trainer, key) == 0:
        raise ValueError(f"trainer.{key}: expected batches to run on, got 0")


def _require_training(trainer: pl.Trainer) -> None:
    """Raise ValueError if no step was ever taken, in this run or before the checkpoint that it continues from."""
    if trainer.global_step:
        return
    limits = dict(
        max_steps=trainer.max_steps, max_epochs=trainer.max_epochs, limit_train_batches=trainer.limit_train_batches
    )
    given = ", ".join(f"{key}=0" for key, value in limits.items() if value == 0)
    why = f"trainer has {given}" if given else "it stopped before its first step"
    raise ValueError(f"trainer: expected at least one step of training, got none ({why}); nothing is exported")


def _check_fits(module: TunedModule, theirs: Mapping[str, tuple[int, ...]], checkpoint: str | Path) -> None:
    """Raise ValueError if the shapes in a checkpoint are those of another model than the config's."""
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = match_wrappers(module, theirs)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            has, wants = (f"shape {found[name]}" if name in found else "no such weights" for found in (theirs, ours))
            raise ValueError(
                f"checkpoint: expected the weights of the config's model, got {str(checkpoint)!r} of another: "
                f"{name} has {has}, the model {wants}"
            )
