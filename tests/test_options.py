"""Every option of both modules from training to the loaded model: what trains must export and give the same outputs."""

import inspect

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "pycocotools", "sklearn"):
    pytest.importorskip(_name)
import timm  # noqa: E402
from pytorch_lightning.callbacks import EMAWeightAveraging  # noqa: E402
from tiny import CLASSIFIER, DETECTOR, box_loader, classifier, detector, image_loader, trainer  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.finetune import DetectionModule, FinetuneModule, export_model, load_exported  # noqa: E402
from dcn_plugin.finetune.classification.losses import NAMED  # noqa: E402
from dcn_plugin.finetune.module import SCHEDULES  # noqa: E402
from dcn_plugin.layers import OffsetConv  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")


@pytest.fixture(autouse=True)
def same_weights():
    """Whatever ran before."""
    torch.manual_seed(0)


MULTI_HOT = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
PLAIN = dict(CLASSIFIER, name="resnet18")
RULES = [
    dict(match="layer[34].0.conv2", layer=dict(type="DCNv2", offset_groups=2)),
    dict(match="layer2.0.conv2", layer=dict(type="DCNv1")),
]
MMENGINE = dict(
    type="dcn_plugin.TimmBackbone", model_name="resnet18_dcn", features_only=False,
    **{key: value for key, value in CLASSIFIER.items() if key != "name"}, num_classes=3,
)  # fmt: skip
WITHOUT_OFFSETS = dict(allow_missing=["*.conv_offset.*", "*.offset_fc.*"])


def start(folder, detects):
    """Weights of the plain model as a file, and how to load them."""
    if detects:
        model = detector(PLAIN_DETECTOR).model
    else:
        model = timm.create_model(PLAIN["name"], num_classes=3, **{k: v for k, v in PLAIN.items() if k != "name"})
    torch.save(model.state_dict(), folder / "start.pth")
    return dict(path=str(folder / "start.pth"), **WITHOUT_OFFSETS)


def exported(folder):
    """A folder of an earlier run."""
    module = classifier()
    export_model(module.model, folder / "earlier", class_names=["a", "b", "c"])
    return dict(name=f"local-dir:{folder / 'earlier'}", pretrained=True)


PLAIN_DETECTOR = dict(
    {key: value for key, value in DETECTOR.items() if key != "roi_pool"},
    backbone=dict(DETECTOR["backbone"], name="resnet18"), roi_pool=dict(type="MultiScaleRoIAlign", output_size=3),
)  # fmt: skip
RFCN = dict(
    {key: value for key, value in DETECTOR.items() if key not in ("roi_pool", "box_head", "fpn_channels")},
    name="rfcn", backbone=dict(CLASSIFIER, output_stride=8), deformable=True, group_size=3, conv_channels=8,
    rpn_anchor_generator=dict(sizes=[[16, 24, 32, 48]]),
)  # fmt: skip

