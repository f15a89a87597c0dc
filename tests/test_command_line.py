"""The scripts' options, and their errors: one line where the user can mend it, a traceback where we have to."""

import base64
import csv
import importlib
import io
import json
import re

import numpy as np
import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
from classifier_runs import CALLBACKS, DATA, MODEL, config  # noqa: E402
from mmengine.config import DictAction  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import export_model, load_config, run  # noqa: E402
from dcn_plugin.finetune.command_line import errors_in_one_line, parse_options  # noqa: E402
from dcn_plugin.models.build import build_model  # noqa: E402
from dcn_plugin.segmentation import build_segmenter  # noqa: E402


def value(text):
    return parse_options([f"key={text}"])["key"]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    "3 -3 +5 1.5 -.5 1e-3 inf true False None abc 32-true bf16-mixed a=b [1,2] (1,2) 1,2,3 [] () a, [1] (a) 'abc' "
    "\"abc\" \"[a,b]\" [a,b,[c,1]] [(1,2),(3,4)] [(a,b),c] 'a','b' ['a',\"b\"] [None,true,1.5] it's C:\\temp\\new "
    "/data/x resnet50_dcn.a1_in1k 0 0.0".split(),
)
def test_values_without_spaces_are_what_mmengine_makes_of_them(text):
    wanted = DictAction._parse_iterable(text)
    assert value(text) == wanted and type(value(text)) is type(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("../my data", "../my data"),
        ("/a  b /c", "/a  b /c"),
        ("", ""),
        ("(old) photos", "(old) photos"),
        ("photos (1)/x", "photos (1)/x"),
        ("[a b, c]", ["a b", "c"]),
        ("[1, 2]", [1, 2]),
        ("a b,c d", ["a b", "c d"]),
        (" 3", 3),
        ("'Smith, John'", "Smith, John"),
        ("'3'", "3"),
        ("['a, b', c]", ["a, b", "c"]),
        ("2024_01", "2024_01"),  # a folder; int() takes it
        ("007", "007"),
        ("(1,2),(3,4)", [(1, 2), (3, 4)]),
        ("dict(name=resnet18_dcn, channels=[8, 8])", dict(name="resnet18_dcn", channels=[8, 8])),
        ("dict(a=dict(b=None, c=true), d=-1.5, e=('x y', 2))", dict(a=dict(b=None, c=True), d=-1.5, e=("x y", 2))),
        ("{'a': 1, 'b': [True]}", dict(a=1, b=[True])),
        ("{}", {}),
        *(
            (text, text)
            for text in ("{epoch}", "{epoch:02d}", "{epoch}-{val_top1:.3f}", "{000..123}.tar", "{step} of {n}")
        ),
        ("[{epoch},{'k': 1}]", ["{epoch}", dict(k=1)]),
        ("[dict(match='a.*, b', layer=dict(type='DCNv2'))]", [dict(match="a.*, b", layer=dict(type="DCNv2"))]),
    ],
)
def test_strings_are_kept_and_dicts_are_read(text, wanted):
    assert value(text) == wanted and type(value(text)) is type(wanted)


@pytest.mark.parametrize(
    "text",
    ["[1,2", "(old", "a)b,c", "dict(a=1", "dict(a=f(2))", "dict(1)", "dict(**x)", "{'a'", "{**{}}", "['a]", "[1)"],
)
def test_what_does_not_parse_is_named(text):
    with pytest.raises(ValueError, match="--cfg-options: expected a value that parses, got 'key=|got \"key=") as caught:
        value(text)
    assert repr(f"key={text}") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["abc", "=3", ".a=3", "a.=3", "a..b=3", " =3"])
def test_an_option_without_key_or_value_is_named(option):
    with pytest.raises(ValueError, match="expected KEY=VALUE, got"):
        parse_options([option])


def test_no_options():
    assert parse_options(None) == {} and parse_options(["a.b=1", "c=x=y", "a.b=2"]) == {"a.b": 2, "c": "x=y"}


