"""Offsets that are predicted from another map, or by a branch of one's own: everything that knows layers takes it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.utils import parametrize, prune

import dcn_plugin
from dcn_plugin import DCNv1, DCNv2, reference
from dcn_plugin.layers import OffsetPredictor, SamplingModule, offset_parameters, offset_rates, reset_offsets
from dcn_plugin.visualize import record


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, FEATURE = rand(2, 4, 8, 9), rand(2, 6, 8, 9, seed=1)


class Align(nn.Module):
    """Two maps out of one image, and the layer that samples one where the other says."""

    def __init__(self, kind=DCNv2, **options):
        super().__init__()
        self.stem, self.guide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.align = kind(4, 5, 3, padding=1, offset_channels=6, offset_bound=2.0, **options)
        self.norm = nn.BatchNorm2d(5)
        deformed(self.align)

    def forward(self, image):
        return self.norm(self.align(self.stem(image), self.guide(image)))


def deformed(layer, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return layer


IMAGE = rand(2, 3, 8, 9, seed=2)
LAYERS = pytest.mark.parametrize("kind", [DCNv1, DCNv2])


def by_hand(layer, x, feature, **geometry):
    """The formula, on the reference."""
    raw = F.conv2d(feature, layer.conv_offset.weight, layer.conv_offset.bias, layer.stride, 1)
    offset, mask = raw, None
    if isinstance(layer, DCNv2):
        offset, mask = raw.tensor_split([raw.shape[1] // 3 * 2], 1)
        mask = 2 * mask.sigmoid()
    if layer.offset_bound is not None:
        offset = layer.offset_bound * torch.tanh(offset / layer.offset_bound)
    return reference.deform_conv2d(x, offset, layer.weight, layer.bias, layer.stride, 1, 1, mask)


@LAYERS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_offsets_follow_from_the_other_map(kind, stride, groups):
    layer = deformed(kind(4, 6, 3, stride, 1, offset_groups=groups, offset_channels=6))
    expected = by_hand(layer, X, FEATURE)
    torch.testing.assert_close(layer(X, FEATURE), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(X, feature=FEATURE), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.offsets(X, FEATURE)[0], layer.offsets(X, feature=FEATURE)[0])
    assert "offset_channels=6" in layer.extra_repr() and "offset_channels" not in kind(4, 6, 3).extra_repr()


@LAYERS
def test_a_layer_of_the_inputs_width_may_be_given_one(kind):
    layer, other = deformed(kind(4, 6, 3, padding=1)), rand(2, 4, 8, 9, seed=5)
    torch.testing.assert_close(layer(X, other), by_hand(layer, X, other), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(X), layer(X, X)) and not torch.allclose(layer(X), layer(X, other))


def test_gradients_reach_both_maps():
    layer = deformed(DCNv2(2, 1, 3, padding=1, offset_channels=3).double())
    x, feature = (rand(1, c, 2, 2, seed=c).double().requires_grad_() for c in (2, 3))
    assert torch.autograd.gradcheck(layer, (x, feature), atol=1e-4)
    assert torch.autograd.gradgradcheck(layer, (x, feature), atol=1e-4)


def test_uneven_padding_pads_the_other_map_too():
    layer = deformed(DCNv2(4, 3, 2, padding="same", offset_channels=6))
    one = deformed(DCNv2(4, 3, 2, offset_channels=6))  # on what is padded by hand
    pad = (0, 1, 0, 1)
    torch.testing.assert_close(layer(X, FEATURE), one(F.pad(X, pad), F.pad(FEATURE, pad)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_types(format):
    layer = deformed(DCNv2(4, 6, 3, padding=1, offset_channels=6))
    expected = layer(X, FEATURE)
    found = layer.to(memory_format=format)(X.to(memory_format=format), FEATURE.to(memory_format=format))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(memory_format=format)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(X.to(torch.bfloat16), FEATURE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.3)


def test_graphs_keep_both_maps():
    model = Align().eval()
    expected = model(IMAGE)
    traced = symbolic_trace(model)
    (node,) = [node for node in traced.graph.nodes if node.target == "align"]
    assert node.op == "call_module" and [str(argument) for argument in node.args] == ["stem", "guide"]
    exported = torch.export.export(model, (IMAGE,), strict=False).module()
    jitted = torch.jit.trace(model, IMAGE)
    for graph in (traced, exported, jitted, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(graph(IMAGE), expected, rtol=1e-5, atol=1e-6)
    with model.align.register_sampling_hook(lambda *_: None):
        pass
    model.align.register_forward_hook(lambda *_: None)  # then it is traced with what is inside
    inside = symbolic_trace(model)
    assert not any(node.target == "align" for node in inside.graph.nodes)
    torch.testing.assert_close(inside(IMAGE), expected, rtol=1e-5, atol=1e-6)


def test_named_maps_are_recorded_by_name():
    class Named(Align):
        def forward(self, image):
            return self.align(self.stem(image), feature=self.guide(image))

    model = Named().eval()
    traced = symbolic_trace(model)
    (node,) = [node for node in traced.graph.nodes if node.target == "align"]
    assert list(node.kwargs) == ["feature"]
    torch.testing.assert_close(traced(IMAGE), model(IMAGE))


def test_it_is_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    from onnx_checks import assert_close, by_definition

    from dcn_plugin.export.onnx import export_onnx

    model = Align().eval()
    path = export_onnx(model, (IMAGE,), tmp_path / "model.onnx")
    assert_close(by_definition(path, (IMAGE,)), model(IMAGE).detach())


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|isinstance.treespec)")
def test_hooks_pictures_and_the_monitor_see_what_was_sampled(tmp_path):
    model = Align().eval()
    offset, mask = model.align.offsets(model.stem(IMAGE), model.guide(IMAGE))
    (item,) = record(model, IMAGE)
    torch.testing.assert_close(item.offset.flatten(1, 3), offset)
    torch.testing.assert_close(item.mask.flatten(1, 2), mask)
    assert item.name == "align" and item.input_size == (8, 9) and item.grid == ((1.0, 0.0), (1.0, 0.0))
    pytest.importorskip("matplotlib")
    assert dcn_plugin.visualize.sampling_points(model, IMAGE[0]).axes[0].collections

    pl = pytest.importorskip("pytorch_lightning")
    from dcn_plugin.finetune import OffsetMonitor

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        default_root_dir=tmp_path, callbacks=[OffsetMonitor(every_n_steps=1)],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(IMAGE, batch_size=2))
    seen = {key.rpartition("/")[2]: float(value) for key, value in trainer.callback_metrics.items()}
    lengths = offset.unflatten(1, (-1, 2)).norm(dim=2)
    assert seen["mean"] == pytest.approx(lengths.mean().item()) and seen["max"] == pytest.approx(lengths.max().item())


def test_operations_are_those_of_the_other_maps_width():
    from torch.utils.flop_counter import FlopCounterMode

    from dcn_plugin.flops import ptflops_hooks

    layer = DCNv2(4, 6, 3, padding=1, offset_channels=10)
    x, feature = torch.rand(1, 4, 5, 5), torch.rand(1, 10, 5, 5)
    wanted = 25 * (6 * 36 + 4 * 36 + 27 * 90)  # the product, four corners of each sample, the predictor

    def counted(layer):
        layer.__flops__ = 0
        ptflops_hooks()[DCNv2](layer, (x, feature), layer(x, feature))
        return layer.__flops__

    assert counted(layer) == wanted
    with FlopCounterMode(display=False) as counter:
        layer(x, feature)
    assert counter.get_total_flops() == 2 * wanted
    layer.conv_offset = nn.Sequential(nn.Conv2d(10, 3, 1), OffsetPredictor(3, 27, 1))
    assert counted(layer) == 25 * (6 * 36 + 4 * 36 + 30 + 81)


# -- the places of convolutions, state dicts, rates --------------------------------------------------------------------


def test_from_conv_makes_one_and_convert_refuses():
    conv = nn.Conv2d(4, 5, 3, padding=1)
    layer = DCNv2.from_conv(conv, offset_channels=6)
    assert layer.weight is conv.weight and not layer.drop_in and DCNv2.from_conv(conv).drop_in
    torch.testing.assert_close(layer(X, FEATURE), conv(X), rtol=1e-4, atol=1e-5)
    model = nn.Sequential(nn.Conv2d(4, 5, 3))
    with pytest.raises(
        ValueError, match="the input alone suffices for, as the model gives '0' nothing else, got DCNv2"
    ):
        dcn_plugin.convert(model, dict(match="0", layer=dict(type="DCNv2", offset_channels=6)))
    assert type(model[0]) is nn.Conv2d


def test_norms_behind_it_fold_into_it():
    fuse = pytest.importorskip("mmcv.cnn").fuse_conv_bn
    model = Align().eval()
    model.norm.running_mean.uniform_(), model.norm.running_var.uniform_(0.5, 2)
    expected = model(IMAGE)
    fused = fuse(copy.deepcopy(model))
    assert type(fused.norm) is nn.Identity and type(fused.align) is DCNv2
    torch.testing.assert_close(fused(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_copies_and_files_hold_it(tmp_path):
    model = Align().eval()
    model.align.conv_offset = nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.ReLU(), OffsetPredictor(3, 27, 1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGE), model(IMAGE))
    fresh = Align().eval()
    with pytest.raises(RuntimeError, match="2 missing .*align.conv_offset.weight"):
        dcn_plugin.load_checkpoint(fresh, model.state_dict())


def test_it_says_which_channels_a_file_reads():
    text = r"conv_offset.weight has shape \[27, 6, 3, 3\].*; it reads maps of 6 channels, as with offset_channels=6"
    state = {f"0.{k}": v for k, v in DCNv2(4, 5, 3, offset_channels=6).state_dict().items()}
    with pytest.raises(RuntimeError, match=text):
        dcn_plugin.load_checkpoint(nn.Sequential(DCNv2(4, 5, 3)), state)


class Reads2(DCNv2):
    """Offsets out of two maps: what the layer predicts, along a flow (y, x) that is given."""

    def offsets(self, x, feature, flow):
        offset, mask = super().offsets(x, feature)
        return offset + flow.repeat(1, offset.shape[1] // 2, 1, 1), mask


def test_a_subclass_reads_as_many_maps_as_it_likes():
    layer = Reads2(4, 5, 3, padding=1, offset_channels=6)
    flow = torch.full((2, 2, 8, 9), 1.0)
    moved = F.conv2d(F.pad(X, (1, 2, 1, 2)), layer.weight, layer.bias)[:, :, 1:, 1:]  # one down, one to the right
    torch.testing.assert_close(layer(X, FEATURE, flow), moved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(X, FEATURE, flow=flow), moved, rtol=1e-4, atol=1e-5)


def test_a_branch_of_ones_own_trains_starts_again_and_has_its_rate():
    layer = DCNv2(4, 5, 3, padding=1, offset_channels=6)
    layer.conv_offset = nn.Sequential(
        nn.Conv2d(6, 3, 3, padding=1), nn.LeakyReLU(), OffsetPredictor(3, 27, 3, padding=1)
    )
    plain = F.conv2d(X, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(X, FEATURE), plain, rtol=1e-4, atol=1e-5)
    model = nn.ModuleDict(dict(layer=layer))
    assert list(offset_parameters(model)) == [
        f"layer.conv_offset.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(X, FEATURE).square().mean().backward()
        optimizer.step()
    assert layer.conv_offset[0].weight.grad.any() and not torch.allclose(layer(X, FEATURE), plain, atol=1e-3)
    hidden = layer.conv_offset[0].weight.clone()
    reset_offsets(model)
    assert torch.equal(layer.conv_offset[0].weight, hidden) and not layer.conv_offset[-1].weight.any()


# -- branches that something computes ----------------------------------------------------------------------------------


class Gained(SamplingModule):
    """A bare parameter as its branch: one shift for every position."""

    offset_branches = {"shift": 0.5, "absent": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.shift, self.absent = nn.Parameter(torch.ones(2)), None


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


@pytest.mark.parametrize("how", ["plain", "pruned", "parametrised", "weight norm"])
def test_a_bare_parameter_stays_a_branch(how):
    layer = Gained()
    if how == "pruned":
        prune.l1_unstructured(layer, "shift", amount=1)
    elif how == "parametrised":
        parametrize.register_parametrization(layer, "shift", Doubled())
    elif how == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(layer, "shift")
    names = {
        "plain": ["shift"],
        "pruned": ["shift_orig"],
        "parametrised": ["parametrizations.shift.original"],
        "weight norm": ["parametrizations.shift.original0", "parametrizations.shift.original1"],
    }[how]
    assert offset_parameters(layer) == dict.fromkeys(names, 0.5)
    assert all(map(layer.predicts_with, names)) and not layer.predicts_with("weight")
    assert {name for name, _ in layer.branches()} == {"shift"}
    layer.reset_offsets()
    for hook in layer._forward_pre_hooks.values():  # pruning computes it before each call
        hook(layer, ())
    assert not layer.shift.any() and not layer.shift.isnan().any()


class Misspelt(SamplingModule):
    offset_branches = {"shfit": 0.5}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(2))


class Foreign(nn.Module):
    offset_branches = ("shift",)


def test_names_that_are_not_there_are_errors():
    for ask in (reset_offsets, offset_rates):
        with pytest.raises(
            ValueError, match=r"offset_branches: expected names .* of Misspelt .* out of shift, got 'shfit'"
        ):
            ask(nn.Sequential(Misspelt()))
    with pytest.raises(TypeError, match=r"offset_branches: expected a mapping .* class Foreign, got \('shift',\)"):
        offset_rates(nn.Sequential(Foreign()))


class Still(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.layer, self.given = Windowed(), given

    def forward(self, x):
        return self.layer(x, self.given)


class Windowed(SamplingModule):
    """A layer with a window that reports no offset, or several maps."""

    window = DCNv1(4, 4, 3, 2, 1).window
    offset_branches = {}  # noqa: RUF012

    def forward(self, x, several):
        self.tell_hooks({"0": x, "1": x} if several else x, None)
        return F.max_pool2d(x, 3, 2, 1)


def test_a_layer_with_a_window_may_sample_undeformed():
    (item,) = record(Still(False), IMAGE)
    assert item.offset.shape == (2, 1, 9, 2, 4, 5) and not item.offset.any() and item.mask is None
    with pytest.raises(
        TypeError, match="expected layers with a window that read one map, got 'layer', which has several"
    ):
        record(Still(True), IMAGE)


def test_the_monitors_limit_is_of_the_largest_of_several_maps():
    pytest.importorskip("pytorch_lightning")
    from dcn_plugin.finetune import OffsetMonitor

    class Several(SamplingModule):
        def forward(self, maps):
            self.tell_hooks(maps, torch.full((1, 2, 3, 3), 4.0))

    monitor, layer = OffsetMonitor(limit=0.5), Several()
    for maps in ({"0": torch.rand(1, 2, 6, 20), "1": torch.rand(1, 2, 3, 10)}, [torch.rand(1, 2, 6, 20)]):
        with layer.register_sampling_hook(monitor._hook("several")):
            layer(maps)
    assert [call.limit for call in monitor._seen] == [10.0, 10.0] and float(monitor._seen[0].largest) > 5