# Arguments of the optimizer and the schedule: ours, and kinds of timm's that keep their state in another way.
OPTIMISATION = {
    "layer_decay, factors": dict(
        optimizer=dict(opt="sgd", lr=1e-3, momentum=0.9, layer_decay=0.5, offset_lr_mult=0.0, roi_offset_lr_mult=0.1)
    ),
    "schedule none": dict(optimizer=dict(offset_lr_mult=0.1), schedule=dict(sched="none")),
}
SCHEDULED = {name: dict(sched=name) for name in SCHEDULES if name != "none"}
SCHEDULED["cosine"] |= dict(warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-6)
SCHEDULED["multistep"] |= dict(decay_milestones=[1], decay_rate=0.5)
SCHEDULED["wsd"] |= dict(decay_epochs=0.5)
SCHEDULED["rsqrt"] |= dict(decay_epochs=0.5, stable_timescale=1)
# name -> arguments of FinetuneModule beside a model of 3 classes (a function of a folder where it needs files)
CLASSIFIERS = {
    "model by name": dict(model="resnet18_dcn", channels=3),
    "model with options": dict(
        model=dict(CLASSIFIER, name="resnet18_dcnv1", dcn_stages=(4, 5), dcn_layer="DCNv1", offset_groups=2)
    ),
    "model with a bound": dict(model=dict(CLASSIFIER, dcn_layer=dict(type="DCNv2", offset_bound=2.0))),
    "model of MMEngine": dict(model=MMENGINE),
    "model of MMEngine, rules": dict(
        model=dict(MMENGINE, model_name="resnet18"),
        rules=[dict(match="*layer4.0.conv2", layer=dict(type="DCNv2"))], channels_last=True,
    ),
    "model of a folder": lambda folder: dict(model=exported(folder)),
    "num_classes in the model": dict(model=dict(CLASSIFIER, num_classes=3), num_classes=None),
    "rules": dict(model=PLAIN, rules=RULES),
    "checkpoint": lambda folder: dict(checkpoint=start(folder, False)),
    "rules, checkpoint": lambda folder: dict(model=PLAIN, rules=RULES, checkpoint=start(folder, False)),
    "channels_last": dict(channels_last=True),
    "channels_last, rules": dict(model=PLAIN, rules=RULES, channels_last=True),
    "label_smoothing": dict(label_smoothing=0.1),
    "mixup": dict(mixup=dict(mixup_alpha=0.4, cutmix_alpha=1.0)),
    "mixup, smoothing, class weights": dict(
        mixup=dict(mixup_alpha=0.4), label_smoothing=0.1, loss=dict(type="cross_entropy", weight=[1, 2, 3])
    ),
    "loss with class weights": dict(loss=dict(type="cross_entropy", weight=torch.tensor([1.0, 2.0, 0.5]))),
    "loss for several labels": dict(loss=dict(type="binary_cross_entropy", pos_weight=2.0)),
    "loss of timm": dict(loss=dict(type="AsymmetricLossMultiLabel")),
    "loss of torch": dict(loss=dict(type="torch.nn.MultiMarginLoss", weight=[1, 2, 3])),
    "multi_label": dict(loss=dict(type="torch.nn.MSELoss"), multi_label=True),
    "optimizer lookahead": dict(optimizer=dict(opt="lookahead_adamw", lr=1e-3)),
    "optimizer with a list": dict(optimizer=dict(opt="lion", lr=1e-4, betas=(0.9, 0.99))),
    **{f"schedule {name}": dict(schedule=options) for name, options in SCHEDULED.items()},
    **OPTIMISATION,
}  # fmt: skip
DETECTORS = {
    "model": dict(),
    "rfcn": dict(model=RFCN),
    "num_classes in the model": dict(model=dict(DETECTOR, num_classes=3), num_classes=None),
    "rules": dict(model=PLAIN_DETECTOR, rules=[dict(match="backbone.body.*layer3*0*conv2", layer=dict(type="DCNv2"))]),
    "checkpoint": lambda folder: dict(checkpoint=start(folder, True)),
    **OPTIMISATION,
}
# name -> options of the trainer; `compile` is done to a stage of the model
TRAINERS = {
    "bf16-mixed": dict(precision="bf16-mixed"),
    "16-mixed": dict(precision="16-mixed"),
    "bf16-true": dict(precision="bf16-true"),
    "64-true": dict(precision="64-true"),
    "EMA": dict(callbacks="EMA"),
    "clipping and accumulation": dict(gradient_clip_val=0.5, accumulate_grad_batches=2),
    "max_steps": dict(max_epochs=None, max_steps=1),
    "compile": dict(compile=True),
}
TOLERANCE = {"bf16-true": dict(rtol=0.05, atol=0.05)}


def outputs(model, images):
    with torch.no_grad():
        found = model(list(images)) if images.ndim == 4 and hasattr(model, "roi_heads") else model(images)
    return [value for image in found for value in image.values()] if isinstance(found, list) else [found]


def whole_way(module, loader, folder, tolerance=None, compile=False, **options):
    """Train, validate, test, predict, save, restore, export and load; the loaded model gives the module's outputs."""
    torch.manual_seed(0)
    if options.get("callbacks") == "EMA":
        options["callbacks"] = [EMAWeightAveraging(decay=0.5)]
    if compile:
        module.model.layer4.compile(backend="eager")
    runner = trainer(folder, **options)
    before = {name: value.clone() for name, value in module.model.state_dict().items() if "num_batches" not in name}
    runner.fit(module, loader, loader)
    after = module.model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    scores = runner.validate(module, loader, verbose=False)[0] | runner.test(module, loader, verbose=False)[0]
    kind = "top1" if "val_top1" in scores else "map"
    assert -1 <= scores[f"val_{kind}"] == scores[f"test_{kind}"] <= 1
    predictions = runner.predict(module, loader)
    assert len(predictions) == len(loader)
    runner.save_checkpoint(folder / "last.ckpt", weights_only=False)
    torch.load(folder / "last.ckpt", weights_only=True)
    module.eval()
    images = next(iter(loader))[0]
    images = torch.stack(images) if isinstance(images, list) else images
    dtype = next(module.model.parameters()).dtype
    truth = outputs(module.model, images.to(dtype))
    close = tolerance or dict(rtol=1e-4, atol=1e-5)
    if not compile:
        again = type(module).restore(folder / "last.ckpt").eval()
        for found, expected in zip(outputs(again.model, images), truth, strict=True):
            torch.testing.assert_close(found, expected.to(found.dtype), **close)
    module.write_folder(folder / "export")
    assert sorted(path.name for path in (folder / "export").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_exported(folder / "export")
    for found, expected in zip(outputs(loaded, images), truth, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), **close)
    assert loaded.class_names == module.class_names
    return loaded


