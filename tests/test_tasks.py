"""A third task is one TASK and one entry of the table of tasks: nothing else knows which there are."""

import json

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics"):
    pytest.importorskip(_name)
from run_python import run_python  # noqa: E402
from tiny import TRAINER, write_config  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from dcn_plugin import DCNv2  # noqa: E402
from dcn_plugin._config import arguments, storable  # noqa: E402
from dcn_plugin.export import FORMS, register_form  # noqa: E402
from dcn_plugin.finetune import load_config, load_exported, run  # noqa: E402
from dcn_plugin.finetune.data import TunedData  # noqa: E402
from dcn_plugin.finetune.module import TunedModule  # noqa: E402
from dcn_plugin.finetune.run import TASKS, build  # noqa: E402
from dcn_plugin.finetune.task import Task  # noqa: E402
from dcn_plugin.finetune.writer import EpochWriter  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")


class PixelNet(nn.Module):
    """One number for each pixel."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(DCNv2(1, width, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images):
        return self.head(self.body(images))


class PixelModule(TunedModule):
    def __init__(self, model, *, rules=None, checkpoint=None, optimizer=None, schedule=None):
        super().__init__()
        self.save_hyperparameters(storable({k: v for k, v in locals().items() if k in arguments(type(self))}))
        self._configure(optimizer, schedule)
        self.model = PixelNet(**model)
        self._adapt(rules, checkpoint)

    @property
    def backbone(self):
        return self.model.body

    @property
    def logged(self):
        return dict(val=["val_error"])

    def error(self, batch):
        images, target = batch
        return (self.model(images) - target).square().mean()

    def training_step(self, batch, batch_idx):
        return self.error(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_error", self.error(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_error", self.error(batch))

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0]).mean((1, 2, 3))


class PixelData(TunedData):
    """Noise, and the same noise one pixel further."""

    def __init__(self, number: int = 8, *, batch_size: int = 4, eval_batch_size: int | None = None):
        super().__init__(batch_size, eval_batch_size)
        self.number = number
        self.splits = {stage: stage for stage in ("train", "val", "test", "predict")}
        self.keep_arguments(locals())

    def _create(self, stage):
        images = torch.rand(self.number, 1, 8, 8, generator=torch.Generator().manual_seed(len(stage)))
        return TensorDataset(images, images.roll(1, -1))

    def _loader(self, stage):
        size = self.batch_size if stage == "train" else self.eval_batch_size
        return DataLoader(self._dataset(stage), batch_size=size, shuffle=stage == "train")


class PixelWriter(EpochWriter):
    filename = "pixels.json"

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self._path(trainer).write_text(json.dumps(torch.cat(list(predictions)).tolist()))


FORM = register_form(
    "pixels",
    to_spec=lambda model, spec: spec if isinstance(model, PixelNet) else None,
    from_spec=lambda spec: PixelNet(**spec),
)
TASK = Task(PixelModule, PixelData, PixelWriter, FORM)


@pytest.fixture(autouse=True)
def a_third_task(monkeypatch):
    monkeypatch.setitem(TASKS, "PixelModule", TASK)


def config(**changes):
    saver = dict(type="ModelCheckpoint", enable_version_counter=False)
    callbacks = dict(
        best=dict(saver, filename="best", monitor="val_error"), last=dict(saver, filename="last"),
        freeze=dict(type="BackboneFinetuning", unfreeze_backbone_at_epoch=1),
        offsets=dict(type="OffsetMonitor", every_n_steps=1), pixels=dict(type="PixelWriter"),
    )  # fmt: skip
    base = dict(module="PixelModule", model=dict(width=4), data=dict(number=8), callbacks=callbacks, seed=0)
    return base | dict(trainer=TRAINER, logger=dict(type="CSVLogger"), optimizer=dict(lr=0.1)) | changes


def test_it_is_configured_trained_evaluated_predicted_exported_and_loaded_again(tmp_path):
    values = load_config(write_config(tmp_path / "pixels.py", **config()), {"trainer.max_epochs": 3})
    fitted = run(values, tmp_path / "work")
    module = PixelModule.restore(fitted["checkpoint"]).eval()
    images, target = PixelData()._dataset("test")[:]
    assert fitted["test_error"] == pytest.approx((module.model(images) - target).square().mean().item(), rel=1e-5)
    again = run(values, tmp_path / "work", "validate", fitted["checkpoint"])
    assert again["val_error"] == pytest.approx(fitted["val_error"])
    predicted = run(values, tmp_path / "work", "predict", fitted["checkpoint"])["predictions"]
    assert predicted == str(tmp_path / "work" / "pixels.json")
    images = PixelData()._dataset("predict")[:][0]
    found = torch.tensor(json.loads((tmp_path / "work" / "pixels.json").read_text()))
    torch.testing.assert_close(found, module.model(images).mean((1, 2, 3)))
    loaded = load_exported(fitted["export"])
    assert isinstance(loaded, PixelNet) and torch.equal(loaded(images), module.model(images))
    saved = json.loads((tmp_path / "work" / "export" / "config.json").read_text())
    assert saved["dcn_plugin"] == {"pixels": {"width": 4}} and saved["model_type"] == "dcn_plugin"
    # The offsets were watched, and trained once the backbone was free.
    header = next((tmp_path / "work").rglob("metrics.csv")).read_text().splitlines()[0]
    assert "offset/body.0/max" in header and loaded.body[0].conv_offset.weight.any()
    on = run({**values, "trainer": dict(TRAINER, max_epochs=4)}, tmp_path / "work", "fit", "auto")
    assert torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)["epoch"] == 3 and "test_error" in on


def test_rules_change_its_model_too(tmp_path):
    rules = [dict(match="head", layer=dict(type="DCNv1"))]
    _, module, _ = build(config(rules=rules), tmp_path)
    nn.init.normal_(module.model.head.conv_offset.weight)
    images = torch.rand(2, 1, 8, 8)
    loaded = load_exported(module.write_folder(tmp_path / "folder"))
    assert torch.equal(loaded(images), module.model.eval()(images))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(data=dict(numbre=8)), "data: unknown key 'numbre' .did you mean 'number'"),
        (dict(num_classes=3), "config: unknown key 'num_classes'"),
        (dict(data=dict(batch_size=0)), "batch_size: expected at least 1, got 0"),
        (dict(data=dict(batch_size="4")), "data.batch_size: expected a number, got '4'"),
    ],
)
def test_its_mistakes_are_named(tmp_path, changes, said):
    with pytest.raises((ValueError, TypeError), match=said):
        run(config(**changes), tmp_path)


def test_exporting_and_loading_need_no_lightning(tmp_path):
    """And know the form of every task of ours, whose folders load without fine-tuning."""
    code = f"""
import sys
sys.modules["pytorch_lightning"] = sys.modules["lightning"] = sys.modules["torchmetrics"] = None
import timm, torch, dcn_plugin
from dcn_plugin.export import FORMS, export_model, load_exported
model = timm.create_model("resnet18_dcn", channels=(8, 8, 8, 8), num_classes=2).eval()
image = torch.rand(1, 3, 32, 32)
assert torch.equal(load_exported(export_model(model, {str(tmp_path)!r}))(image), model(image))
print(*FORMS)
"""
    known = run_python(code).split()
    for name, task in TASKS.items():
        if task is not TASK and task.form is not None:
            assert task.form.key in known, f"{name}: register its form in dcn_plugin/export/forms.py"
    assert set(FORMS) - set(known) == {"pixels"}
