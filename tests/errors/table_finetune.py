"""Fine-tuning classifiers: module, data, runner, export."""

import ast
import errno
import importlib.util
import io
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytorch_lightning as pl
import torch
from classifier_runs import DATA, MODEL, config, module
from PIL import Image, ImageOps
from studies.stages import check_seeds
from test_data import COLOURS, write_folder
from test_images import encoded, tiff
from tiny import TRAINER
from torch import nn

import dcn_plugin.finetune
from dcn_plugin.export import register_form
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
from dcn_plugin.finetune.classification.preprocessing import resolve
from dcn_plugin.finetune.classification.samples import ImageStream
from dcn_plugin.finetune.classification.splits import check_shards
from dcn_plugin.finetune.classification.writer import PredictionWriter
from dcn_plugin.finetune.command_line import _literal, _split, parse_options
from dcn_plugin.finetune.folders import Place
from dcn_plugin.finetune.guard import refuse_callbacks, refuse_monitors, require_batches
from dcn_plugin.finetune.images import UnreadableImage, read_image
from dcn_plugin.finetune.run import build, quiet, writing_to
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


def ran_with_weights_from_elsewhere(tmp_path):
    torch.save({"model": {"weight": torch.zeros(2)}, "epoch": 3}, tmp_path / "x.pth")
    ran("test", tmp_path / "x.pth")(tmp_path)


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
        trainer = pl.Trainer(callbacks=list(callbacks), logger=False, enable_checkpointing=False, **options)
        refuse_callbacks(trainer)
        refuse_monitors(trainer, FinetuneModule(MODEL, num_classes=2))

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
    Case(
        with_callbacks(pl.callbacks.EarlyStopping("val_acc")),
        ValueError, "callbacks:", "expected a monitor out of val_loss", "got monitor='val_acc' of EarlyStopping",
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
    Case(ran("test"), ValueError, "checkpoint:", "expected one for test", "got none"),
    Case(
        ran("test", "nowhere.ckpt"),
        FileNotFoundError, "checkpoint:", "expected a file", "got 'nowhere.ckpt', which does not exist",
    ),
    Case(
        ran_with_weights_from_elsewhere,
        ValueError, "checkpoint:", "expected one of Lightning, with 'state_dict'", "x.pth' with 'model', 'epoch'",
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


def beside(data, names=None, start=None, **changes):
    """The module, which or whose weights may know names of its classes, as it meets its data."""

    def call():
        made = module(**changes)
        made.class_names, made.started_from = names, (start, "x.pth")
        made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**data))
        made.setup("fit" if start is None else "validate")

    return call


def resumed():
    made = module()
    made.class_names = ["a", "b"]
    made.on_load_checkpoint({"dcn_plugin": dict(class_names=["a", "b", "c"])})


def import_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for name in ("classification", "classification.losses", "classification.module", "module"):
        monkeypatch.delitem(sys.modules, f"dcn_plugin.finetune.{name}")
    path = dcn_plugin.finetune.__file__
    spec = importlib.util.spec_from_file_location("dcn_plugin.finetune", path, submodule_search_locations=[])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


class Returns(nn.Module):
    """A loss, or a model, that returns what it was given, and has a parameter if told so."""

    def __init__(self, value=0, trained=False):
        super().__init__()
        self.value = value
        if trained:
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, logits, target=None):
        return self.value


def lost(loss, **changes):
    return lambda: module(num_classes=3, loss=loss, **changes)


def met(target, loss="cross_entropy", logits=None, **changes):
    """A training step on 4 images with these targets."""

    def call():
        made = module(num_classes=3, loss=loss, **changes)
        if logits is not None:
            made.model = Returns(logits)
        made.training_step((torch.zeros(4, 1, 32, 32), target), 0)

    return call


def restored_model(tmp_path):
    values = dict(model=dict(type="os.system", command="true"), num_classes=2)
    torch.save({"state_dict": {}, "hyper_parameters": values}, tmp_path / "x.ckpt")
    FinetuneModule.restore(tmp_path / "x.ckpt")


def exported_with_spec(tmp_path):
    export_model(FinetuneModule(MODEL, num_classes=2).model, tmp_path)
    load_exported(tmp_path, spec=dict(type="DCNResNet"))


def exported_by_somebody_else(tmp_path):
    export_model(FinetuneModule(MODEL, num_classes=2).model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(dcn_plugin=dict(voxels=dict(width=4)))))
    load_exported(tmp_path)


def restored_loss(loss):
    def call(tmp_path):
        torch.save({"state_dict": {}, "hyper_parameters": dict(model=MODEL, loss=loss)}, tmp_path / "x.ckpt")
        FinetuneModule.restore(tmp_path / "x.ckpt")

    return call


