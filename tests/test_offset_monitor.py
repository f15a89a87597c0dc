"""OffsetMonitor reports every call of a step: shared layers, keywords, offsets from elsewhere, accumulated batches."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")
pytest.importorskip("torchvision")

from dcn_plugin.finetune import OffsetMonitor  # noqa: E402
from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d, DeformPSRoIPool, DeformRoIPoolPack  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`|isinstance.treespec)")
FULL = "offset/layer"


class Watched(pl.LightningModule):
    """Runs `step(module, index)` in training; what it returns is the loss, if it needs a gradient."""

    def __init__(self, layer, step, validate=None):
        super().__init__()
        self.layer, self.step, self.validate = layer, step, validate
        self.free = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return self.step(self, index).sum() * 0 + self.free

    def validation_step(self, batch, index):
        if self.validate is not None:
            self.validate(self)

    def configure_optimizers(self):
        return torch.optim.SGD([self.free], lr=0.0)


def fit(module, batches=1, monitor=None, **options):
    monitor = monitor or OffsetMonitor(every_n_steps=1)
    options = dict(max_epochs=1) | options
    loader = DataLoader(torch.zeros(batches, 1), batch_size=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[monitor], **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader if module.validate else None)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("offset/")}


def said(caught):
    return [str(warning.message) for warning in caught if "OffsetMonitor" in str(warning.message)]


def given(layer, size, pixels, **more):
    """Call a DeformConv2d by keyword on a map of `size` with every point `pixels` to the right."""
    offset = torch.zeros(1, 18, size, size)
    offset[:, 1::2] = pixels
    return layer(input=torch.zeros(1, 2, size, size), offset=offset, **more)


def test_a_layer_shared_over_levels_reports_the_largest_and_the_mean_of_all():
    def step(module, index):
        return given(module.layer, 8, 3.0).sum() + given(module.layer, 4, -1.0).sum()  # the last call is the tame one

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "OffsetMonitor")
        values = fit(Watched(DeformConv2d(2, 2, 3, padding=1), step))
    assert values[f"{FULL}/max"] == 3.0
    assert values[f"{FULL}/mean"] == pytest.approx((64 * 3 + 16 * 1) / 80)
    assert values[f"{FULL}/dilation"] == pytest.approx(1.0)
    assert f"{FULL}/mask_mean" not in values


def test_masks_of_all_calls_are_taken_together():
    def step(module, index):
        for size, mask in ((4, 0.25), (2, 0.75)):
            loss = given(module.layer, size, 0.0, mask=torch.full((1, 9, size, size), mask))
        return loss

    values = fit(Watched(DeformConv2d(2, 2, 3, padding=1), step))
    every = torch.tensor([0.25] * 16 + [0.75] * 4)
    assert values[f"{FULL}/mask_mean"] == pytest.approx(float(every.mean()))
    assert values[f"{FULL}/mask_std"] == pytest.approx(float(every.std(correction=0)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_call_that_runs_away_is_named_whichever_it_is(order):
    # 20 pixels are less than the side of the large map, 6 more than that of the small one.
    calls = [(32, 20.0), (4, 6.0), (8, 0.5)]

    def step(module, index):
        return sum(given(module.layer, *calls[i]).sum() for i in order)

    with pytest.warns(UserWarning) as caught:
        values = fit(Watched(DeformConv2d(2, 2, 3, padding=1), step))
    (message,) = said(caught)
    assert "layer samples up to 6.0 pixels away (limit 4.0)" in message and values[f"{FULL}/max"] == 20.0


def test_thousands_of_pixels_on_one_level_of_a_head_are_reported():
    """A head's own offsets grow with its input; only one level of the pyramid has large values."""
    layer = DCNv2(2, 2, 3, padding=1)
    with torch.no_grad():
        layer.conv_offset.weight[:18] = 1.0

    def step(module, index):
        return sum(module.layer(input=torch.full((1, 2, s, s), v)).sum() for s, v in ((16, 500.0), (8, 0.0), (4, 0.0)))

    with pytest.warns(UserWarning) as caught:
        values = fit(Watched(layer, step))
    assert values[f"{FULL}/max"] == pytest.approx(2**0.5 * 18 * 500)
    assert "samples up to 12727.9 pixels away (limit 16.0)" in said(caught)[0]


def test_not_finite_in_any_call_is_said():
    def step(module, index):
        return given(module.layer, 4, float("nan")) + given(module.layer, 4, 0.0)

    with pytest.warns(UserWarning) as caught:
        fit(Watched(DeformConv2d(2, 2, 3, padding=1), step))
    assert "has offsets that are not finite (largest: nan)" in said(caught)[0]


@pytest.mark.parametrize("runaway", [0, 1, 2])
def test_a_step_is_all_of_its_accumulated_batches(runaway):
    def step(module, index):
        return given(module.layer, 4, 100.0 if index == runaway else 1.0)

    with pytest.warns(UserWarning) as caught:
        values = fit(Watched(DeformConv2d(2, 2, 3, padding=1), step), batches=3, accumulate_grad_batches=3)
    assert values[f"{FULL}/max"] == 100.0 and values[f"{FULL}/mean"] == pytest.approx(34.0)
    assert len(said(caught)) == 1 and "100.0 pixels" in said(caught)[0]


