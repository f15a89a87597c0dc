"""A run that sees no data is an error that names the data and what is in it, and writes no model."""

import io
import json
import tarfile

import pytest

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "webdataset", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from classifier_runs import CALLBACKS, DATA, config  # noqa: E402
from PIL import Image  # noqa: E402
from test_freezing import data as batches  # noqa: E402
from test_freezing import subject  # noqa: E402
from tiny import TRAINER  # noqa: E402

from dcn_plugin.finetune import run  # noqa: E402
from dcn_plugin.finetune.streams import describe_shards  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

SPLITS = dict(train_split="train", val_split="val", test_split="test")


def write_shards(root, image=".jpg", label=".cls", only=("train", "val", "test")):
    """Write good shards, but for the splits of `only`, whose members have these extensions (None: no members)."""
    root.mkdir(exist_ok=True)
    for split in SPLITS.values():
        names = (image, label) if split in only else (".jpg", ".cls")
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for i in range(4 if names[0] else 0):
                pixels = io.BytesIO()
                Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(pixels, "JPEG")
                text = json.dumps(dict(label=i % 2)) if names[1] == ".json" else str(i % 2)
                for name, content in zip(names, (pixels.getvalue(), text.encode()), strict=True):
                    member = tarfile.TarInfo(f"{i}{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    splits = {s: dict(name=s, num_samples=4, filenames=[f"{s}-0.tar"], shard_lengths=[4]) for s in SPLITS.values()}
    (root / "_info.json").write_text(json.dumps(dict(splits=splits)))
    return root


def stream(root, **changes):
    data = dict(name="wds/", root=str(root), num_classes=2, batch_size=2, input_size=32, **SPLITS)
    model = dict(name="resnet18_dcn", channels=[8, 8, 8, 8], layers=[1, 1, 1, 1])
    return config(model=model, **{**dict(data=data, trainer=dict(TRAINER, max_epochs=1)), **changes})


@pytest.mark.parametrize(
    ("image", "label", "found"),
    [
        (".jpeg", ".cls", r"4 \.jpeg, 4 \.cls"),
        (".jpg", ".json", r"4 \.jpg, 4 \.json"),
        (".jpg", ".txt", r"4 \.jpg, 4 \.txt"),
        (None, None, r"empty"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_stream_without_samples_stops_the_run_and_names_the_shards(tmp_path, image, label, found, split):
    root = write_shards(tmp_path / "shards", image, label, only=(split,))
    wanted = rf"{split}: expected at least one batch, got none from data set 'wds/' in .*: shard {split}-0.tar "
    wanted += rf"\({found}"
    with pytest.raises(ValueError, match=wanted + r"\)\. timm takes the image of a sample from \.jpg, \.png, \.webp"):
        run(stream(root), tmp_path / "work")
    assert not (tmp_path / "work" / "export").exists()
    assert (tmp_path / "work" / "last.ckpt").exists() == (split == "test")  # what was trained is kept


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_other_tasks_need_samples_too(tmp_path, task):
    good = write_shards(tmp_path / "good")
    best = run(stream(good), tmp_path / "work")["checkpoint"]
    bad = write_shards(tmp_path / "bad", ".jpeg", only=("val", "test"))
    with pytest.raises(ValueError, match=r"expected at least one batch.*4 \.jpeg, 4 \.cls"):
        run(stream(bad), tmp_path / "again", task, best)
    assert not (tmp_path / "again" / "predictions.csv").exists()


def test_names_of_members_can_be_given(tmp_path):
    root = write_shards(tmp_path / "shards", ".jpeg", ".json")
    data = dict(stream(root)["data"], dataset=dict(input_key="jpg;jpeg", target_key="label"))
    results = run(stream(root, data=data), tmp_path / "work")
    assert results["export"] and torch.load(results["checkpoint"], weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    "changes", [dict(max_steps=0), dict(max_epochs=0), dict(limit_train_batches=0)], ids=lambda c: next(iter(c))
)
def test_nothing_is_exported_without_a_step_of_training(tmp_path, changes):
    key = next(iter(changes))
    with pytest.raises(ValueError, match=rf"at least one step of training, got none \(trainer has .*{key}=0"):
        run(config(trainer={**TRAINER, **changes}), tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_finished_run_is_exported_again(tmp_path):
    first = run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path)
    again = run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path, checkpoint="auto")
    assert again["export"] == first["export"] and again["test_top1"] == first["test_top1"]


def test_a_dev_run_takes_a_step_and_exports(tmp_path):
    results = run(config(trainer=dict(TRAINER, fast_dev_run=True)), tmp_path)
    assert results["export"] and "checkpoint" not in results


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_limits_of_zero_leave_nothing_to_say(tmp_path, task):
    best = run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path)["checkpoint"]
    key = f"limit_{task[:3] if task == 'validate' else task}_batches"
    with pytest.raises(ValueError, match=rf"trainer\.{key}: expected batches to run on, got 0"):
        run(config(trainer={**TRAINER, key: 0}), tmp_path / "again", task, best)


def test_validation_and_test_can_be_switched_off(tmp_path):
    callbacks = dict(last=CALLBACKS["last"])
    trainer = dict(TRAINER, max_epochs=1, limit_val_batches=0, limit_test_batches=0)
    results = run(config(trainer=trainer, callbacks=callbacks), tmp_path / "limits")
    assert results["export"] and not any(key.startswith(("val_", "test_")) for key in results)
    data = dict(DATA, val_split=None)
    assert run(config(trainer=dict(TRAINER, max_epochs=1), callbacks=callbacks, data=data), tmp_path / "none")["export"]


class Empty(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("kind", ["classifier", "detector"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("empty", [[], Empty()], ids=["length 0", "no length"])
def test_loaders_of_ones_own_too(kind, split, empty):
    loaders = dict.fromkeys(("train", "val", "test"), batches(kind))
    loaders[split] = torch.utils.data.DataLoader(empty, batch_size=None)
    trainer = pl.Trainer(
        max_steps=2, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = subject(kind)
    if split == "test":
        if empty == []:  # Lightning returns no numbers, which `run` looks at
            assert trainer.test(module, loaders["test"], verbose=False) == []
            return
        with pytest.raises(ValueError, match="test: expected at least one batch, got none from its data loader"):
            trainer.test(module, loaders["test"], verbose=False)
        return
    with pytest.raises(ValueError, match=f"{split}: expected at least one batch, got none from its data loader"):
        trainer.fit(module, loaders["train"], loaders["val"])


def test_shards_that_cannot_be_read_are_named_as_what_they_are(tmp_path):
    (tmp_path / "page.tar").write_text("<html>not found</html>")
    with tarfile.open(tmp_path / "folders.tar", "w") as tar:
        folder = tarfile.TarInfo("a/b.c")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("a/README"))
    said = describe_shards(str(tmp_path), ["page.tar", "folders.tar", "pipe::cat x.tar", "more.tar"])
    assert said.startswith("shards page.tar (does not read as a tar file")
    assert "folders.tar (1 without extension), pipe::cat x.tar (not a local file) and 1 more" in said
    assert describe_shards(str(tmp_path), []) == "no shards"