def arguments_of(table, name, folder):
    options = table[name]
    return dict(options(folder) if callable(options) else options)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_options_of_a_classifier(name, tmp_path):
    options = arguments_of(CLASSIFIERS, name, tmp_path)
    channels = options.pop("channels", 1)
    module = classifier(**options)
    loader = image_loader(MULTI_HOT if module.multi_label else None)
    if channels == 3:
        loader.dataset[:] = [(image.expand(3, -1, -1), target) for image, target in loader.dataset]
    loaded = whole_way(module, loader, tmp_path)
    layers = [sum(isinstance(m, OffsetConv) for m in model.modules()) for model in (loaded, module.model)]
    assert layers[0] == layers[1] > 0


@pytest.mark.parametrize("name", DETECTORS)
def test_options_of_a_detector(name, tmp_path):
    whole_way(detector(**arguments_of(DETECTORS, name, tmp_path)), box_loader(count=2), tmp_path)


@pytest.mark.parametrize("name", TRAINERS)
def test_options_of_the_trainer(name, tmp_path):
    whole_way(classifier(), image_loader(), tmp_path, TOLERANCE.get(name), **TRAINERS[name])


@pytest.mark.parametrize("name", ["bf16-mixed", "EMA"])
def test_options_of_the_trainer_with_a_detector(name, tmp_path):
    whole_way(detector(), box_loader(count=2), tmp_path, TOLERANCE.get(name), **TRAINERS[name])


def test_the_table_has_every_argument(tmp_path):
    for module, table in ((FinetuneModule, CLASSIFIERS), (DetectionModule, DETECTORS)):
        given = set().union(*(arguments_of(table, name, tmp_path) for name in table))
        assert set(inspect.signature(module).parameters) <= given, module
    assert set(NAMED) == {"cross_entropy", "binary_cross_entropy"}


# -- what else a model may be like ------------------------------------------------------------------------------------


def test_a_compiled_model_is_exported_under_its_own_names(tmp_path):
    model = classifier().model.eval()
    export_model(torch.compile(model, backend="eager"), tmp_path)
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), model(image))


class Tied(torch.nn.Module):
    """A model in which one layer has two names, and one parameter is a part of another's memory."""

    def __init__(self):
        super().__init__()
        self.first = dcn_plugin.DCNv2(1, 4, 3, padding=1)
        self.second = self.first
        self.fc = torch.nn.Linear(4, 3)
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[2:4])

    def forward(self, x):
        return self.fc(self.second(x).mean((2, 3))) + self.part.sum()


def test_shared_tensors_are_exported(tmp_path):
    from dcn_plugin.registry import MODELS

    if "TiedForTest" not in MODELS:
        MODELS.register_module(name="TiedForTest", module=Tied)
    spec = dict(type="TiedForTest")
    module = FinetuneModule(spec, num_classes=3, channels_last=True)
    whole_way(module, image_loader(), tmp_path)
    tied = timm.create_model("resnet18_dcn", num_classes=3, **{k: v for k, v in CLASSIFIER.items() if k != "name"})
    tied.layer3[0].bn1.weight = tied.layer4[0].bn1.weight
    torch.nn.init.uniform_(tied.layer3[0].bn1.weight)
    export_model(tied, tmp_path / "timm")
    image = torch.rand(1, 1, 32, 32)
    for again in (
        timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval(),
        load_exported(tmp_path / "timm"),
    ):
        assert torch.equal(again(image), tied.eval()(image))


@pytest.mark.parametrize("before", [False, True], ids=["new folder", "over an earlier one"])
def test_a_failed_export_leaves_the_folder_as_it_was(before, tmp_path, monkeypatch):
    model, folder = classifier().model, tmp_path / "export"
    if before:
        export_model(model, folder, class_names=["a", "b", "c"])
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        export_model(classifier().model, folder)
    monkeypatch.undo()
    model.pretrained_cfg["unwritable"] = object()  # fails after the weights
    with pytest.raises(TypeError):
        export_model(model, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    assert folder.exists() == before and not list(tmp_path.rglob(".*"))
