"""Sampling hooks see what `forward` sampled with, however the layer is called, and leave no trace elsewhere."""

import copy
import io

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dcn_plugin.layers import (
    DCNv1,
    DCNv2,
    DeformConv2d,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
)
from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

ROIS = torch.tensor([[0.0, 1.0, 1.0, 6.0, 5.0], [1.0, 0.0, 2.0, 7.0, 7.0]])


class Seen(list):
    """A hook that keeps what it is called with."""

    def __call__(self, layer, samples):
        self.append(samples)


def moved(layer: nn.Module, span: float = 0.3) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -span, span)
    return layer


def conv_again(layer, samples):
    """What the operator gives for the samples: an independent way to the layer's output."""
    return deform_conv2d(
        samples.input, samples.offset, layer.weight, layer.bias, layer.stride, layer.padding4, layer.dilation,
        samples.mask,
    )  # fmt: skip


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(input=x)], ids=["place", "name"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: DCNv1(4, 6, 3, padding=1, offset_groups=2),
        lambda: DCNv2(4, 6, (3, 1), stride=2, mask_activation="sigmoid"),
        lambda: DCNv2(4, 6, 3, offset_bound=0.1),
    ],
    ids=["v1", "v2", "bounded"],
)
def test_the_samples_of_a_convolution_make_its_output(layer, call):
    layer, seen, x = moved(layer()), Seen(), torch.rand(2, 4, 7, 8)
    layer.register_sampling_hook(seen)
    output = call(layer, x)
    (samples,) = seen
    assert torch.equal(conv_again(layer, samples), output)
    assert (
        not samples.offset.requires_grad and samples.rois is None and (samples.mask is None) == isinstance(layer, DCNv1)
    )
    if getattr(layer, "offset_bound", None):
        assert 0 < samples.offset.abs().max() <= layer.offset_bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_offsets_from_elsewhere_are_seen(named, masked):
    layer, seen = DeformConv2d(4, 6, 3, padding=1), Seen()
    layer.register_sampling_hook(seen)
    x, offset = torch.rand(2, 4, 5, 5), torch.randn(2, 18, 5, 5)
    mask = torch.rand(2, 9, 5, 5) if masked else None
    output = layer(x, offset=offset, mask=mask) if named else layer(x, offset, mask)
    (samples,) = seen
    assert torch.equal(samples.offset, offset) and torch.equal(conv_again(layer, samples), output)


