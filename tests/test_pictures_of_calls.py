"""Records and pictures show what `forward` sampled with, in each of a layer's calls, and compute nothing twice."""

import pytest
import torch
from torch import nn

from dcn_plugin import visualize
from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d, DeformRoIPool, DeformRoIPoolPack
from dcn_plugin.visualize.regions import bin_shifts, record_bins


class Head(nn.Module):
    """One layer over a pyramid of three levels, called by keyword; its input grows, and with it the offsets."""

    def __init__(self):
        super().__init__()
        self.shared = DCNv2(1, 1, 3, padding=1, mask_activation="sigmoid")
        with torch.no_grad():
            self.shared.conv_offset.weight[:18, :, 1, 1] = 1.0

    def forward(self, x):
        return [self.shared(input=x[..., ::step, ::step] * step) for step in (1, 2, 4)]


class Guided(nn.Module):
    """Offsets from a convolution of the model's own, as in an alignment module."""

    def __init__(self):
        super().__init__()
        self.predict = nn.Conv2d(1, 36, 3, padding=1)
        self.align = DeformConv2d(2, 2, 3, padding=1, offset_groups=2)

    def forward(self, x):
        self.offset = self.predict(x)
        return self.align(torch.cat((x, x), 1), offset=self.offset)


def test_every_call_of_a_shared_layer_is_recorded():
    model, image = Head(), torch.ones(1, 16, 16)
    records = visualize.record(model, image)
    assert [(item.call, item.input_size) for item in records] == [(0, (16, 16)), (1, (8, 8)), (2, (4, 4))]
    for item, step in zip(records, (1, 2, 4), strict=True):
        assert item.name == "shared" and (item.offset == step).all() and (item.mask == 0.5).all()
        assert item.grid[0][0] == item.out_grid[0][0] == step
    for call, step in ((0, 1), (1, 2), (2, 4), (-1, 4), (-3, 1)):
        (item,) = visualize.record(model, image, ["shared"], call)
        assert (item.offset == step).all()
    found = visualize.dilation_by_layer(model, image)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        f"shared[{i}]": (1, 1, size, size) for i, size in enumerate((16, 8, 4))
    }


def test_offsets_from_elsewhere_are_recorded():
    model, image = Guided(), torch.rand(2, 1, 8, 8)
    (item,) = visualize.record(model, image)
    assert item.name == "align" and item.mask is None
    assert torch.equal(item.offset.flatten(1, 3), model.offset)


def test_nothing_is_predicted_twice():
    model = nn.Sequential(DCNv1(1, 2, 3, padding=1), DCNv2(2, 2, 3, padding=1))
    runs = []
    for layer in model:
        layer.conv_offset.register_forward_hook(lambda *_: runs.append(1))
    assert len(visualize.record(model, torch.rand(1, 8, 8))) == len(runs) == 2
    assert all(layer._sampling_hooks is None and not layer._forward_hooks for layer in model)


