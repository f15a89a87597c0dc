"""Every flag of Lightning's Trainer and every callback that it brings, with both modules: each works, or is refused.

The tables are compared with Lightning's signature and classes: what a new version adds fails here until it is in them.
"""

import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from detector_runs import splits_of  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import BackboneFinetuning, load_exported, run  # noqa: E402
from dcn_plugin.finetune.run import build, known_callbacks  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")


@pytest.fixture(autouse=True)
def deterministic_for_one_test():
    yield
    torch.use_deterministic_algorithms(False)


BACKBONE = dict(name="resnet18_dcn", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], in_chans=1)
KINDS = ("classifier", "detector")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return splits_of(tmp_path_factory.mktemp("scenes"), train=4, val=2, test=2)


@pytest.fixture
def config(scenes):
    def make(kind, trainer=None, **changes):
        flags = dict(
            TRAINER, max_epochs=1, limit_train_batches=2, limit_val_batches=1, limit_test_batches=1,
            num_sanity_val_steps=0,
        )  # fmt: skip
        common = dict(trainer=flags | (trainer or {}), logger=False, seed=0, optimizer=dict(opt="sgd", lr=1e-3))
        if kind == "classifier":
            data = dict(name="digits", batch_size=2, input_size=(1, 32, 32), val_split="val", test_split="test")
            data["dataset"] = dict(limit=8, size=32, digit_size=20)
            return common | dict(model=BACKBONE, data=data) | changes
        detector = dict(name="faster_rcnn", backbone=BACKBONE, fpn_channels=8, box_head=dict(representation_size=8))
        model = detector | dict(min_size=32, max_size=32, rpn_pre_nms_top_n_test=8, rpn_post_nms_top_n_test=8)
        return common | dict(module="DetectionModule", model=model, data=scenes) | changes

    return make


class Refused(NamedTuple):
    """A value that has to end the run at its start, with a sentence in which this stands."""

    value: Any
    said: str


# Flag -> values to try beside a short run on the CPU; a dict is several flags at once.
FLAGS = {
    "accelerator": ["cpu", Refused("abacus", "abacus")],
    "strategy": ["auto", Refused("nothing", "nothing")],
    "devices": ["auto"],
    "num_nodes": [1],
    "precision": ["bf16-mixed", "64-true", Refused("half", "half")],
    "logger": [dict(config_logger=True)],
    "callbacks": [],  # below
    "fast_dev_run": [True],
    "max_epochs": [1, Refused(-5, "max_epochs"), Refused(-1, "expected an end"), Refused(0, "at least one step")],
    "min_epochs": [1],
    "max_steps": [1, Refused(0, "at least one step")],
    "min_steps": [1],
    "max_time": [dict(max_time=dict(minutes=10)), Refused("soon", "soon")],
    "limit_train_batches": [1, Refused(0, "at least one step"), Refused(-1, "limit_train_batches")],
    "limit_val_batches": [0],
    "limit_test_batches": [0],
    "limit_predict_batches": [],  # below
    "overfit_batches": [1],
    "val_check_interval": [1, dict(val_check_interval=1, check_val_every_n_epoch=None), "00:00:00:01"],
    "check_val_every_n_epoch": [2],
    "num_sanity_val_steps": [-1],
    "log_every_n_steps": [1],
    "enable_checkpointing": [False],
    "enable_progress_bar": [True],
    "enable_model_summary": [True],
    "accumulate_grad_batches": [2],
    "gradient_clip_val": [0.1],
    "gradient_clip_algorithm": [
        dict(gradient_clip_val=0.1, gradient_clip_algorithm="value"), Refused("nothing", "nothing"),
    ],
    "deterministic": [True, "warn"],
    "benchmark": [True],
    "inference_mode": [False],
    "use_distributed_sampler": [False],
    "profiler": ["simple", Refused("nothing", "profiler")],
    "detect_anomaly": [True],
    "barebones": [
        dict(
            barebones=True, log_every_n_steps=None, enable_progress_bar=None, enable_model_summary=None,
            num_sanity_val_steps=None,
        )
    ],
    "plugins": [[]],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [dict(reload_dataloaders_every_n_epochs=1, max_epochs=2)],
    "default_root_dir": [],  # given by `run`, from its work_dir
    "enable_autolog_hparams": [False],
    "model_registry": [],  # a paid service's
}  # fmt: skip
CASES = [
    pytest.param(kind, flag, value, id=f"{kind}-{flag}-{i}")
    for flag, values in FLAGS.items()
    for i, value in enumerate(values)
    for kind in KINDS
    # A detector takes longer: one value of each flag has to do.
    if kind == "classifier" or i == 0 and not isinstance(value, Refused)
]


