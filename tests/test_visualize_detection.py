"""Bins of deformable RoI pooling against positions worked out by hand, and the figures of detectors."""

from typing import Any

import pytest
import torch
from torch import nn

from dcn_plugin.layers import DeformPSRoIPoolPack, DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from dcn_plugin.visualize.regions import bin_shifts, draw_detections, record_bins

TINY: dict[str, Any] = dict(name="resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), in_chans=1)


def detector(name: str, **options: Any) -> nn.Module:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    from dcn_plugin.detection.faster_rcnn import build_detector

    torch.manual_seed(0)
    return build_detector(dict(name=name, num_classes=3, backbone=TINY, min_size=64, box_score_thresh=0.0, **options))


def faster(**options: Any) -> nn.Module:
    pool = dict(type="MultiScaleDeformRoIPool", deform_fc_channels=8, **options)
    return detector("faster_rcnn", fpn_channels=8, box_head=dict(representation_size=8), roi_pool=pool)


class Pooled(nn.Module):
    """A layer on one map, with the RoIs that are given."""

    def __init__(self, layer: nn.Module, rois: Any) -> None:
        super().__init__()
        self.layer, self.rois = layer, rois

    def forward(self, images):
        return self.layer(torch.stack(list(images)), self.rois)


def moved(layer: nn.Module, dy: float, dx: float, channels: str) -> nn.Module:
    """Let the branch of a layer predict the same offset for all bins; `channels` is the order of its rows."""
    last = layer.offset_fc[-1]
    rows = last.bias.detach().reshape(2, -1)
    with torch.no_grad():
        rows[channels.index("y")], rows[channels.index("x")] = dy, dx
        last.bias.copy_(rows.flatten())
    return layer


# -- records ----------------------------------------------------------------------------------------------------------


def test_bins_of_a_layer_by_hand():
    rois = torch.tensor([[1.0, 4.0, 8.0, 16.0, 14.0], [0.0, 0.0, 0.0, 4.0, 2.0]])
    layer = DeformRoIPoolPack((2, 3), 4, deform_fc_channels=8, spatial_scale=0.5, gamma=0.2)
    (item,) = record_bins(Pooled(moved(layer, 0.5, -2.0, "xy"), rois), torch.rand(2, 4, 8, 8))
    # Boxes of one image after the other; a box of 12 x 6 in 2 x 3 bins, moved by 0.2 * 0.5 * 6 and 0.2 * -2 * 12.
    assert item.name == "layer" and item.images.tolist() == [0, 1] and item.mask is None
    assert item.boxes.tolist() == [[0, 0, 4, 2], [4, 8, 16, 14]]
    assert item.bins[1].tolist() == [[[9.5, 6], [9.5, 10], [9.5, 14]], [[12.5, 6], [12.5, 10], [12.5, 14]]]
    assert item.shifts.shape == (2, 1, 2, 3, 2)
    torch.testing.assert_close(item.shifts[1, 0, 1, 2], torch.tensor([0.6, -4.8]))
    torch.testing.assert_close(item.shifted()[1, 0, 0], torch.tensor([10.1, 1.2]))


def test_masks_are_recorded():
    layer = ModulatedDeformRoIPoolPack(2, 4, deform_fc_channels=8)
    (item,) = record_bins(Pooled(layer, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]), torch.rand(4, 8, 8))
    assert item.mask.tolist() == [[[[0.5, 0.5], [0.5, 0.5]]]]


def test_position_sensitive_bins_start_at_rounded_boxes_and_take_the_offset_of_their_part():
    layer = DeformPSRoIPoolPack(4, 2, 4, part_size=2, offset_scale=0.5, deform_fc_channels=8, offset_classes=2)
    with torch.no_grad():  # class, (y, x), part row, part column
        layer.offset_fc[-1].bias.copy_(torch.arange(16.0))
    rois = torch.tensor([[0.0, 1.4, 2.5, 8.6, 6.4]])
    (item,) = record_bins(Pooled(layer, rois), torch.rand(1, 16, 10, 10))
    # Rounded to 1, 3, 9, 6 (half away from zero); the last pixel counts: 9 wide, 4 high, from (3, 1).
    assert item.bins[0, 0, 0].tolist() == [3.5, 1 + 9 / 8] and item.bins[0, 3, 3].tolist() == [6.5, 1 + 7 * 9 / 8]
    # Bins 0 and 1 lie in part 0, bins 2 and 3 in part 1.
    assert item.shifts[0, 0, :, 3, 0].tolist() == [0.5 * n * 4 for n in (1, 1, 3, 3)]
    assert item.shifts[0, 1, 0, :, 1].tolist() == [0.5 * n * 9 for n in (12, 12, 13, 13)]
    chosen = item.shifted(torch.tensor([1]))
    assert torch.equal(chosen, item.bins + item.shifts[:, 1])
    torch.testing.assert_close(item.boxes[0], rois[0, 1:])