def test_a_layer_padded_on_one_side_lies_where_it_is():
    """What predicts its offsets pads by itself, and has a padding of 0 to whoever asks."""
    model = nn.Sequential(DCNv1(1, 1, 3, stride=2, padding=(1, 1, 0, 0)), nn.Conv2d(1, 1, 1))
    (item,) = visualize.record(model, torch.rand(1, 8, 8))
    # Output (0, 0) has its taps at -1, 0 and 1: its centre is pixel 0.
    assert item.out_grid == ((2.0, 0.0), (2.0, 0.0)) and item.taps().mean(0).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_recorded():
    torch.compiler.reset()
    model = nn.Sequential(DCNv2(1, 2, 3, padding=1), DCNv2(2, 2, 3, padding=1))
    nn.init.normal_(model[0].conv_offset.weight, std=0.3)
    image = torch.rand(1, 8, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(image[None])
    expected = visualize.record(model, image)
    for item, wanted in zip(visualize.record(compiled, image), expected, strict=True):
        torch.testing.assert_close(item.offset, wanted.offset)
        assert item.name == f"_orig_mod.{wanted.name}"
    torch.compiler.reset()


def test_figures_draw_the_call_that_is_asked_for():
    pytest.importorskip("matplotlib")
    model, image = Head(), torch.ones(1, 16, 16)
    for call, length in ((0, 1.0), (1, 4.0), (-1, 16.0)):  # an offset of a coarse map is longer on the image
        figure = visualize.offset_field(model, image, call=call)
        assert set(figure.axes[0].collections[0].U.round(4)) == {length}
        points = visualize.sampling_points(model, image, (8, 8), call=call).axes[0].collections[0].get_offsets()
        (item,) = visualize.record(model, image, call=call)
        assert points.tolist() == visualize.trace([item], (8, 8)).flip(1).tolist()
    ticks = [text.get_text() for text in visualize.dilation_plot(model, image).axes[0].get_xticklabels()]
    assert ticks == ["shared[0]", "shared[1]", "shared[2]"]


# -- regions ----------------------------------------------------------------------------------------------------------

BOX = [0.0, 4.0, 8.0, 16.0, 14.0]  # 12 wide, 6 high


class Pooled(nn.Module):
    """Pools twice by keyword, in an order that is not the layer's, other boxes each time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        images, rois = torch.stack(list(images)), torch.tensor([BOX])
        return [self.layer(rois=rois + shift * torch.tensor([0, 1, 1, 1, 1]), input=images) for shift in (0.0, 2.0)]


def pack():
    layer = DeformRoIPoolPack(2, 1, deform_fc_channels=4, gamma=0.5)
    with torch.no_grad():
        layer.offset_fc[-1].bias[:4] = 1.0  # x
    return layer


def test_every_pooling_is_recorded_however_it_is_called():
    layer, runs = pack(), []
    layer.offset_fc.register_forward_hook(lambda *_: runs.append(1))
    first, second = record_bins(Pooled(layer), torch.rand(1, 24, 24))
    assert first.boxes.tolist() == [BOX[1:]] and second.boxes.tolist() == [[x + 2 for x in BOX[1:]]]
    for item in (first, second):
        torch.testing.assert_close(item.shifts, torch.tensor([0.0, 0.5 * 12]).expand(1, 1, 2, 2, 2))
    assert len(runs) == 2


def test_boxes_of_ones_own_replace_those_of_each_pooling():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
    records = record_bins(Pooled(pack()), torch.rand(1, 24, 24), [boxes])
    assert len(records) == 2
    for item in records:
        assert torch.equal(item.boxes, boxes)
        torch.testing.assert_close(item.shifts[:, 0, 0, 0], torch.tensor([[0.0, 2.0], [0.0, 1.0]]))


def test_offsets_of_regions_from_elsewhere_are_recorded():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = DeformRoIPool(2, gamma=0.5)

        def forward(self, images):
            offset = torch.zeros(1, 2, 2, 2)
            offset[:, 0] = 1.0  # x, in mmcv's order
            self.pool(images, [torch.tensor([BOX[1:]])])
            return self.pool(images, [torch.tensor([BOX[1:]])], offset=offset)

    plain, item = record_bins(Given(), torch.rand(1, 24, 24))
    assert not plain.shifts.any()
    torch.testing.assert_close(item.shifts, torch.tensor([0.0, 6.0]).expand(1, 1, 2, 2, 2))


def test_bins_of_a_keyword_call_are_drawn():
    pytest.importorskip("matplotlib")
    figure = bin_shifts(Pooled(pack()), torch.rand(1, 24, 24), torch.tensor([[0.0, 0.0, 8.0, 8.0]]))
    rest, moved = (
        torch.tensor(drawn.get_offsets().tolist(), dtype=torch.float32) for drawn in figure.axes[0].collections
    )
    torch.testing.assert_close(moved - rest, torch.tensor([4.0, 0.0]).expand(4, 2))