# -- the scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    text = "".join(f"{key} = {item!r}\n" for key, item in config(trainer=dict(TRAINER, max_epochs=1)).items())
    (tmp_path / "config.py").write_text(text)
    return tmp_path / "config.py"


def folder(root, splits=("train", "val")):
    for split in splits:
        for i, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                Image.new("L", (32, 32), 90 * i + 40 * k).save(root / split / name / f"{k}.png")
    return root


def test_folders_with_spaces_train_and_predict(tmp_path, path, script, monkeypatch):
    folder(tmp_path / "my data")
    photos = tmp_path / "my photos"
    photos.mkdir()
    Image.new("L", (32, 32), 9).save(photos / "a photo.png")
    monkeypatch.chdir(tmp_path / "my data")
    data = ["data.name=", "data.val_split=val", "data.test_split=None", "data.dataset=None", "data.batch_size=2"]
    work = ["--work-dir", tmp_path / "my work"]
    status, out = script("finetune.py", path, *work, "--cfg-options", "data.root=../my data", *data)
    assert status == 0 and "my work/export" in out
    predict = [f"data.root={photos}", "data.predict_split=", "num_classes=2"]
    status, out = script("finetune.py", path, "--task", "predict", *work, "--cfg-options", *data, *predict)
    assert status == 0
    with open(tmp_path / "my work" / "predictions.csv") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a photo.png"]


def test_a_dict_can_be_an_option(path, script, tmp_path):
    rules = "rules=[dict(match='layer1.*.conv1', layer=dict(type='DCNv1'))]"
    model = "model=dict(_delete_=True, name=resnet18, in_chans=1, channels=[8,8,8,8], layers=[1,1,1,1])"
    status, _ = script("finetune.py", path, "--work-dir", tmp_path / "work", "--cfg-options", model, rules)
    assert status == 0
    saved = json.loads((tmp_path / "work" / "export" / "config.json").read_text())
    assert saved["architecture"] == "resnet18" and "DCNv1" in json.dumps(saved)
    merged = load_config(path, parse_options(["model=dict(offset_groups=2)"]))["model"]
    assert merged == {**MODEL, "offset_groups": 2}  # as `_base_` merges