def test_steps_are_counted_over_epochs_and_in_optimizer_steps():
    sampled = []

    def step(module, index):
        sampled.append(module.layer._sampling_hooks is not None)
        return given(module.layer, 4, 1.0)

    module = Watched(DeformConv2d(2, 2, 3, padding=1), step)
    fit(module, batches=4, monitor=OffsetMonitor(every_n_steps=3), max_epochs=2, accumulate_grad_batches=2)
    assert sampled == [True, True, False, False, False, False, True, True]  # two batches a step: steps 0 and 3


def test_validation_inside_a_step_is_not_taken_for_training():
    module = Watched(
        DeformConv2d(2, 2, 3, padding=1),
        lambda module, index: given(module.layer, 4, 1.0),
        lambda module: given(module.layer, 4, 1000.0),
    )
    values = fit(
        module, batches=4, accumulate_grad_batches=4, val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=1
    )
    assert values[f"{FULL}/max"] == 1.0
    assert module.layer._sampling_hooks is None


def test_checkpointed_and_repeated_calls_count_once_and_nothing_is_predicted_twice():
    layer = DCNv1(2, 2, 3, padding=1)
    with torch.no_grad():
        layer.conv_offset.bias[1::2] = 2.0
    runs = []
    layer.conv_offset.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def step(module, index):
        x = torch.rand(1, 2, 6, 6, requires_grad=True)
        return module.layer(x) + checkpoint(module.layer, x, use_reentrant=False)

    values = fit(Watched(layer, step))
    assert values[f"{FULL}/mean"] == pytest.approx(2.0)
    assert len(runs) == 3  # two calls, and the one that checkpointing repeats


def test_regions_by_keyword_and_with_offsets_from_elsewhere():
    rois = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    layer = nn.ModuleDict(
        dict(
            pack=DeformRoIPoolPack(2, 2, deform_fc_channels=4, gamma=0.5),
            free=DeformPSRoIPool(1, 1, 2, offset_scale=0.1),
        )
    )
    with torch.no_grad():
        layer["pack"].offset_fc[-1].bias.fill_(4.0)

    def step(module, index):
        x = torch.rand(1, 2, 8, 8)
        free = module.layer["free"]
        shifts = sum(free(x[:, :1], rois, offset=torch.full((1, 2, 2, 2), value)).sum() for value in (30.0, 0.0))
        return module.layer["pack"](input=x, rois=rois).sum() + shifts + free(x[:, :1], rois).sum()

    with pytest.warns(UserWarning) as caught:
        values = fit(Watched(layer, step))
    assert values["offset/layer.pack/max"] == pytest.approx(8**0.5)
    assert values["offset/layer.free/max"] == pytest.approx(3 * 2**0.5)
    assert values["offset/layer.free/mean"] == pytest.approx(1.5 * 2**0.5)
    assert [message.split()[1] for message in said(caught)] == ["layer.free", "layer.pack"]  # as they ran


def test_rfcn_reports_the_offsets_of_its_boxes():
    from dcn_plugin.detection.rfcn import PSRoIMaps

    layer = PSRoIMaps(2, 3, stride=1, group_size=2, conv_channels=4, deformable=True, offset_scale=0.1)
    with torch.no_grad():
        layer.box_offsets.conv.bias.fill_(20.0)

    def step(module, index):
        votes = module.layer({"0": torch.rand(1, 2, 8, 8)}, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], [(8, 8)])
        return votes[0].sum() + votes[1].sum()

    with pytest.warns(UserWarning) as caught:
        values = fit(Watched(layer, step))
    assert set(values) == {f"{FULL}.{part}/{kind}" for part in ("scores", "boxes") for kind in ("mean", "max")}
    assert values[f"{FULL}.scores/max"] == 0.0 and values[f"{FULL}.boxes/max"] == pytest.approx(2 * 2**0.5)
    assert "layer.boxes shifts bins by up to 2.8 RoI sizes" in said(caught)[0]


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_is_watched(whole):
    torch.compiler.reset()
    layer = nn.Sequential(DCNv2(2, 2, 3, padding=1))
    with torch.no_grad():
        layer[0].conv_offset.bias[1:18:2] = 2.0
    compiled = torch.compile(layer, backend="eager", fullgraph=whole)
    sizes = []

    def step(module, index):
        sizes.append(index)
        return compiled(torch.rand(1, 2, 6, 6)).sum() + compiled(torch.rand(1, 2, 6, 6)).sum()

    values = fit(Watched(layer, step), batches=6, monitor=OffsetMonitor(every_n_steps=2))
    assert values["offset/layer.0/max"] == values["offset/layer.0/mean"] == 2.0 and len(sizes) == 6
    torch.compiler.reset()


def test_hooks_go_when_training_ends_with_an_error():
    def step(module, index):
        given(module.layer, 4, 50.0)
        raise RuntimeError("on purpose")

    module = Watched(DeformConv2d(2, 2, 3, padding=1), step)
    with pytest.raises(RuntimeError, match="on purpose"), pytest.warns(UserWarning, match="50.0 pixels"):
        fit(module)
    assert module.layer._sampling_hooks is None