def test_bins_of_boxes_that_are_inside_out_lie_where_they_are_pooled():
    turned = torch.tensor([[0.0, 16.0, 8.0, 4.0, 14.0]])  # x from 16 back to 4
    layer = DeformRoIPoolPack((2, 3), 4, deform_fc_channels=8, spatial_scale=0.5, gamma=0.2)
    (item,) = record_bins(Pooled(moved(layer, 0.0, 1.0, "xy"), turned), torch.rand(1, 4, 8, 8))
    assert item.bins[0].tolist() == [[[9.5, 14], [9.5, 10], [9.5, 6]], [[12.5, 14], [12.5, 10], [12.5, 6]]]
    torch.testing.assert_close(item.shifts[0, 0, 0, 0], torch.tensor([0.0, 0.2 * -12]))
    # Position-sensitive: 0.1 pixels of the map wide, which is half as large as the image; 7 high.
    layer = DeformPSRoIPoolPack(1, 2, (1, 2), spatial_scale=0.5, offset_scale=0.5, deform_fc_channels=8)
    (item,) = record_bins(Pooled(moved(layer, 1.0, 1.0, "yx"), turned), torch.rand(1, 4, 8, 8))
    torch.testing.assert_close(item.bins[0, 0], torch.tensor([[11.5, 16.05], [11.5, 16.15]]))
    torch.testing.assert_close(item.shifts[0, 0, 0, 0], torch.tensor([0.5 * 7, 0.5 * 0.2]))
    pytest.importorskip("matplotlib")
    (axes,) = bin_shifts(Pooled(layer, turned), torch.rand(4, 8, 8), turned[:, 1:]).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 4 and right > 16 and top < 8 and bottom > 14


def test_bins_of_a_pyramid_are_those_of_regions_of_at_least_a_pixel_of_their_map():
    """Not aligned, as torchvision's: of the finest map, whose pixels are 4 of the image."""
    model = faster(output_size=2, gamma=0.3)
    moved(model.roi_heads.box_roi_pool, 1.0, 1.0, "yx")
    boxes = torch.tensor([[24.0, 6.0, 4.0, 16.0], [8.0, 8.0, 9.0, 9.0]])
    (item,) = record_bins(model, torch.rand(1, 64, 64), [boxes])
    torch.testing.assert_close(item.bins[0, :, :, 1], torch.tensor([[25.0, 27.0], [25.0, 27.0]]))
    torch.testing.assert_close(item.bins[1, :, :, 0], torch.tensor([[9.0, 9.0], [11.0, 11.0]]))
    torch.testing.assert_close(item.shifts[:, 0, 0, 0], torch.tensor([[0.3 * 10, 0.3 * 4], [0.3 * 4, 0.3 * 4]]))


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (128, 160)])
def test_boxes_of_a_detector_are_in_pixels_of_its_image(size):
    """The detector resizes the image to 64 pixels; boxes, bins and shifts are still the image's."""
    model = faster(output_size=2, gamma=0.3)
    moved(model.roi_heads.box_roi_pool, 1.0, -0.5, "yx")
    boxes = torch.tensor([[4.0, 6.0, 24.0, 16.0], [0.0, 0.0, 10.0, 30.0]])
    (item,) = record_bins(model, torch.rand(1, *size), [boxes])
    torch.testing.assert_close(item.boxes, boxes)
    torch.testing.assert_close(item.bins[0, 0, 0], torch.tensor([8.5, 9.0]))
    torch.testing.assert_close(item.shifts[0, 0, 1, 1], torch.tensor([0.3 * 10, -0.15 * 20]))


def test_proposals_of_several_images_and_a_model_left_alone():
    model = faster().train()
    model.backbone.eval()
    images = [torch.rand(1, 64, 64), torch.rand(1, 48, 90)]
    (item,) = record_bins(model, images)
    assert set(item.images.tolist()) == {0, 1} and len(item.boxes) == len(item.images) == len(item.bins)
    assert (item.boxes[item.images == 1] <= torch.tensor([90.0, 48, 90, 48]) + 1e-3).all()
    assert torch.equal(item.shifts, torch.zeros_like(item.shifts))
    assert model.training and not model.backbone.training
    assert not model.roi_heads.box_roi_pool._forward_hooks