OPTIONS = {
    "data.batch_size=abc": "data.batch_size: expected a number, got 'abc'",
    "data.batch_size=0": "batch_size: expected at least 1, got 0",
    "data.name=5": "data: ",
    "data=5": "data: expected a dict",
    "data.name=nothing": "unknown data set name 'nothing'",
    "data.dataset.limit=x": "data.dataset.limit: expected a number, got 'x'",
    "data.val_split=nothing": "nothing",
    "data.splits.x=1": "unknown key 'splits'",
    "model=5": "model: expected a timm name",
    "model=dict(nam=x)": "model: ",
    "model.name=resnet18_dcm": "expected a timm model, got 'resnet18_dcm'",
    "model.name.x=1": "options",
    "model.layers=abc": "model: expected arguments that resnet18_dcn takes",
    "model.in_chans=3": "input_size: expected (3, height, width)",
    "modell=5": "unknown key 'modell' (did you mean 'model'?)",
    "num_classes=7": "num_classes: expected the model's 7 classes, got 10 of the data",
    "num_classes=abc": "num_classes: expected a number, got 'abc'",
    "rules=5": "rules",
    "checkpoint=nowhere.pth": "nowhere.pth",
    "mixup.mixup_alpha=x": "mixup.mixup_alpha: expected a number, got 'x'",
    "optimizer.opt=nothing": "optimizer: ",
    "optimizer.lr=abc": "optimizer: ",
    "optimizer=5": "optimizer: expected a dict, got int 5",
    "optimizer.offset_lr_mult=x": "config: ",
    "schedule.sched=nothing": "schedule.sched: expected one of",
    "schedule.warmup_epochs=x": "schedule.warmup_epochs: expected a number, got 'x'",
    "schedule=dict(sched=step, decay_epochs=0)": "schedule: ",
    "seed=abc": "seed: ",
    "trainer=5": "trainer: expected a dict",
    "trainer.max_epochs=-5": "max_epochs",
    "trainer.max_epochs=x": "trainer.max_epochs: expected a number, got 'x'",
    "trainer.max_epochs=-1": "schedule: expected an end",
    "trainer.max_steps=0": "expected at least one step of training",
    "trainer.precision=half": "half",
    "trainer.accelerator=abacus": "abacus",
    "trainer.strategy=nothing": "nothing",
    "trainer.strategy=dict(type=nothing)": "unknown type 'nothing'",
    "trainer.profiler=nothing": "profiler",
    "trainer.limit_val_batches=-1": "limit_val_batches",
    "trainer.gradient_clip_algorithm=nothing": "nothing",
    "trainer.nothing=1": "unknown key 'nothing'",
    "callbacks=5": "callbacks: expected a dict",
    "callbacks.best=7": "unknown type 7",
    "callbacks.best.mode=nothing": "nothing",
    "callbacks.best.monitor=nothing": "nothing",
    "callbacks.stop=dict(type=EarlyStopping, monitor=nothing)": "nothing",
    "callbacks.stop=dict(type=EarlyStopping)": "callbacks.stop: ",
    "callbacks.freeze=dict(type=BackboneFinetuning, unfreeze_backbone_at_epoch=-1)": "expected 0 or more, got -1",
    "logger=5": "logger: expected dict(type=...",
    "logger=dict(_delete_=True, type=nothing)": "unknown type 'nothing'",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_cannot_be_right_are_one_line(path, script, tmp_path, option):
    said, _ = script("finetune.py", path, "--work-dir", tmp_path / "work", "--cfg-options", option)
    assert isinstance(said, str) and "\n" not in said, said  # printed by Python, with exit status 1
    assert OPTIONS[option] in said
    assert not (tmp_path / "work" / "export").exists()


def test_files_that_cannot_be_right_are_one_line(path, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syntax.py").write_text("model = dict(\n")
    (tmp_path / "name.py").write_text("model = nothing\n")
    (tmp_path / "base.py").write_text("_base_ = 'nothing.py'\n")
    (tmp_path / "a_file").write_text("")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "page.ckpt").write_text("<html>")
    other = run(config(trainer=dict(TRAINER, max_epochs=1), model=dict(MODEL, channels=[8, 8, 8, 8])), "other")
    for arguments, wanted in {
        ("nowhere.py",): "config: expected a file, got 'nowhere.py'",
        ("syntax.py",): "config: syntax.py does not load: SyntaxError",
        ("name.py",): "config: name.py does not load: NameError",
        ("base.py",): "config: base.py does not load",
        (path, "--cfg-options", "x"): "--cfg-options: expected KEY=VALUE, got 'x'",
        (path, "--task", "predict"): "checkpoint: expected one for predict",
        (path, "--task", "test"): "checkpoint: expected one for test",
        (path, "--task", "test", "--checkpoint", "nowhere.ckpt"): "checkpoint: expected a file, got 'nowhere.ckpt'",
        (path, "--task", "test", "--checkpoint", "page.ckpt"): "page.ckpt",
        (path, "--task", "test", "--checkpoint", "weights.pth"): "got 'weights.pth' with 'fc.weight'",
        (path, "--task", "test", "--checkpoint", other["checkpoint"]): "has shape (8, 8, 3, 3), the model shape (16,",
        (path, "--resume", other["checkpoint"]): "expected the weights of the config's model",
        (path, "--work-dir", "a_file"): "a_file",
    }.items():
        said, _ = script("finetune.py", *arguments)
        assert isinstance(said, str) and "\n" not in said and wanted in said, (arguments, said)


def test_a_resumed_run_with_another_optimizer_is_one_line(path, script, tmp_path):
    work = ["--work-dir", tmp_path / "work"]
    assert script("finetune.py", path, *work)[0] == 0
    options = ["--cfg-options", "trainer.max_epochs=2", "optimizer.layer_decay=0.7"]
    said, _ = script("finetune.py", path, *work, "--resume", *options)
    assert "checkpoint: the optimizer of the config" in said and "\n" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_one_line_from_a_worker_too(path, script, tmp_path, workers):
    root = folder(tmp_path / "data")
    (root / "train" / "a" / "0.png").write_bytes(b"not an image")
    options = ["data.name=", "data.test_split=None", "data.dataset=None", "data.batch_size=4", f"data.root={root}"]
    options += ["num_classes=2", f"data.num_workers={workers}", "data.val_split=val"]
    said, _ = script("finetune.py", path, "--work-dir", tmp_path / "work", "--cfg-options", *options)
    assert (
        isinstance(said, str) and "\n" not in said and "UnreadableImage: unreadable image" in said and "0.png" in said
    )


def test_the_studies_too(script, tmp_path):
    for name in ("digits", "detection", "video", "warps", "dilation"):
        for arguments, wanted in {
            ("--cfg-options", "x"): "expected KEY=VALUE, got 'x'",
            ("--cfg-options", "modell=1"): "unknown key 'modell'",
            ("--cfg-options", "a=[1"): "expected a value that parses",
            ("--seeds", "1", "1"): "seeds: expected each once",
        }.items():
            said, _ = script(f"{name}_study.py", "--work-dir", tmp_path, *arguments)
            assert isinstance(said, str) and "\n" not in said and wanted in said, said


def test_the_exporter_too(script, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, wanted in {
        ("resnet18_dcm",): "resnet18_dcm",
        (tmp_path / "empty",): "expected an exported model",
        ("resnet18_dcn", "--image-size", "0"): "--image-size: expected one or two positive numbers, got [0]",
        ("resnet18_dcn", "--opset", "5"): "opset",
        ("resnet18_dcn", "--tolerance", "-1"): "--tolerance: expected a positive number, got -1.0",
    }.items():
        said, _ = script("export.py", *arguments, "--out", tmp_path / "x" / "model.onnx")
        assert isinstance(said, str) and "\n" not in said, said
        assert said.startswith("nothing written: ") and wanted in said, said


def test_the_explorer_too(script, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (10, 200, 30)).save(photo)
    small = ("--image-size", "32")
    for arguments, wanted in {
        ("resnet18_dcm", photo): "expected a timm model, got 'resnet18_dcm'",
        ("resnet18_dcn", tmp_path / "none.png"): "unreadable image",
        ("resnet18_dcn", photo, "--image-size", "0"): "--image-size: expected one or two positive numbers, got [0]",
        ("resnet18_dcn", photo, *small, "--layers", "0"): "layers: expected at least 1 layer, got 0",
        ("resnet18_dcn", photo, *small, "--layers", "x"): "layers: expected deformable layers out of layer2.0.conv2",
        ("resnet18_dcn", photo, *small, "--checkpoint", tmp_path / "none.pth"): "expected a checkpoint file",
        ("resnet18_dcn", photo, *small, "--limit-mb", "0.01"): "limit_mb: expected at least",
        (tmp_path, photo, "--pretrained"): "--pretrained: expected a timm name, got a folder",
        ("resnet18", photo, *small): "expected deformable convolutions inside",
    }.items():
        said, _ = script("explore.py", *arguments, "--out", tmp_path / "page.html")
        assert isinstance(said, str) and "\n" not in said and wanted in said, said
    assert not (tmp_path / "page.html").exists()


def test_the_explorer_shows_what_a_folder_holds(script, tmp_path):
    """Prepared as the model was trained, grey here, and drawn as it was before; weights of a file take their place."""
    model = build_model(MODEL, num_classes=2)
    config = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation="bilinear")
    export_model(model, tmp_path / "folder", data_config=config)
    torch.nn.init.constant_(model.layer3[0].conv2.conv_offset.bias, 0.75)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    photo, page = tmp_path / "<b>.png", tmp_path / "page.html"
    Image.linear_gradient("L").resize((32, 32)).save(photo)
    arguments = ("--out", page, "--layers", "layer3.0.conv2", "--checkpoint", tmp_path / "weights.pth")
    status, out = script("explore.py", tmp_path / "folder", photo, *arguments)
    assert status == 0 and f"{page}: 0.0 MB" in out
    text = page.read_text()
    assert "<title>folder on &lt;b&gt;.png</title>" in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    (layer,) = data["layers"]
    values = np.frombuffer(base64.b64decode(layer["offset"]["data"]), "<i2") * layer["offset"]["step"]
    assert layer["name"] == "layer3.0.conv2" and (values == 0.75).all()
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["picture"].partition(",")[2]))).convert("L"), int)
    wanted = np.asarray(Image.open(photo), float)
    wanted = (
        (wanted - wanted.min()) / np.ptp(wanted) * 255
    )  # a picture is drawn from its darkest to its brightest value
    assert drawn.shape == (32, 32) and np.abs(drawn - wanted).max() <= 1