def test_every_flag_is_in_the_table():
    assert set(FLAGS) == set(inspect.signature(pl.Trainer).parameters)


def finite(folder):
    return all(bool(torch.isfinite(p).all()) for p in load_exported(folder).parameters())


def attempt(values, work_dir, refused):
    """Run a config to its export, or see it refused before an epoch has ended."""
    if refused is None:
        results = run(values, work_dir)
        assert finite(results["export"]) and all(not isinstance(v, float) or v == v for v in results.values())
        return
    with pytest.raises((ValueError, TypeError, pl.utilities.exceptions.MisconfigurationException)) as caught:
        run(values, work_dir)
    assert refused.said in str(caught.value)
    assert not list(work_dir.glob("*.ckpt")) and not (work_dir / "export").exists()


@pytest.mark.parametrize(("kind", "flag", "value"), CASES)
def test_flag_works_or_is_refused(config, tmp_path, kind, flag, value):
    refused = value if isinstance(value, Refused) else None
    value = refused.value if refused else value
    flags = value if isinstance(value, dict) and set(value) & {flag} else {flag: value}
    if isinstance(value, dict) and "config_logger" in value:
        values = config(kind, logger=True)
    else:
        values = config(kind, flags)
    attempt(values, tmp_path, refused)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_limits_and_places(config, tmp_path, kind):
    best = run(config(kind, callbacks=dict(best=dict(type="ModelCheckpoint", filename="best"))), tmp_path)["checkpoint"]
    name = "predictions.csv" if kind == "classifier" else "detections.json"
    run(config(kind, dict(limit_predict_batches=1)), tmp_path / "limited", "predict", best)
    assert (tmp_path / "limited" / name).is_file()
    trainer, *_ = build(config(kind), tmp_path / "root")
    assert trainer.default_root_dir == str(tmp_path / "root")


SCORE = {"classifier": "val_top1", "detector": "val_map"}
# Callback -> its arguments, of which "SCORE" is the module's score, "DIR" a folder; or what refuses it.
ARGUMENTS = {
    "BackboneFinetuning": dict(unfreeze_backbone_at_epoch=0),
    "BaseFinetuning": Refused({}, "unknown type 'BaseFinetuning'"),
    "BasePredictionWriter": Refused({}, "unknown type 'BasePredictionWriter'"),
    "BatchSizeFinder": dict(init_val=2, max_trials=1, steps_per_trial=1),
    "Callback": Refused({}, "unknown type 'Callback'"),
    "Checkpoint": Refused({}, "unknown type 'Checkpoint'"),
    "DetectionWriter": {},
    "DeviceStatsMonitor": dict(cpu_stats=False),
    "EMAWeightAveraging": dict(decay=0.9),
    "EarlyStopping": dict(monitor="SCORE", mode="max"),
    "GradientAccumulationScheduler": dict(scheduling={0: 1, 1: 2}),
    "LambdaCallback": {},
    "LearningRateFinder": dict(num_training_steps=3, min_lr=1e-6, max_lr=1e-3),
    "LearningRateMonitor": dict(logging_interval="step"),
    "MaskWriter": {},
    "ModelCheckpoint": dict(monitor="SCORE", mode="max"),
    "ModelPruning": dict(pruning_fn="l1_unstructured", amount=0.2),
    "ModelSummary": dict(max_depth=2),
    "OffsetMonitor": dict(every_n_steps=1),
    "OnExceptionCheckpoint": {},
    "PredictionWriter": {},
    "ProgressBar": Refused({}, "unknown type 'ProgressBar'"),
    "RichModelSummary": {},
    "RichProgressBar": {},
    "SpikeDetection": dict(warmup=1),
    "StochasticWeightAveraging": dict(swa_lrs=1e-3, swa_epoch_start=1),
    "TQDMProgressBar": dict(refresh_rate=1),
    "ThroughputMonitor": dict(batch_size_fn=lambda batch: len(batch[0])),
    "Timer": dict(duration="00:00:10:00"),
    "WeightAveraging": {},
}
NEEDS = {  # what else a callback asks for
    "DeviceStatsMonitor": dict(logger=True),
    "LearningRateMonitor": dict(logger=True),
    "ThroughputMonitor": dict(logger=True),
    "RichProgressBar": dict(trainer=dict(enable_progress_bar=True)),
    "TQDMProgressBar": dict(trainer=dict(enable_progress_bar=True)),
    "ModelSummary": dict(trainer=dict(enable_model_summary=True)),
    "RichModelSummary": dict(trainer=dict(enable_model_summary=True)),
    "GradientAccumulationScheduler": dict(trainer=dict(max_epochs=2)),
    "StochasticWeightAveraging": dict(trainer=dict(max_epochs=2)),
}


