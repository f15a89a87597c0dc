"""Lightning's search for a learning rate works on both modules, and what it finds is used."""

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "pycocotools"):
    pytest.importorskip(_name)
import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.callbacks import LearningRateFinder  # noqa: E402
from pytorch_lightning.tuner import Tuner  # noqa: E402
from tiny import box_loader, classifier, detector, image_loader, trainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_words")

OPTIMIZER = dict(opt="sgd", lr=0.5, offset_lr_mult=0.1, layer_decay=0.5)
KINDS = {"classifier": (classifier, image_loader), "detector": (detector, box_loader)}
SEARCH = dict(min_lr=1e-5, max_lr=1e-2, early_stop_threshold=None)


@pytest.fixture(params=KINDS)
def kind(request):
    torch.manual_seed(0)
    return KINDS[request.param]


class Watch(pl.Callback):
    """The learning rate of every group and its factor, in every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])


def watched(module):
    """The same where Lightning has taken all callbacks away, as it does while it searches."""
    watch = Watch()
    module.on_before_optimizer_step = lambda optimizer: watch.on_before_optimizer_step(None, module, optimizer)
    return watch


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("pytorch_lightning.tuner.lr_finder._LRFinder.suggestion", lambda *args, **kwargs: 0.003)


def test_tuner_finds_a_rate_which_the_next_run_uses(kind, tmp_path):
    make, loader = kind
    module = make(optimizer=OPTIMIZER, schedule=dict(sched="cosine", warmup_epochs=1, warmup_lr=1e-4))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    watch = watched(module)
    finder = Tuner(trainer(tmp_path)).lr_find(module, loader(count=8), num_training=4, **SEARCH)
    rates = finder.results["lr"]
    assert rates[0] == 1e-5 and rates[-1] > 1e-3 and len(watch.seen) == len(rates) >= 4
    for rate, groups in zip(rates, watch.seen, strict=True):
        assert len({scale for _, scale in groups}) > 3  # layer decay and the offsets' factor
        assert [lr for lr, _ in groups] == pytest.approx([rate * scale for _, scale in groups])
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert module.lr == 0.003 and module.hparams["optimizer"] == {**OPTIMIZER, "lr": 0.003}
    watch.seen.clear()
    trainer(tmp_path, max_epochs=2).fit(module, loader())
    assert [groups[0][0] for groups in watch.seen[:2]] == pytest.approx(
        [scale * groups[0][1] for scale, groups in zip((1e-4, (1e-4 + 0.003) / 2), watch.seen[:2], strict=True)]
    )


@pytest.mark.parametrize("sched", ["none", "cosine"])
def test_callback_finds_a_rate_which_the_same_run_uses(kind, sched, tmp_path):
    make, loader = kind
    module = make(optimizer=OPTIMIZER, schedule=dict(sched=sched))
    watch = Watch()
    runner = trainer(tmp_path, callbacks=[LearningRateFinder(num_training_steps=2, **SEARCH), watch])
    runner.fit(module, loader())
    assert len(watch.seen) == 2
    for (first, scale), (second, _) in zip(*watch.seen, strict=True):
        assert first == pytest.approx(0.003 * scale)
        # Half a period of the cosine over the run's two steps.
        assert second == pytest.approx(first if sched == "none" else first / 2, rel=0.01)
    runner.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["lr"] == 0.003
    again = type(module).restore(tmp_path / "after.ckpt")
    assert again.lr == 0.003


def test_a_later_search_of_a_running_training_goes_on_in_its_schedule(tmp_path):
    """As Lightning's documents show it: a search at the start of chosen epochs."""

    class Later(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    watch = Watch()
    module = classifier(optimizer=OPTIMIZER, schedule=dict(sched="cosine", min_lr=0.0))
    later = Later(num_training_steps=2, **SEARCH)
    trainer(tmp_path, max_epochs=2, callbacks=[later, watch]).fit(module, image_loader())
    rates = [groups[0][0] / groups[0][1] for groups in watch.seen]
    truth = [0.5, 0.5 * 0.8535534, 0.003 * 0.5, 0.003 * 0.1464466]
    assert rates == pytest.approx(truth, rel=1e-4)


def test_setting_the_rate_by_hand(kind):
    make, _ = kind
    module = make(optimizer=dict(opt="sgd", lr=0.5))
    assert module.lr == 0.5 and make().lr == 1e-3
    given = module.hparams["optimizer"]
    module.lr = 0.25
    assert module.optimizer_args["lr"] == 0.25 and module.hparams["optimizer"]["lr"] == 0.25 and given["lr"] == 0.5
    with pytest.raises(ValueError, match="lr: expected a positive number, got nan"):
        module.lr = float("nan")
