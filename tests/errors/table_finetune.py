"""Fine-tuning classifiers: module, data, runner, export."""

import ast
import errno
import importlib.util
import io
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from test_data import COLOURS, write_folder
from test_finetune import DATA, MODEL, TRAINER, config, module
from test_images import encoded, tiff
from torch import nn

import dcn_plugin.finetune
from dcn_plugin.finetune import (
    BackboneFinetuning,
    Digits,
    FinetuneModule,
    ImageDataModule,
    OffsetMonitor,
    export_model,
    load_config,
    load_exported,
    run,
)
from dcn_plugin.finetune.command_line import _literal, _split, parse_options
from dcn_plugin.finetune.guard import refuse_callbacks, require_batches
from dcn_plugin.finetune.images import UnreadableImage, read_image
from dcn_plugin.finetune.run import build, quiet, writing_to
from dcn_plugin.finetune.stages import check_seeds
from errors.case import Case
from errors.table_models import faster


def built(**changes):
    def call(tmp_path):
        with quiet():
            build(config(**changes), tmp_path)

    return call


def ran(task="fit", checkpoint=None, **changes):
    def call(tmp_path):
        with quiet():
            run(config(**changes), tmp_path, task, checkpoint)

    return call


def without(key):
    def call(tmp_path):
        build({name: value for name, value in config().items() if name != key}, tmp_path)

    return call


def loaded(text, options=None):
    def call(tmp_path):
        (tmp_path / "config.py").write_text(text)
        load_config(tmp_path / "config.py", options)

    return call


def checked(saved, task="test"):
    """A run from a checkpoint that holds `saved`."""

    def call(tmp_path):
        torch.save(saved, tmp_path / "x.ckpt")
        ran(task, tmp_path / "x.ckpt")(tmp_path)

    return call


def resumed_otherwise(tmp_path):
    ran(trainer=dict(TRAINER, max_epochs=1))(tmp_path)
    ran(checkpoint="auto", optimizer=dict(layer_decay=0.7))(tmp_path)


def tested_on_nothing(tmp_path):
    ran(trainer=dict(TRAINER, max_epochs=1))(tmp_path)
    ran("test", tmp_path / "last.ckpt", trainer=dict(TRAINER, limit_test_batches=0))(tmp_path)


def with_callbacks(*callbacks, **options):
    def call():
        refuse_callbacks(pl.Trainer(callbacks=list(callbacks), logger=False, enable_checkpointing=False, **options))

    return call


def options_of(*options):
    return lambda: parse_options(options)