def test_every_callback_is_in_the_table():
    lightnings = {
        name for name, value in vars(pl.callbacks).items() if isinstance(value, type) and issubclass(value, pl.Callback)
    }
    ours = known_callbacks()
    assert set(ARGUMENTS) == lightnings | set(ours)
    assert ours["BackboneFinetuning"] is BackboneFinetuning


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_callback_works_or_is_refused(config, tmp_path, kind, name):
    given = ARGUMENTS[name]
    refused = given if isinstance(given, Refused) else None
    spec = dict(refused.value if refused else given, type=name)
    spec = {key: SCORE[kind] if value == "SCORE" else value for key, value in spec.items()}
    needs = dict(NEEDS.get(name, {}))
    attempt(config(kind, needs.pop("trainer", None), callbacks=dict(it=spec), **needs), tmp_path, refused)


# -- what these features promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_averaging_of_the_last_epochs_keeps_the_factors_of_the_offsets(config, tmp_path, kind):
    rates = {}

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates[trainer.current_epoch] = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}

    optimizer = dict(opt="sgd", lr=1e-3, offset_lr_mult=0.1, layer_decay=None)
    swa = dict(type="StochasticWeightAveraging", swa_lrs=4e-3, swa_epoch_start=2, annealing_epochs=1)
    trainer, module, data = build(
        config(kind, dict(max_epochs=3), callbacks=dict(swa=swa), optimizer=optimizer), tmp_path
    )
    trainer.callbacks.insert(0, Watch())
    trainer.fit(module, data)
    assert rates[0][0.1] == pytest.approx(0.1 * rates[0][1.0])
    assert rates[2][1.0] == pytest.approx(4e-3) and rates[2][0.1] == pytest.approx(4e-4)


@pytest.mark.parametrize("accumulation", [{0: 1, 1: 2}, {0: 2}, {0: 2, 2: 1}])
def test_a_schedule_follows_a_changing_accumulation(config, tmp_path, accumulation):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    callback = dict(type="GradientAccumulationScheduler", scheduling=accumulation)
    flags = dict(max_epochs=4, limit_train_batches=4, limit_val_batches=0)
    values = config("classifier", flags, callbacks=dict(it=callback))
    values["schedule"] = dict(sched="cosine", min_lr=0.0)
    trainer, module, data = build(values, tmp_path)
    trainer.callbacks.append(Watch())
    trainer.fit(module, data)
    factors = [max((start, factor) for start, factor in accumulation.items() if start <= e)[1] for e in range(4)]
    total = sum(4 // factor for factor in factors)
    assert len(rates) == total
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * step / total)))


def test_a_resume_within_an_epoch_goes_on_accumulating(config, tmp_path):
    callback = dict(type="GradientAccumulationScheduler", scheduling={0: 2})
    saver = dict(type="ModelCheckpoint", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    values = config("classifier", dict(limit_train_batches=4), callbacks=dict(it=callback, save=saver))
    run(values, tmp_path)
    trainer, module, data = build(values, tmp_path / "again")
    trainer.fit(module, data, ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    assert trainer.accumulate_grad_batches == 2 and trainer.global_step == 2