def test_every_call_of_a_shared_layer_is_seen():
    layer, seen = moved(DCNv2(4, 4, 3, padding=1)), Seen()
    layer.register_sampling_hook(seen)
    model = nn.ModuleList([layer, layer])
    pyramid = [torch.rand(1, 4, size, size) for size in (8, 4, 2)]
    outputs = [model[1](level) for level in pyramid]
    assert [samples.offset.shape[-1] for samples in seen] == [8, 4, 2]
    for samples, output in zip(seen, outputs, strict=True):
        assert torch.equal(conv_again(layer, samples), output)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("pack", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_the_samples_of_roi_pooling_make_its_output(pack, named):
    layer, seen, x = moved(pack(3, 4, deform_fc_channels=8, gamma=0.5)), Seen(), torch.rand(2, 4, 8, 8)
    layer.register_sampling_hook(seen)
    output = layer(input=x, rois=ROIS) if named else layer(x, ROIS)
    (samples,) = seen  # the plain pooling that the branch reads is none
    again = deform_roi_pool(samples.input, samples.rois, samples.offset, samples.mask, output_size=3, gamma=0.5)
    assert samples.offset.any() and torch.equal(again, output)


def test_the_samples_of_position_sensitive_pooling_make_its_output():
    layer = moved(
        DeformPSRoIPoolPack(4, 2, 2, deform_fc_channels=8, offset_classes=2, modulated=True, offset_scale=0.5)
    )
    seen, x = Seen(), torch.rand(2, 16, 8, 8)
    layer.register_sampling_hook(seen)
    output = layer(x, rois=ROIS)
    (samples,) = seen
    again = deform_ps_roi_pool(
        samples.input, samples.rois, samples.offset, samples.mask,
        output_dim=4, group_size=2, output_size=2, samples_per_part=4, offset_scale=0.5,
    )  # fmt: skip
    assert samples.offset.any() and torch.equal(again, output)


def test_offsets_of_regions_from_elsewhere_are_seen_as_y_then_x():
    x, seen = torch.rand(2, 4, 8, 8), Seen()
    offset = torch.randn(2, 2, 2, 2)
    mmcv_order = DeformRoIPool(2)
    mmcv_order.register_sampling_hook(seen)
    mmcv_order(x, ROIS, offset=offset)
    mmcv_order(x, ROIS)
    ours = DeformPSRoIPool(1, 2, 2)
    ours.register_sampling_hook(seen)
    ours(x, ROIS, offset=offset, mask=torch.full((2, 1, 2, 2), 0.5))
    assert torch.equal(seen[0].offset, offset.flip(1)) and seen[1].offset is None
    assert torch.equal(seen[2].offset, offset) and torch.equal(seen[2].mask, torch.full((2, 1, 2, 2), 0.5))


def test_the_samples_of_pooling_on_a_pyramid_make_its_output():
    pytest.importorskip("torchvision")
    from dcn_plugin.detection import MultiScaleDeformRoIPool

    layer = moved(MultiScaleDeformRoIPool(["0", "1"], 2, 2, in_channels=4, deform_fc_channels=8, gamma=0.5))
    seen = Seen()
    layer.register_sampling_hook(seen)
    maps = {"0": torch.rand(1, 4, 32, 32), "1": torch.rand(1, 4, 16, 16)}
    boxes, sizes = [torch.tensor([[4.0, 4.0, 40.0, 60.0], [0.0, 0.0, 128.0, 128.0]])], [(128, 128)]
    output = layer(x=maps, boxes=boxes, image_shapes=sizes)
    (samples,) = seen
    assert samples.image_sizes == sizes and torch.equal(samples.rois[0], boxes[0]) and samples.offset.any()
    for level, scale in ((0, 0.25), (1, 0.125)):  # the larger box lies on the coarser level
        again = deform_roi_pool(
            maps[str(level)], [boxes[0][level : level + 1]], samples.offset[level : level + 1],
            output_size=2, spatial_scale=scale, sampling_ratio=2, gamma=0.5, aligned=False,
        )  # fmt: skip
        torch.testing.assert_close(again, output[level : level + 1])


def test_rfcn_shows_the_offsets_of_its_scores_and_of_its_boxes():
    pytest.importorskip("torchvision")
    from dcn_plugin.detection.rfcn import PSRoIMaps

    geometry = dict(in_channels=4, num_classes=3, stride=1, group_size=2, conv_channels=8)
    layer, seen = moved(PSRoIMaps(**geometry, deformable=True)), Seen()
    layer.register_sampling_hook(seen)
    scores, deltas = layer({"0": torch.rand(2, 4, 8, 8)}, [ROIS[:1, 1:], ROIS[1:, 1:]], [(8, 8)] * 2)
    for samples, votes, pool in zip(seen, (scores, deltas), (layer.score_pool, layer.box_pool), strict=True):
        assert samples.offset.any() and samples.image_sizes == [(8, 8)] * 2
        assert torch.equal(pool(samples.input, samples.rois, samples.offset), votes)
    plain = PSRoIMaps(**geometry)
    plain.register_sampling_hook(lambda *_: pytest.fail("samples of a pooling that has none"))
    plain({"0": torch.rand(1, 4, 8, 8)}, [ROIS[:1, 1:]], [(8, 8)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reports_a_call_once(reentrant):
    layer, seen = moved(DCNv2(4, 4, 3, padding=1)), Seen()
    layer.register_sampling_hook(seen)
    x = torch.rand(1, 4, 6, 6, requires_grad=True)
    output = checkpoint(layer, x, use_reentrant=reentrant)
    output.sum().backward()
    (samples,) = seen
    assert torch.equal(conv_again(layer, samples), output) and x.grad.any()


def test_a_hook_inside_checkpointing_may_compute_with_what_it_sees():
    layer, seen = moved(DCNv2(4, 4, 3, padding=1)), []
    layer.register_sampling_hook(lambda layer, samples: seen.append((samples.offset * layer.weight.sum()).square()))
    x = torch.rand(1, 4, 6, 6, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert not seen[0].requires_grad and x.grad.any()


def test_gradients_and_results_are_as_without_a_hook():
    layer, x = moved(DCNv2(4, 4, 3, padding=1)), torch.rand(1, 4, 6, 6)

    def gradients():
        layer.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    before = gradients()
    layer.register_sampling_hook(Seen())
    for value, expected in zip(gradients(), before, strict=True):
        assert torch.equal(value, expected)


# -- where nothing is seen, and nothing stays -------------------------------------------------------------------------


def test_a_handle_takes_its_own_hook_away():
    layer, first, second, x = DCNv1(4, 4, 3), Seen(), Seen(), torch.rand(1, 4, 5, 5)
    one, two, same = (layer.register_sampling_hook(hook) for hook in (first, second, first))
    layer(x)
    assert (len(first), len(second)) == (2, 1)
    same.remove()
    same.remove()
    layer(x)
    assert (len(first), len(second)) == (3, 2)
    one.remove()
    two.remove()
    layer(x)
    assert (len(first), len(second)) == (3, 2) and layer._sampling_hooks is None
    with layer.register_sampling_hook(first):
        layer(x)
    layer(x)
    assert len(first) == 4
    del layer
    one.remove()


@pytest.mark.parametrize("parametrised", [False, True])
def test_copies_pickles_and_state_dicts_are_without_hooks(parametrised):
    layer, x = moved(DCNv2(4, 4, 3)), torch.rand(1, 4, 5, 5)
    if parametrised:
        parametrizations.weight_norm(layer)
    keys, seen = list(layer.state_dict()), Seen()
    layer.register_sampling_hook(lambda layer, samples: seen.append(samples))  # no pickle takes a lambda
    assert list(layer.state_dict()) == keys
    others = [copy.deepcopy(layer)]
    if not parametrised:  # which torch refuses to pickle
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        others.append(torch.load(file, weights_only=False))
    expected = layer(x)
    for other in others:
        assert torch.equal(other(x), expected) and len(seen) == 1
        late = Seen()
        other.register_sampling_hook(late)
        other(x)
        assert len(late) == 1 and len(seen) == 1


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.given = DeformConv2d(4, 4, 3, padding=1)
        self.own = DCNv2(4, 4, 3, padding=1)
        self.pool = DeformRoIPoolPack(2, 4, deform_fc_channels=8)
        self.ps = DeformPSRoIPoolPack(1, 2, 2, deform_fc_channels=8)

    def forward(self, x, offset, rois):
        x = self.own(self.given(x, offset))
        return self.pool(x, rois), self.ps(x, rois)


def pair():
    model, arguments = moved(Pair()).eval(), (torch.rand(2, 4, 8, 8), torch.randn(2, 18, 8, 8), ROIS)
    seen = Seen()
    for layer in model.children():
        layer.register_sampling_hook(seen)
    return model, arguments, seen


RECORDERS = {
    "fx": lambda model, arguments: torch.fx.symbolic_trace(model),
    "jit": lambda model, arguments: torch.jit.trace(model, arguments, check_trace=False),
    "export": lambda model, arguments: torch.export.export(model, arguments).module(),
    "export_strict": lambda model, arguments: torch.export.export(model, arguments, strict=True).module(),
}


@pytest.mark.parametrize("recorder", RECORDERS)
def test_recording_a_graph_calls_no_hook(recorder):
    model, arguments, seen = pair()
    graph = RECORDERS[recorder](model, arguments)
    assert seen == []
    expected = model(*arguments)
    assert len(seen) == 4
    for value, wanted in zip(graph(*arguments), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    # A recorded graph has no layers, so no hooks; that of fx calls the convolutions as they are.
    assert len(seen) == (6 if recorder == "fx" else 4)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_calls_its_hooks_while_they_are_there():
    model, arguments, _ = pair()
    del _
    for layer in model.children():
        layer._sampling_hooks = None
    torch.compiler.reset()
    compiled, largest = torch.compile(model, backend="eager"), []

    def hook(layer, samples):
        largest.append((type(layer).__name__, samples.offset.abs().max()))

    with torch.no_grad():
        expected = compiled(*arguments)
        for _ in range(2):
            handles = [layer.register_sampling_hook(hook) for layer in model.children()]
            watched = compiled(*arguments)
            for handle in handles:
                handle.remove()
            assert [name for name, _ in largest] == [type(layer).__name__ for layer in model.children()]
            assert float(largest[0][1]) == float(arguments[1].abs().max())
            largest.clear()
            compiled(*arguments)
            assert largest == []
    for value, wanted in zip(watched, expected, strict=True):
        torch.testing.assert_close(value, wanted)
    torch.compiler.reset()


def test_a_model_without_hooks_compiles_to_one_graph():
    model, arguments, _ = pair()
    for layer in model.children():
        layer._sampling_hooks = None
    torch.compiler.reset()
    with torch.no_grad():
        for value, wanted in zip(
            torch.compile(model, backend="eager", fullgraph=True)(*arguments), model(*arguments), strict=True
        ):
            torch.testing.assert_close(value, wanted)
    torch.compiler.reset()