def full_disk(tmp_path):
    with writing_to(tmp_path / "work"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


COMMAND_LINE = [
    Case(options_of("x"), ValueError, "--cfg-options:", "expected KEY=VALUE", "got 'x'"),
    Case(options_of("a=[1"), ValueError, "--cfg-options:", "expected a value that parses", "got 'a=[1'"),
    Case(lambda: _split("a)"), ValueError, "brackets:", "expected an open one before ')'", "got none"),
    Case(lambda: _split("[a"), ValueError, "brackets and quotes:", "expected ']' before the end", "got none"),
    Case(
        lambda: _literal(ast.parse("f(2)", mode="eval").body), ValueError, "dict:", "plain values in it", "got f(2)",
    ),
    Case(built(model=dict(MODEL), seed=-1), ValueError, "seed:", "these values do not fit", "-1"),
    Case(loaded("model = nothing"), ValueError, "config:", "config.py does not load", "'nothing' is not defined"),
    Case(loaded("a = 1", {"a.b": 1}), ValueError, "options", "these values do not fit", "a.b"),
]  # fmt: skip


CONFIG = [
    *COMMAND_LINE,
    Case(built(callbacks=5), TypeError, "callbacks:", "expected a dict", "got int 5"),
    Case(built(num_classes="ten"), TypeError, "num_classes:", "expected a number", "got 'ten'"),
    Case(built(mixup="cutmix"), TypeError, "mixup:", "expected a dict", "got str 'cutmix'"),
    Case(
        ran(trainer=dict(TRAINER, limit_train_batches=0)),
        ValueError, "trainer:", "at least one step of training", "got none (trainer has limit_train_batches=0)",
    ),
    Case(
        checked(dict(state_dict=dict(weight=torch.zeros(1)))),
        ValueError, "checkpoint:", "the weights of the config's model", "x.ckpt' of another",
    ),
    Case(checked(dict(weight=torch.zeros(1))), ValueError, "checkpoint:", "Lightning wrote", "without 'state_dict'"),
    Case(resumed_otherwise, ValueError, "checkpoint:", "the optimizer of the config", "last.ckpt'"),
    Case(
        tested_on_nothing,
        ValueError, "trainer.limit_test_batches:", "expected batches to run on", "got 0",
    ),
    Case(
        lambda: require_batches(SimpleNamespace(datamodule=None), "val", 0),
        ValueError, "val:", "expected at least one batch", "got none from its data loader",
    ),
    Case(
        with_callbacks(pl.callbacks.BackboneFinetuning()),
        ValueError, "callbacks:", "dcn_plugin.finetune.BackboneFinetuning", "got Lightning's BackboneFinetuning",
    ),
    Case(
        with_callbacks(BackboneFinetuning(9), pl.callbacks.StochasticWeightAveraging(1e-3), max_epochs=10),
        ValueError, "callbacks:", "expected the backbone to be trained before", "got unfreeze_backbone_at_epoch=9",
    ),
    Case(built(modell=1), ValueError, "config: unknown key", "did you mean 'model'?", "'modell'"),
    Case(without("model"), ValueError, "config: key 'model'", "it has 'data', 'callbacks'", "is missing"),
    Case(without("data"), ValueError, "config: key 'data'", "it has 'model', 'callbacks'", "is missing"),
    Case(built(module="FinetuneModul"), ValueError, "config: unknown module", "'FinetuneModule'?", "'FinetuneModul'"),
    Case(built(trainer=dict(max_epoch=3)), ValueError, "trainer:", "did you mean 'max_epochs'?", "key 'max_epoch'"),
    Case(built(trainer=[]), TypeError, "trainer:", "expected a dict", "got list []"),
    Case(built(data=dict(DATA, batchsize=3)), ValueError, "data:", "did you mean 'batch_size'?", "key 'batchsize'"),
    Case(
        built(callbacks=dict(a=dict(type="ModelCheckpiont"))),
        ValueError, "callbacks.a:", "did you mean 'ModelCheckpoint'?", "unknown type 'ModelCheckpiont'",
    ),
    Case(
        built(callbacks=dict(a=dict(type="EarlyStopping", monitr="x"))),
        ValueError, "callbacks.a (EarlyStopping):", "did you mean 'monitor'?", "unknown key 'monitr'",
    ),
    Case(
        built(callbacks=dict(a="EarlyStopping")), ValueError, "callbacks.a:", "known: ", "unknown type 'EarlyStopping'"
    ),
    Case(built(logger=dict(type="CvsLogger")), ValueError, "logger:", "known: CSVLogger", "unknown type 'CvsLogger'"),
    Case(built(logger=dict(name="x")), ValueError, "logger:", "expected dict(type=..., ...)", "got {"),
    Case(
        built(trainer=dict(strategy=dict(type="DPStrategy"))),
        ValueError, "trainer.strategy:", "DDPStrategy", "unknown type 'DPStrategy'",
    ),
    Case(
        lambda tmp_path: load_config(tmp_path / "missing.py"),
        FileNotFoundError, "config:", "expected a file", "missing.py', which does not exist",
    ),
    Case(ran("train"), ValueError, "task:", "expected one of fit", "got 'train'"),
    Case(ran("test"), ValueError, "checkpoint:", "test needs one", "got none"),
    Case(
        ran("test", "nowhere.ckpt"),
        FileNotFoundError, "checkpoint:", "expected a file", "got 'nowhere.ckpt', which does not exist",
    ),
    Case(full_disk, OSError, "work'", "what was saved before is whole", "No space left on device"),
    Case(lambda: check_seeds([]), ValueError, "seeds:", "expected at least one", "got none"),
    Case(lambda: check_seeds([0, 0]), ValueError, "seeds:", "expected each once", "got [0, 0]"),
    *(
        Case(lambda seed=seed: check_seeds([seed]), ValueError, "seeds:", "integers from 0 to 2**32 - 1", f"got {seed}")
        for seed in (-1, 0.5, True)
    ),
]  # fmt: skip


def restored(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    FinetuneModule.restore(tmp_path / "x.ckpt")


def beside(data, **changes):
    """The module as it meets its data."""

    def call():
        made = module(**changes)
        made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**data))
        made.setup("fit")

    return call


