"""Class names are compared by name and in order wherever a trained classifier meets data."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn"):
    pytest.importorskip(_name)
from PIL import Image  # noqa: E402
from tiny import CLASSIFIER, TRAINER, classifier, detector, trainer  # noqa: E402

from dcn_plugin._config import as_names  # noqa: E402
from dcn_plugin.finetune import FinetuneModule, ImageDataModule, export_model, load_exported, run  # noqa: E402
from dcn_plugin.finetune.classes import names_in  # noqa: E402
from dcn_plugin.finetune.run import quiet  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

NAMES = ["ant", "bee", "cat"]
CALLBACKS = dict(last=dict(type="ModelCheckpoint", filename="last", enable_version_counter=False))


def write(root, names=NAMES):
    for split in ("train", "val"):
        for i, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                Image.fromarray(np.full((32, 32), 40 * i + 10 * k, np.uint8)).save(root / split / name / f"{k}.png")
    return root


def config(root, epochs=1, **changes):
    data = dict(root=str(root), batch_size=2, input_size=[1, 32, 32], mean=[0.5], std=[0.5], augment=dict(no_aug=True))
    base = dict(
        model=CLASSIFIER, data=data, callbacks=CALLBACKS, trainer=dict(TRAINER, max_epochs=epochs), logger=False
    )
    return base | dict(seed=0) | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on ant, bee and cat."""
    folder = tmp_path_factory.mktemp("trained")
    with quiet():
        return dict(run(config(write(folder / "data")), folder / "work"), data=folder / "data")


# The same pictures: one class spelt otherwise, and so in another place; or two exchanged.
OTHERS = {
    "order": (["bee", "cat", "dog"], "class 0 is 'ant' {} and 'bee' in the data"),
    "spelling": (["ant", "bees", "cat"], "class 1 is 'bee' {} and 'bees' in the data"),
}


@pytest.fixture(params=OTHERS)
def other(request, tmp_path):
    names, said = OTHERS[request.param]
    return write(tmp_path / "other", names), said


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_is_refused_where_its_classes_have_other_names(trained, other, task, tmp_path):
    root, said = other
    where = "in the checkpoint" if task == "fit" else "in what the model was trained on"
    with pytest.raises(ValueError, match="class_names: " + said.format(where)):
        run(config(root, epochs=2), tmp_path / "work", task, trained["checkpoint"])
    assert not (tmp_path / "work" / "export").exists()


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_goes_on_with_the_same_classes(trained, task, tmp_path):
    results = run(config(trained["data"], epochs=2), tmp_path, task, trained["checkpoint"])
    if task == "predict":
        with open(results["predictions"]) as file:
            assert {row["class"] for row in csv.DictReader(file)} <= set(NAMES)


@pytest.mark.parametrize("task", ["fit", "validate", "test"])
def test_an_exported_folder_is_refused_where_its_classes_have_other_names(trained, other, task, tmp_path):
    root, said = other
    model = dict(name=f"local-dir:{trained['export']}", pretrained=True)
    with pytest.raises(ValueError, match="class_names: " + said.format("in what the model was trained on")):
        run(config(root, model=model), tmp_path / "work", task)
    results = run(config(trained["data"], model=model), tmp_path / "same", task)
    assert 0 <= results["val_top1" if task == "validate" else "test_top1"] <= 1


def test_an_exported_folder_with_another_number_of_classes_starts_a_new_classifier(trained, tmp_path):
    model = dict(name=f"local-dir:{trained['export']}", pretrained=True)
    results = run(config(write(tmp_path / "four", [*"abcd"]), model=model), tmp_path / "work")
    assert load_exported(results["export"]).class_names == [*"abcd"]


