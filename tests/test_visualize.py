"""Sampling points, offset fields and effective dilation against positions worked out by hand."""

import math

import pytest
import torch
from torch import nn

from dcn_plugin import visualize
from dcn_plugin.layers import DCNv1, DCNv2, OffsetConv


def shifted(layer: OffsetConv, dy: float, dx: float) -> OffsetConv:
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    with torch.no_grad():
        layer.conv_offset.bias[: 2 * taps * layer.offset_groups : 2] = dy
        layer.conv_offset.bias[1 : 2 * taps * layer.offset_groups : 2] = dx
    return layer


def as_set(points):
    return {(round(float(y), 3), round(float(x), 3)) for y, x in points}


# -- effective dilation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), (1, 1)), ((5, 5), (2, 2)), ((1, 3), (1, 4)), ((3, 1), (3, 9))]
)
def test_effective_dilation_of_zero_offsets_is_the_dilation(kernel, dilation):
    groups = 2
    offset = torch.zeros(2, 2 * groups * kernel[0] * kernel[1], 4, 5)
    moving = dilation[0] if kernel[0] > 1 else dilation[1]
    found = visualize.effective_dilation(offset, kernel, dilation)
    assert torch.equal(found, torch.full((2, groups, 4, 5), float(moving)))


def test_effective_dilation_by_hand():
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(1, 18, 2, 2, generator=generator)
    found = visualize.effective_dilation(offset, (3, 3), (2, 1))
    for y in range(2):
        for x in range(2):
            at = {}
            for i in range(3):
                for j in range(3):
                    k = 3 * i + j
                    at[i, j] = (2 * i + float(offset[0, 2 * k, y, x]), j + float(offset[0, 2 * k + 1, y, x]))
            pairs = [(at[i, j], at[i + 1, j]) for i in range(2) for j in range(3)]
            pairs += [(at[i, j], at[i, j + 1]) for i in range(3) for j in range(2)]
            truth = sum(math.dist(a, b) for a, b in pairs) / len(pairs)
            assert found[0, 0, y, x] == pytest.approx(truth, rel=1e-5)


def test_effective_dilation_grows_with_the_spread_and_ignores_shifts():
    taps = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1).reshape(9, 2).float()
    spread = (taps * 1.5 + 7).reshape(1, 18, 1, 1)  # every point at 2.5 times its place, shifted by 7
    assert visualize.effective_dilation(spread, (3, 3)).item() == pytest.approx(2.5)
    assert visualize.effective_dilation(torch.randn(1, 2, 3, 3), (1, 1)).abs().max() == 0


# -- records and traces -----------------------------------------------------------------------------------------------


def test_zero_offsets_give_the_regular_grid_through_two_layers():
    model = nn.Sequential(DCNv2(1, 4, 3, padding=1), nn.ReLU(), DCNv1(4, 4, 3, padding=2, dilation=2))
    records = visualize.record(model, torch.randn(1, 1, 17, 17))
    assert [r.name for r in records] == ["0", "2"]
    points = visualize.trace(records, (8, 8))
    assert len(points) == 81
    steps = (-1, 0, 1)
    truth = {(8 + 2 * a + c, 8 + 2 * b + d) for a in steps for b in steps for c in steps for d in steps}
    assert as_set(points) == as_set(truth)
    one = visualize.trace(records[1:], (8, 8))
    assert as_set(one) == {(8 + 2 * a, 8 + 2 * b) for a in (-1, 0, 1) for b in (-1, 0, 1)}


def test_a_shift_moves_every_point():
    model = nn.Sequential(shifted(DCNv2(1, 4, 3, padding=1), 0.25, -0.5), shifted(DCNv2(4, 4, 3, padding=1), 2, 1))
    points = visualize.trace(visualize.record(model, torch.randn(1, 1, 21, 21)), (10, 9))
    truth = {(12 + a + 0.25, 10 + b - 0.5) for a in range(-2, 3) for b in range(-2, 3)}
    assert as_set(points) == truth


def test_points_outside_a_map_are_followed_no_further():
    model = nn.Sequential(DCNv2(1, 2, 3, padding=1), DCNv2(2, 2, 3, padding=1))
    records = visualize.record(model, torch.randn(1, 1, 9, 9))
    assert len(visualize.trace(records, (0, 0))) == 4 * 9
    with pytest.raises(ValueError, match=r"unit.*\(20, 3\)"):
        visualize.trace(records, (20, 3))


def receptive_centre(model: nn.Module, layer: OffsetConv, size: int, cell: int) -> float:
    """Find the middle of the input pixels that reach cell `cell` of the layer's input, by asking autograd."""
    seen = {}
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    image = torch.rand(1, 3, size, size, requires_grad=True)
    model(image)
    handle.remove()
    seen["x"][0, :, cell, cell].sum().backward()
    reached = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    return float(reached.min() + reached.max()) / 2