def import_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "dcn_plugin.finetune.module")
    path = dcn_plugin.finetune.__file__
    spec = importlib.util.spec_from_file_location("dcn_plugin.finetune", path, submodule_search_locations=[])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def exported(spec, tmp_path):
    export_model(nn.Conv2d(1, 1, 1), tmp_path, spec=spec)


MODULE = [
    Case(built(model=dict(depth=18)), ValueError, "model:", "expected a timm name, dict(name=...)", "got {'depth'"),
    Case(built(model="resnet18_dnc"), ValueError, "model:", "close to it: resnet", "unknown timm model 'resnet18_dnc'"),
    Case(built(model=dict(MODEL, chanels=3)), TypeError, "model:", "does not take these arguments", "'chanels'"),
    *(
        Case(built(optimizer={name: -1}), ValueError, f"optimizer.{name}:", "a non-negative factor", "got -1")
        for name in ("offset_lr_mult", "roi_offset_lr_mult")
    ),
    Case(built(optimizer=dict(opt="adammm")), ValueError, "optimizer:", "does not fit", "'opt': 'adammm'"),
    Case(built(optimizer=dict(learning_rate=1)), ValueError, "optimizer:", "does not fit", "'learning_rate'"),
    Case(built(schedule=dict(warm_epochs=1)), ValueError, "schedule:", "'warmup_epochs'?", "unknown key 'warm_epochs'"),
    Case(built(schedule=dict(sched="cosin")), ValueError, "schedule.sched:", "expected one of", "got 'cosin'"),
    *(
        Case(lambda value=value: setattr(module(), "lr", value), ValueError, "lr:", "a positive number", f"got {value}")
        for value in (0, -1.0, math.inf, True)
    ),
    Case(built(checkpoint=dict(file="x")), ValueError, "checkpoint:", "a path or dict(path=..., ...)", "'file'"),
    Case(restored, ValueError, "path:", "a Lightning checkpoint of a FinetuneModule", "x.ckpt"),
    Case(
        ran(trainer=dict(TRAINER, max_epochs=-1)),
        ValueError, "schedule:", "trainer.max_epochs or trainer.max_steps", "got none",
    ),
    Case(
        ran(schedule=dict(sched="step", decay_epochs=0)), ValueError, "schedule:", "does not fit", "'decay_epochs': 0",
    ),
    Case(
        lambda: BackboneFinetuning(-1), ValueError, "unfreeze_backbone_at_epoch:", "expected 0 or more", "got -1",
    ),
    *(
        Case(
            lambda name=name: BackboneFinetuning(**{name: 0.0}), ValueError, f"{name}:", "a positive number", "got 0.0",
        )
        for name in ("backbone_initial_lr", "backbone_initial_ratio_lr")
    ),
    Case(built(label_smoothing=1.5), ValueError, "label_smoothing:", "expected 0 <= label_smoothing < 1", "got 1.5"),
    Case(lambda: module(num_classes=1), ValueError, "num_classes:", "expected at least 2 classes", "got 1"),
    Case(built(mixup=dict(alpha=1)), ValueError, "mixup:", "known: ", "unknown key 'alpha'"),
    Case(
        beside(dict(num_classes=10), num_classes=7),
        ValueError, "num_classes:", "the model has 7 classes", "the data has 10",
    ),
    Case(
        beside(dict(batch_size=15), mixup=dict(mixup_alpha=1.0)),
        ValueError, "batch_size:", "need an even batch size", "got 15",
    ),
    Case(lambda: OffsetMonitor(every_n_steps=0), ValueError, "every_n_steps:", "expected a positive number", "got 0"),
    Case(lambda: OffsetMonitor(limit=-1.0), ValueError, "limit:", "expected a positive number", "got -1.0"),
    Case(
        lambda tmp_path: exported(None, tmp_path),
        ValueError, "spec:", "expected the MMEngine config of a Conv2d", "got None",
    ),
    Case(
        lambda tmp_path: export_model(faster()(), tmp_path),
        ValueError, "spec:", "expected dict(name=..., num_classes=..., ...) of a detector", "got None",
    ),
    Case(
        lambda tmp_path: load_exported(tmp_path),
        FileNotFoundError, "directory:", "an exported model with config.json", "got /",
    ),
    Case(
        import_without_torchmetrics,
        ModuleNotFoundError, "dcn_plugin.finetune", "pip install 'dcn_plugin[finetune]'", "needs torchmetrics",
    ),
]  # fmt: skip


