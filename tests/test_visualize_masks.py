"""Pictures of masks: PASCAL VOC's colours, what is painted where, figures."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from dcn_plugin import DCNv2  # noqa: E402
from dcn_plugin.visualize import class_colours, draw_masks, paint_mask, sampling_points  # noqa: E402

# As PASCAL VOC's development kit has them.
VOC = {
    0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0),
    15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
}  # fmt: skip


def test_colours_are_vocs():
    colours = class_colours()
    assert {key: tuple(colours[key].tolist()) for key in VOC} == VOC
    assert len({tuple(colour) for colour in colours.tolist()}) == 256 and torch.equal(class_colours(7), colours[:7])


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_are_painted_over_the_image(channels):
    image = torch.rand(channels, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 15], [9, 0, 2]])
    found = paint_mask(image, mask, alpha=0.25, ignore_index=9)
    colours = {1: VOC[1], 15: VOC[15], 9: VOC[255], 2: VOC[2]}
    for y in range(2):
        for x in range(3):
            under = image[:, y, x].expand(3)
            key = int(mask[y, x])
            truth = under if not key else 0.75 * under + 0.25 * torch.tensor(colours[key]) / 255
            torch.testing.assert_close(found[:, y, x], truth)


def test_figures_show_images_and_masks_with_the_names_of_what_occurs():
    images = [torch.rand(3, 8, 10), torch.rand(1, 6, 6)]
    masks = [torch.zeros(8, 10, dtype=torch.uint8), torch.ones(6, 6, dtype=torch.int64)]
    truths = [torch.full((8, 10), 3), torch.full((6, 6), 255)]
    figure = draw_masks(images, masks, truths, class_names=["ground", "cat", "dog", "cow"])
    panels = [axes.images[0].get_array() for axes in figure.axes]
    assert [panel.shape for panel in panels] == [(8, 10, 3)] * 3 + [(6, 6, 3)] * 3
    for panel, image, mask in zip((panels[1], panels[5]), images, (masks[0], truths[1]), strict=True):
        assert np.allclose(panel, paint_mask(image, mask).movedim(0, -1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ground", "cat", "cow"]
    assert not draw_masks(images, masks).legends


def test_sampling_points_are_drawn_on_a_painted_image():
    image, mask = torch.rand(3, 16, 16), torch.eye(16, dtype=torch.int64)
    painted = paint_mask(image, mask)
    figure = sampling_points(torch.nn.Sequential(DCNv2(3, 4, 3, padding=1)), image, (8, 8), picture=painted)
    shown = torch.as_tensor(np.asarray(figure.axes[0].images[0].get_array()))
    low, high = painted.min(), painted.max()
    torch.testing.assert_close(shown, ((painted - low) / (high - low)).movedim(0, -1))