def test_rfcn_has_the_bins_of_each_class():
    model = detector("rfcn", deformable=True, group_size=3, conv_channels=8)
    field = model.roi_heads.box_roi_pool.score_offsets.conv
    with torch.no_grad():  # class 2 moves down by 0.1 * 10 pixels
        field.bias.reshape(3, 2, 9)[2, 0] = 1.0
    boxes = torch.tensor([[10.0, 20.0, 29.0, 29.0]])  # 20 x 10 with the last pixel
    model.roi_heads.box_roi_pool.box_offsets.conv.bias.data[9:] = 1.0  # the deltas' bins move to the right
    item, of_deltas = record_bins(model, torch.rand(1, 64, 64), [boxes])
    assert (item.part, of_deltas.part) == ("scores", "boxes") and of_deltas.shifts.shape == (1, 1, 3, 3, 2)
    torch.testing.assert_close(of_deltas.shifts, torch.tensor([0.0, 2.0]).expand(1, 1, 3, 3, 2))
    assert item.name == "roi_heads.box_roi_pool" and item.shifts.shape == (1, 3, 3, 3, 2)
    torch.testing.assert_close(item.shifts[0, 2, ..., 0], torch.ones(3, 3))
    assert item.shifts[0, :2].abs().max() == 0 and item.shifts[..., 1].abs().max() == 0


# -- figures ----------------------------------------------------------------------------------------------------------


def test_detections_are_drawn_where_they_are(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    found = dict(
        boxes=torch.tensor([[2.0, 3.0, 10.0, 8.0], [1.0, 1.0, 4.0, 4.0]]),
        labels=torch.tensor([1, 2]),
        scores=torch.tensor([0.9, 0.2]),
    )
    true = dict(boxes=torch.tensor([[2.0, 2.0, 9.0, 8.0]]), labels=torch.tensor([2]))
    figure = draw_detections(torch.rand(3, 16, 20), found, true, ["none", "cat", "dog"])
    (axes,) = figure.axes
    boxes = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
    assert boxes == [(1.5, 1.5, 7, 6), (1.5, 1.5, 7, 6), (1.5, 2.5, 8, 5)]
    assert [text.get_text() for text in axes.texts] == ["cat 0.90"]
    several = draw_detections([torch.rand(1, 16, 20)] * 5, [found] * 5, class_names={1: "cat"}, threshold=0.0)
    assert len(several.axes) == 8 and [len(axes.patches) for axes in several.axes] == [2] * 5 + [0] * 3
    assert [text.get_text() for text in several.axes[0].texts] == ["cat 0.90", "2 0.20"]
    several.savefig(tmp_path / "several.png")
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs and matplotlib.get_backend()


@pytest.mark.parametrize("bins", [3, 7])
def test_bin_shifts_show_the_records(bins, tmp_path):
    pytest.importorskip("matplotlib")
    model = faster(output_size=bins)
    nn.init.normal_(model.roi_heads.box_roi_pool.offset_fc[-1].weight)
    image, boxes = torch.rand(1, 48, 64), torch.tensor([[4.0, 6.0, 24.0, 36.0], [30.0, 10.0, 60.0, 40.0]])
    (item,) = record_bins(model, image, [boxes])
    figure = bin_shifts(model, image, boxes, torch.tensor([1, 2]), class_names=["none", "cat", "dog"])
    assert [axes.get_title() for axes in figure.axes] == ["cat", "dog"]
    for index, axes in enumerate(figure.axes):
        rest, points = (torch.tensor(drawn.get_offsets().tolist()) for drawn in axes.collections)
        torch.testing.assert_close(rest.flip(1) + 0.5, item.bins[index].reshape(-1, 2))
        torch.testing.assert_close(points.flip(1) + 0.5, item.shifted()[index].reshape(-1, 2))
        assert len(axes.lines) == bins**2 and len(axes.patches) == (10 if bins == 3 else 1)
    figure.savefig(tmp_path / "bins.png")
    assert (tmp_path / "bins.png").stat().st_size > 3000


def test_bin_shifts_of_what_the_detector_finds():
    pytest.importorskip("matplotlib")
    model = detector("rfcn", deformable=True, group_size=3, conv_channels=8).eval()
    image = torch.rand(1, 64, 80)
    figure = bin_shifts(model, image, count=2, picture=torch.rand(3, 64, 80))
    best = model([image])[0]["labels"][:2]
    assert [axes.get_title() for axes in figure.axes] == [str(label) for label in best.tolist()]


def test_a_detector_that_knows_its_classes_names_them():
    pytest.importorskip("matplotlib")
    model, boxes = faster(), torch.tensor([[4.0, 6.0, 24.0, 36.0], [30.0, 10.0, 60.0, 40.0]])
    model.class_names = ["cat", "dog"]  # labels count from 1
    image, labels = torch.rand(1, 48, 64), torch.tensor([2, 1])
    assert [axes.get_title() for axes in bin_shifts(model, image, boxes, labels).axes] == ["dog", "cat"]
    given = bin_shifts(model, image, boxes, labels, class_names={1: "one", 2: "two"})
    assert [axes.get_title() for axes in given.axes] == ["two", "one"]