def digits(**options):
    return lambda: Digits(**options)


def images(name, **options):
    return lambda: ImageDataModule(name, **options)


def folder(*splits, name="", spoil=None, stage="fit", look=None, **options):
    """A set of class folders, perhaps spoilt, as it is set up or looked at."""

    def call(tmp_path):
        for split, classes in splits:
            write_folder(tmp_path, split, classes, count=2)
        if spoil is not None:
            spoil(tmp_path)
        data = ImageDataModule(name, str(tmp_path), batch_size=2, input_size=16, **options)
        data.setup(stage)
        if look is not None:
            look(data)

    return call


def shard_is_missing(data):
    split = SimpleNamespace(filenames=["train-0001.tar"])
    data._check_shards(SimpleNamespace(reader=SimpleNamespace(split_info=split)))


def batch_too_large():
    data = ImageDataModule("digits", dataset=dict(limit=5), batch_size=8, input_size=(1, 48, 48))
    data.setup("fit")
    data.train_dataloader()


def read(file, **options):
    return lambda: read_image(file(), where="photo", **options)


NUMBERS = np.array([[0.0, 7.0]])
FILES = [
    Case(
        read(lambda: io.BytesIO(b"GIF?")), UnreadableImage, "unreadable image photo:", "cannot identify", "BytesIO",
    ),
    Case(
        read(lambda: tiff(NUMBERS, 32, sample_format=3)),
        UnreadableImage, "photo:", "SMinSampleValue and SMaxSampleValue", "floating-point values",
    ),
    Case(
        read(lambda: tiff(NUMBERS, 32, sample_format=3, span=(5, 5))),
        UnreadableImage, "photo:", "expected numbers between black 5 and white 5", "got 0.0 to 7.0",
    ),
    Case(
        read(lambda: tiff(np.ones((2, 6)), 16, colours=3, span=(0, 4095))),
        UnreadableImage, "photo:", "only the upper 8 of its 16 bits", "[0.0, 4095.0]",
    ),
    Case(
        read(lambda: encoded(Image.new("RGB", (6, 4)), "PNG"), size=(8, 4)),
        ValueError, "image photo:", "expected 8x4 pixels", "got 6x4",
    ),
]  # fmt: skip