MULTI_HOT = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
LOSSES = [
    Case(lost(3), ValueError, "loss:", "expected a name, dict(type=..., ...) or a callable", "got 3"),
    Case(lost(dict(weight=[1])), ValueError, "loss:", "dict(type=<name or import path>, ...)", "got {'weight': [1]}"),
    Case(lost("cross_entropi"), ValueError, "loss:", "did you mean 'cross_entropy'?", "unknown loss 'cross_entropi'"),
    Case(
        lost(dict(type="cross_entropy", pos_weight=1)),
        ValueError, "loss (cross_entropy):", "known: weight", "unknown key 'pos_weight'",
    ),
    *(
        Case(lost(dict(type=kind, **{key: value})), ValueError, f"loss.{key}:", words, f"got {value!r}")
        for kind, key, value, words in (
            ("cross_entropy", "weight", [1, 2], "expected 3 non-negative numbers, one a class"),
            ("cross_entropy", "weight", 2.0, "expected 3 non-negative numbers, one a class"),
            ("cross_entropy", "weight", [1, 2, -1], "expected 3 non-negative numbers, one a class"),
            ("binary_cross_entropy", "pos_weight", [1, 2], "one a class, or one for all"),
            ("binary_cross_entropy", "pos_weight", math.inf, "one a class, or one for all"),
            ("torch.nn.BCEWithLogitsLoss", "pos_weight", ["a"], "one a class, or one for all"),
        )
    ),
    Case(lost("no_such_package.loss"), ValueError, "loss:", "expected an import path of a callable", "No module named"),
    Case(lost("math.pi"), ValueError, "loss:", "expected an import path of a callable", "got 'math.pi', a float"),
    Case(
        lost(dict(type="torch.nn.CrossEntropyLoss", gamma=1)),
        ValueError, "loss:", "torch.nn.CrossEntropyLoss does not take {'gamma': 1}", "unexpected keyword argument",
    ),
    Case(
        lost("types.SimpleNamespace"),
        ValueError, "loss:", "expected the path of a callable, or of a class of callables", "got types.SimpleNamespace",
    ),
    Case(lost(Returns(trained=True)), ValueError, "loss:", "expected a loss without parameters", "with scale"),
    Case(lost(Returns(torch.zeros(2))), ValueError, "loss:", "that returns a single number", "which returns [2]"),
    Case(lost(Returns(None)), ValueError, "loss:", "that returns a single number", "which returns NoneType"),
    Case(
        lost("SoftTargetCrossEntropy"),
        ValueError, "loss:", "that takes logits [N, 3] and class indices [2]", "got SoftTargetCrossEntropy, which says",
    ),
    Case(
        lost("AsymmetricLossSingleLabel", mixup=dict(mixup_alpha=1.0)),
        ValueError, "loss:", "and probabilities [2, 3]", "got AsymmetricLossSingleLabel, which says",
    ),
    Case(
        lost("cross_entropy", multi_label=True),
        ValueError, "multi_label:", "expected False with loss='cross_entropy'", "got True",
    ),
    Case(
        lost("binary_cross_entropy", multi_label=False),
        ValueError, "multi_label:", "expected True with loss='binary_cross_entropy'", "got False",
    ),
    Case(
        lost("binary_cross_entropy", label_smoothing=0.1),
        ValueError, "label_smoothing:", "expected 0 unless loss='cross_entropy'", "got 0.1 with loss='binary",
    ),
    Case(
        lost("binary_cross_entropy", mixup=dict(mixup_alpha=1.0)),
        ValueError, "mixup:", "expected None with several labels an image", "got Mixup",
    ),
    Case(
        met(MULTI_HOT),
        ValueError, "target:", "class indices [4] in 0..2", "row [1.0, 0.0, 1.0]: for several labels an image",
    ),
    Case(met(MULTI_HOT.long()), ValueError, "target:", "class indices [4] in 0..2", "got int64 [4, 3]"),
    Case(met(torch.eye(3)[[0, 1, 2, 0]].long()), ValueError, "target:", "class indices [4] in 0..2", "int64 [4, 3]"),
    Case(
        met(MULTI_HOT, mixup=dict(mixup_alpha=1.0)),
        ValueError, "target:", "class indices [4] in 0..2", "got float32 [4, 3]",
    ),
    Case(met(torch.zeros(4)), ValueError, "target:", "class indices [4] in 0..2", "got float32 [4]"),
    Case(met(torch.zeros(4, 1).long()), ValueError, "target:", "class indices [4] in 0..2", "got int64 [4, 1]"),
    Case(met(torch.tensor([0, 1, 2, 3])), ValueError, "target:", "class indices [4] in 0..2", "got 3"),
    Case(met(torch.tensor([0, 1, 2, -1])), ValueError, "target:", "class indices [4] in 0..2", "got -1"),
    Case(met([0, 1, 2, 0]), ValueError, "target:", "class indices [4] in 0..2", "got list"),
    Case(
        met(torch.zeros(4).long(), "binary_cross_entropy"),
        ValueError, "target:", "multi-hot [4, 3] in 0..1", "got int64 [4] (loss='cross_entropy' takes class indices)",
    ),
    Case(
        met(2 * MULTI_HOT, "binary_cross_entropy"),
        ValueError, "target:", "multi-hot [4, 3] in 0..1", "got values in 0.0..2.0",
    ),
    Case(
        met(torch.zeros(4).long(), logits=torch.zeros(4, 3, 1, 1)),
        ValueError, "model:", "expected logits [4, 3]", "got [4, 3, 1, 1]",
    ),
    Case(met(torch.zeros(4).long(), logits=[]), ValueError, "model:", "expected logits [4, 3]", "got list"),
    Case(
        restored_loss("os.system"),
        ValueError, "loss:", "expected it as restore(path, loss=...)", "got 'os.system' from the checkpoint",
    ),
    Case(
        restored_loss(dict(type="not stored", what="<lambda>")),
        ValueError, "loss:", "expected the callable that was trained with", "a checkpoint, which cannot hold it",
    ),
]  # fmt: skip