@pytest.fixture
def seen(monkeypatch):
    """What the explorer hands on, in place of a page."""
    found = {}

    def keep(model, image, path, layers, picture, **options):
        found.update(model=model, image=image, picture=picture)
        path.touch()

    monkeypatch.setattr("dcn_plugin.visualize.explore", keep)
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_the_explorer_gives_a_segmenter_what_it_normalises_itself(script, seen, tmp_path, channels):
    spec = dict(name="fcn", num_classes=2, backbone=dict(MODEL, in_chans=channels))
    export_model(build_segmenter(spec), tmp_path / "folder", spec=spec)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 33, 3), np.uint8)[..., :channels]
    Image.fromarray(pixels.squeeze()).save(tmp_path / "photo.png")
    arguments = ("explore.py", tmp_path / "folder", tmp_path / "photo.png", "--out", tmp_path / "page.html")
    assert script(*arguments)[0] == 0
    torch.testing.assert_close(torch.Tensor(seen["image"]), torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert torch.equal(seen["picture"], seen["image"]) and seen["model"](seen["image"][None])["out"].shape[-1] == 33
    assert script(*arguments, "--image-size", "32", "48")[0] == 0 and seen["image"].shape == (channels, 32, 48)


def test_the_explorer_takes_weights_for_any_number_of_classes(script, seen, tmp_path):
    """And a grey model that says nothing of its images."""
    export_model(build_model(MODEL, num_classes=2), tmp_path / "folder")
    model = build_model(MODEL, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "photo.png")
    arguments = (tmp_path / "folder", tmp_path / "photo.png", "--out", tmp_path / "page.html")
    assert script("explore.py", *arguments, "--checkpoint", tmp_path / "weights.pth")[0] == 0
    assert torch.equal(seen["model"].layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    assert seen["image"].shape == (1, 224, 224)


@pytest.mark.parametrize("error", [IndexError, KeyError, AttributeError, AssertionError, ValueError, TypeError])
def test_a_bug_keeps_its_traceback(path, script, tmp_path, monkeypatch, error):
    def broken(*arguments, **options):
        raise error("of no argument")  # raised in this file, not by a statement of the package

    monkeypatch.setattr(importlib.import_module("dcn_plugin.finetune.module"), "export_model", broken)
    with pytest.raises(error, match="of no argument"):
        script("finetune.py", path, "--work-dir", tmp_path / "work")


def test_what_the_system_says_is_one_line():
    full, memory = OSError(28, "No space left", "a/b"), torch.OutOfMemoryError("CUDA out of memory.\n Tried")
    for error in (full, memory, ImportError("x")):
        with pytest.raises(SystemExit) as caught, errors_in_one_line("before: "):
            raise error
        assert caught.value.code.startswith(f"before: {type(error).__name__}: ") and "\n" not in caught.value.code


def test_best_is_what_the_other_tasks_take(path, script, tmp_path):
    assert script("finetune.py", path, "--work-dir", tmp_path)[0] == 0
    status, out = script("finetune.py", path, "--work-dir", tmp_path, "--task", "validate")
    assert status == 0 and "val_top1" in out
    assert CALLBACKS["best"]["filename"] == "best" and DATA["val_split"] == "val"