BOTH = (("train", COLOURS), ("val", COLOURS))
DATA_SETS = [
    Case(digits(split="trian"), ValueError, "split:", "expected one of train, val, test", "got 'trian'"),
    Case(digits(digit_size=60), ValueError, "digit_size:", "expected 8 <= digit_size <= size=48", "got 60"),
    Case(digits(copies=0), ValueError, "copies:", "expected at least 1", "got 0"),
    Case(digits(scale=(2, 1)), ValueError, "scale:", "expected (smallest, largest), both positive", "got (2, 1)"),
    Case(digits(degrees=-1), ValueError, "degrees:", "expected a non-negative range", "got -1"),
    Case(digits(limit=0), ValueError, "limit:", "expected at least 1 or None", "got 0"),
    Case(lambda: Digits("val")[200], IndexError, "index:", "expected 0 <= index < 200", "got 200"),
    Case(images("fodler/", root="x"), ValueError, "name:", "did you mean 'folder/'?", "'fodler/'"),
    Case(images("digit"), ValueError, "name:", "did you mean 'digits'?", "unknown data set name 'digit'"),
    Case(images("digits", batch_size=0), ValueError, "batch_size:", "expected at least 1", "got 0"),
    Case(images("digits", num_workers=-1), ValueError, "num_workers:", "expected 0 or more", "got -1"),
    Case(images("digits", bad_images="ignore"), ValueError, "bad_images:", "expected 'raise' or 'skip'", "'ignore'"),
    Case(images(""), ValueError, "root:", "expected the folder of data set ''", "got None"),
    Case(images("digits", augment=dict(hfilp=0.5)), ValueError, "augment:", "did you mean 'hflip'?", "key 'hfilp'"),
    Case(images("digits", dataset=dict(wrap=True)), ValueError, "dataset:", "did you mean 'warp'?", "key 'wrap'"),
    Case(batch_too_large, ValueError, "batch_size:", "expected at most the 5 images to train on", "got 8"),
    Case(
        lambda: images("digits", input_size=48)()._resolve(nn.Conv2d(1, 4, 3)),
        ValueError, "input_size:", "expected input_size=(1, height, width)", "got (3, 48, 48)",
    ),
    Case(
        lambda: images("digits", input_size=(1, 2, 3, 4))()._resolve(None),
        ValueError, "input_size:", "expected a side, (height, width) or (channels, height, width)", "got (1, 2, 3, 4)",
    ),
    Case(
        lambda tmp_path: ImageDataModule("wds/", str(tmp_path)).num_classes,
        ValueError, "num_classes:", "pass num_classes", "data set 'wds/' does not name its classes",
    ),
    Case(
        lambda tmp_path: shard_is_missing(ImageDataModule("wds/", str(tmp_path))),
        FileNotFoundError, "root:", "shard", "train-0001.tar does not exist",
    ),
    Case(
        lambda tmp_path: ImageDataModule("", str(tmp_path / "nowhere")).setup("fit"),
        FileNotFoundError, "root:", "expected the folder of the data", "nowhere', which does not exist",
    ),
    Case(
        folder(("train", COLOURS)),
        FileNotFoundError, "val_split:", "expected split 'validation'", "found train",
    ),
    Case(
        folder(*BOTH, val_split=None, stage="validate"),
        ValueError, "val_split:", "expected the name of a split", "got None",
    ),
    Case(
        folder(("train", {}), spoil=lambda path: (path / "train").mkdir()),
        FileNotFoundError, "root:", "class folders", "no images in",
    ),
    Case(
        folder(*BOTH, spoil=lambda path: (path / "train" / "white").mkdir()),
        ValueError, "root:", "looked for .", "white has no images",
    ),
    Case(
        folder(*BOTH, spoil=lambda path: Image.new("RGB", (8, 8)).save(path / "train" / "loose.png")),
        ValueError, "root:", "in a class folder of", "loose.png is not",
    ),
    Case(
        folder(*BOTH, spoil=lambda path: write_folder(path, "val", {"white": (255,) * 3})),
        ValueError, "val_split:", "which training split", "has class 'white'",
    ),
    Case(
        folder(("empty", {}), spoil=lambda path: (path / "empty").mkdir(), predict_split="empty", stage="predict"),
        FileNotFoundError, "root:", "for split 'empty'", "no images",
    ),
    Case(
        folder(
            *BOTH,
            spoil=lambda path: (path / "val" / "green" / "green1.png").write_bytes(b"not an image"),
            look=lambda data: list(data.val_dataloader()),
        ),
        ValueError, "green1.png", "data.bad_images='skip' takes the next image instead", "cannot identify image",
    ),
]  # fmt: skip
CASES = CONFIG + MODULE + FILES + DATA_SETS