def exported(spec, tmp_path):
    export_model(nn.Conv2d(1, 1, 1), tmp_path, spec=spec)


MODULE = [
    Case(built(model=dict(depth=18)), ValueError, "model:", "expected a timm name, dict(name=...)", "got {'depth'"),
    Case(
        built(model="resnet18_dnc"),
        ValueError, "model:", "close to it: resnet18", "expected a timm model, got 'resnet18_dnc'",
    ),
    Case(built(model=dict(name=3)), TypeError, "model:", "expected a timm model's name", "got 3"),
    Case(built(model=dict(MODEL, chanels=3)), TypeError, "model:", "expected arguments that", "'chanels'"),
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
    Case(
        restored_model,
        ValueError, "model.type:", "expected a name that is registered with MMEngine", "got 'os.system' from the file",
    ),
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
    Case(
        lambda: module(model=dict(MODEL, act_layer=nn.ReLU)),
        TypeError, "model.act_layer:", "which checkpoints and exported folders hold", "got type <class",
    ),
    Case(
        beside(dict(num_classes=3, class_names=["a", "c", "b"]), num_classes=3, names=["a", "b", "c"]),
        ValueError, "class_names:", "class 1 is 'b' in what the model was trained on", "'c' in the data",
    ),
    Case(
        beside(dict(num_classes=3, class_names=["a", "c", "b"]), num_classes=3, start=["a", "b", "c"]),
        ValueError, "class_names:", "class 1 is 'b' in x.pth", "'c' in the data",
    ),
    Case(
        resumed, ValueError, "class_names:", "class 2 ('c')", "is only in the checkpoint"
    ),
    Case(built(mixup=dict(alpha=1)), ValueError, "mixup:", "known: ", "unknown key 'alpha'"),
    Case(
        beside(dict(num_classes=10), num_classes=7),
        ValueError, "num_classes:", "expected the model's 7 classes", "got 10 of the data",
    ),
    Case(
        beside(dict(batch_size=15), mixup=dict(mixup_alpha=1.0)),
        ValueError, "batch_size:", "expected an even one for Mixup", "got 15",
    ),
    Case(lambda: OffsetMonitor(every_n_steps=0), ValueError, "every_n_steps:", "expected a positive number", "got 0"),
    Case(
        lambda tmp_path: PredictionWriter(tmp_path, threshold=2), ValueError, "threshold:", "a score in 0..1", "got 2"
    ),
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
        exported_by_somebody_else,
        ValueError, "directory:", "expected a model described as one of model, detector", "got 'voxels' in /",
    ),
    Case(
        lambda: register_form("detector", None, None),
        ValueError, "key:", "expected one of its own beside model, detector", "got 'detector'",
    ),
    Case(exported_with_spec, ValueError, "spec:", "expected None, as", "got {'type': 'DCNResNet'}"),
    Case(
        import_without_torchmetrics,
        ModuleNotFoundError, "dcn_plugin.finetune", "pip install '.[finetune]'", "needs torchmetrics",
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
        if stage is not None:
            data.setup(stage)
        if look is not None:
            look(data)

    return call


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


FLOATS = Image.fromarray(np.ones((4, 4), np.float32))


def vanished(data):
    data.setup("validate")
    data._dataset("val").dataset.reader.places.insert(0, Place("green/green1.png", f"{data.root}/val/green/green1.png"))
    data._dataset("val").dataset[0]


def no_bits(tmp_path, monkeypatch):
    def posterize(image, bits):
        if bits < 1:
            raise ValueError("bits must be between or equal to 1 and 8")
        return image

    monkeypatch.setattr(ImageOps, "posterize", posterize)  # in every Pillow what it does from 13 on
    look = lambda data: data.train_dataloader()  # noqa: E731
    folder(*BOTH, augment=dict(auto_augment="rand-m9-mstd0.5-inc1"), look=look)(tmp_path)


def two_orders(path):
    for split, order in (("train", "blue green red"), ("val", "red green blue")):
        (path / split / "classes.txt").write_text(order.replace(" ", "\n"))


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
        lambda: resolve(dict(input_size=48), nn.Conv2d(1, 4, 3)),
        ValueError, "input_size:", "expected (1, height, width)", "got (3, 48, 48)",
    ),
    Case(
        lambda: resolve(dict(input_size=(1, 2, 3, 4)), None),
        ValueError, "input_size:", "expected a side, (height, width) or (channels, height, width)", "got (1, 2, 3, 4)",
    ),
    Case(
        lambda tmp_path: ImageDataModule("wds/", str(tmp_path)).num_classes,
        ValueError, "num_classes:", "expected a number, as data set 'wds/' does not name its classes", "got None",
    ),
    Case(
        lambda tmp_path: check_shards(str(tmp_path), ["train-0001.tar"]),
        FileNotFoundError, "root:", "expected shard 'train-0001.tar'", "train-0001.tar', which does not exist",
    ),
    Case(
        lambda tmp_path: ImageDataModule("", str(tmp_path / "nowhere")).setup("fit"),
        FileNotFoundError, "root:", "expected the folder of the data", "nowhere', which does not exist",
    ),
    Case(
        folder(("train", COLOURS)),
        FileNotFoundError, "val_split:", "expected split 'validation'", "got train",
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
        FileNotFoundError, "root:", "looked for .png .jpg .jpeg", "no images in",
    ),
    Case(
        folder(
            *BOTH,
            spoil=lambda path: (path / "val" / "green" / "green1.png").write_bytes(b"not an image"),
            look=lambda data: list(data.val_dataloader()),
        ),
        UnreadableImage, "green1.png", "bad_images='skip' the next image is taken instead", "cannot identify image",
    ),
    Case(
        folder(*BOTH, spoil=lambda path: (path / "val" / "green" / "green1.png").unlink(), stage=None, look=vanished),
        UnreadableImage, "green1.png", "No such file", "unreadable image",
    ),
    Case(
        folder(
            *BOTH,
            spoil=lambda path: [file.write_bytes(b"") for file in path.glob("val/*/*.png")],
            look=lambda data: list(data.val_dataloader()),
            bad_images="skip",
        ),
        UnreadableImage, ".png", "9 images before it", "cannot identify image",
    ),
    Case(
        folder(*BOTH, dataset=dict(clas_map="classes.txt")),
        ValueError, "dataset:", "did you mean 'class_map'?", "key 'clas_map'",
    ),
    Case(
        folder(*BOTH, dataset=dict(class_map="classes.txt")),
        ValueError, "class_map:", "expected a dict or a .txt file of names", "got 'classes.txt'",
    ),
    Case(
        folder(*BOTH, spoil=two_orders, dataset=dict(class_map="classes.txt")),
        ValueError, "val_split:", "expected the order of the training split, where class 'red' is 2", "got 0",
    ),
    Case(
        folder(*BOTH, spoil=lambda path: (path / "val.tar").write_bytes(b"no tar"), val_split="val.tar"),
        ValueError, "val_split:", "expected a folder or an uncompressed tar file", "val.tar: ",
    ),
    Case(
        no_bits, ValueError, "augment: auto_augment='rand-m9-mstd0.5-inc1'", "-mmax9", "draws magnitude 10, at which",
    ),
    Case(
        lambda: list(ImageStream(SimpleNamespace(reader=[(FLOATS, 0)], target_transform=None), "L", "wds/ 'a'", "no")),
        UnreadableImage, "wds/ 'a'", "with data.bad_images='skip' it is left out", "image 0",
    ),
]  # fmt: skip
CASES = CONFIG + LOSSES + MODULE + FILES + DATA_SETS