@pytest.mark.parametrize("name", ["resnet18", "convnext_pico", "regnety_002"])
def test_feature_maps_lie_on_the_image_where_their_receptive_fields_do(name):
    timm = pytest.importorskip("timm")
    import dcn_plugin

    rules = {
        "resnet18": dict(match="layer[23].1.conv2", layer=dict(type="DCNv2")),
        "convnext_pico": dict(match="stages.1.blocks.0.conv_dw", layer=dict(type="DCNv2")),
        "regnety_002": dict(match="s2.b1.conv2.conv", layer=dict(type="DCNv2")),
    }
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():  # so that no path cancels another, and none reaches over the whole map
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()
        if name == "regnety_002" and type(module).__name__ == "SEModule":
            module.forward = lambda x: x
    dcn_plugin.convert(model, [rules[name]])
    size, cell = 256, 12
    for item in visualize.record(model, torch.zeros(1, 3, size, size)):
        scale, shift = item.grid[0]
        assert scale == size / item.input_size[0]
        assert cell * scale + shift == pytest.approx(receptive_centre(model, item.layer, size, cell), abs=0.51)


def test_record_reports_offsets_masks_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), DCNv2(4, 6, 3, padding=1, offset_groups=2))
    nn.init.normal_(model[1].conv_offset.weight, std=0.1)
    model.train()
    image = torch.randn(3, 2, 16, 16)
    (item,) = visualize.record(model, image)
    offset, mask = model[1].offsets(model[0](image))
    assert torch.equal(item.offset.reshape(3, 36, 8, 8), offset) and torch.equal(item.mask.reshape(3, 18, 8, 8), mask)
    # Group 1, tap (0, 2), at output (4, 5): the plain position plus that tap's offset.
    at = item.positions(4, 5, group=1, sample=2)[2]
    assert torch.allclose(at, torch.tensor([3.0, 6.0]) + offset[2, 18 + 4 : 18 + 6, 4, 5])
    assert model.training and not model[1]._forward_hooks and model[1].weight.grad is None


def test_dilation_by_layer():
    model = nn.Sequential(DCNv1(1, 2, 3, padding=1), DCNv2(2, 2, 3, padding=2, dilation=2))
    found = visualize.dilation_by_layer(model, torch.randn(2, 1, 8, 8))
    assert {name: float(value.mean()) for name, value in found.items()} == {"0": 1.0, "1": 2.0}


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(DCNv2(1, 4, 3, padding=1), nn.MaxPool2d(2), DCNv2(4, 4, 3, padding=1, offset_groups=2))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return model


def test_figures_show_the_data_and_touch_no_global_state(model, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import _pylab_helpers

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    image = torch.rand(1, 24, 24)
    figure = visualize.sampling_points(model, image, [(12, 12), (4, 20)], layers=2)
    first = figure.axes[0].collections[0].get_offsets()
    points = visualize.trace(visualize.record(model, image), (12, 12))
    assert first.tolist() == points.flip(1).tolist()
    assert len(figure.axes) == 2
    rows = visualize.sampling_points(model, torch.rand(3, 1, 24, 24), [(12, 12), (4, 20)], layers=1)
    assert len(rows.axes) == 6 and len(rows.axes[4].collections[0].get_offsets()) == 9
    assert [axes.lines[0].get_xydata().tolist() for axes in rows.axes[2:4]] == [[[12, 12]], [[20, 4]]]
    figures = [
        figure,
        visualize.sampling_points(model, image, (3, 4), layers=["2"]),
        visualize.offset_field(model, image),
        visualize.offset_field(model, image, "2", picture=torch.rand(3, 24, 24), group=1),
        visualize.dilation_plot(model, image[None]),
    ]
    for i, drawn in enumerate(figures):
        drawn.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 3000
    assert not _pylab_helpers.Gcf.figs and matplotlib.get_backend() == "svg"
    matplotlib.use(before)


def test_arrows_of_the_offset_field_have_their_true_length(model):
    pytest.importorskip("matplotlib")
    with torch.no_grad():
        model[2].conv_offset.weight.zero_()
    shifted(model[2], 1.0, -2.0)
    figure = visualize.offset_field(model, torch.rand(1, 24, 24), "2")
    arrows = figure.axes[0].collections[0]
    # The map is half as large as the image, so an offset of one pixel is two image pixels.
    assert set(arrows.U.round(4)) == {-4.0} and set(arrows.V.round(4)) == {2.0}
    assert arrows.XY[0].tolist() == [0.5, 0.5] and len(arrows.U) == 144