@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_weights_to_start_from_may_know_other_classes_but_say_so(trained, other, source, tmp_path):
    root, said = other
    path = trained["checkpoint"] if source == "checkpoint" else f"{trained['export']}/model.safetensors"
    with pytest.warns(UserWarning, match="class_names: " + said.format("in .*") + ": the classifier goes on"):
        results = run(config(root, checkpoint=path), tmp_path / "work")
    assert load_exported(results["export"]).class_names == sorted(path.name for path in (root / "train").iterdir())
    for task in ("validate", "test"):  # without training there is no way in which that is meant
        with pytest.raises(ValueError, match="class_names: " + said.format("in .*")):
            run(config(root, checkpoint=path), tmp_path / task, task)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*class_names.*")
        run(config(trained["data"], checkpoint=path), tmp_path / "same")
        # A classifier of its own: the names say nothing about it.
        four = dict(path=path, allow_mismatched="fc.*")
        run(config(write(tmp_path / "four", [*"abcd"]), checkpoint=four), tmp_path / "fresh")


def test_a_module_meets_other_data_in_python(trained, other):
    root, said = other
    module = FinetuneModule.restore(trained["checkpoint"])
    data = ImageDataModule(root=str(root), batch_size=2, input_size=(1, 32, 32))
    with pytest.raises(ValueError, match=said.format("in what the model was trained on")):
        trainer().test(module, data, verbose=False)
    module.class_names = None  # it is meant
    trainer().test(module, data, verbose=False)


def test_prediction_needs_no_training_split_and_has_the_names_of_the_weights(trained, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "photos" / "x.png")
    settings = config(tmp_path / "photos", num_classes=3)
    settings["data"] |= dict(predict_split="")
    for changes, checkpoint in (
        (dict(), trained["checkpoint"]),
        (dict(checkpoint=trained["checkpoint"]), None),
        (dict(model=dict(name=f"local-dir:{trained['export']}", pretrained=True)), None),
    ):
        path = run(settings | changes, tmp_path / "work", "predict", checkpoint)["predictions"]
        with open(path) as file:
            (row,) = csv.DictReader(file)
        assert row["class"] == NAMES[int(row["label"])] and row["file"] == "x.png"


def test_a_stream_without_names_keeps_those_of_the_checkpoint(trained):
    module = FinetuneModule.restore(trained["checkpoint"])
    images = torch.rand(2, 1, 32, 32)
    loader = torch.utils.data.DataLoader([(image, 0) for image in images], batch_size=2)
    trainer().test(module, loader, verbose=False)
    assert module.class_names == NAMES


def test_loaded_models_know_their_classes(trained, tmp_path):
    assert (
        load_exported(trained["export"]).class_names == NAMES and load_exported(trained["export"]).category_ids is None
    )
    module = detector()
    export_model(module.model, tmp_path / "boxes", spec=module.spec, class_names=["car", "tree"], category_ids=[3, 17])
    again = load_exported(tmp_path / "boxes")
    assert again.class_names == ["car", "tree"] and again.category_ids == [3, 17]
    spec = dict(type="dcn_plugin.DCNv2", in_channels=1, out_channels=2, kernel_size=1)
    export_model(classifier(spec, num_classes=2).model, tmp_path / "mmengine", spec=spec, class_names=["a", "b"])
    assert load_exported(tmp_path / "mmengine").class_names == ["a", "b"]
    export_model(module.model, tmp_path / "nameless", spec=module.spec)
    assert load_exported(tmp_path / "nameless").class_names is None


def test_names_in_files(tmp_path):
    assert as_names({"1": "b", "0": "a"}) == ["a", "b"] and as_names({"5": "a"}) is None and as_names(None) is None
    torch.save(dict(weight=torch.zeros(1)), tmp_path / "weights.pth")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert names_in(tmp_path / "weights.pth") is None and names_in(tmp_path / "x.safetensors") is None
    (tmp_path / "config.json").write_text(json.dumps(dict(label_names=["a"])))
    assert names_in(tmp_path / "x.safetensors") == ["a"]
    torch.save(dict(weight=torch.zeros(1)), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert names_in(tmp_path / "old.pth") is None
