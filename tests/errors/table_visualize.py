"""Looking inside a model."""

import sys

import torch
from torch import nn

from dcn_plugin import visualize
from dcn_plugin.layers import DAttention, DCNv2, DeformRoIPool, DeformRoIPoolPack, SamplingModule
from dcn_plugin.visualize.regions import bin_shifts, draw_detections, record_bins
from errors.case import Case
from errors.table_models import faster, rfcn

IMAGE, BATCH = torch.rand(1, 24, 24), torch.rand(1, 1, 24, 24)


def model():
    return nn.Sequential(DCNv2(1, 2, 3, padding=1))


def detector():
    pool = dict(type="MultiScaleDeformRoIPool", output_size=3, deform_fc_channels=8)
    made = faster(roi_pool=pool, min_size=64, box_head=dict(representation_size=8))().eval()
    made.roi_heads.score_thresh = 1.0  # it finds nothing
    return made


class Idle(nn.Module):
    """Has a layer that does not run."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        return images


class Given(nn.Module):
    """Pools with offsets of its own making."""

    def __init__(self):
        super().__init__()
        self.pool = DeformRoIPool(2)

    def forward(self, images):
        return self.pool(images, torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), offset=torch.ones(1, 2, 2, 2))


class Several(SamplingModule):
    """Has a window, and reads more maps than one."""

    window = DCNv2(3, 4, 3).window

    def forward(self, images):
        self.tell_hooks([images, images], None)


def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    visualize.dilation_plot(model(), BATCH)


def explored(image=IMAGE, of=None, **given):
    """A call that writes a page, and must not."""
    return lambda tmp_path: visualize.explore(of or model(), image, tmp_path / "page.html", **given)


def endless(numbers=slice(None), value=float("inf")):
    made = model()
    nn.init.constant_(made[0].conv_offset.bias[numbers], value)
    return made


LAYERS = [
    Case(
        lambda: visualize.effective_dilation(torch.zeros(1, 16, 2, 2), (3, 3)),
        ValueError, "offset:", "expected [N, 2*G*K, H', W'] with K=9 taps", "got [1, 16, 2, 2]",
    ),
    Case(
        lambda: visualize.effective_dilation(torch.zeros(18, 2, 2), (3, 3)),
        ValueError, "offset:", "expected [N, 2*G*K, H', W']", "got [18, 2, 2]",
    ),
    Case(
        lambda: visualize.record(nn.Conv2d(1, 1, 1), BATCH),
        ValueError, "model:", "expected deformable convolutions inside", "got Conv2d without any",
    ),
    Case(
        lambda: visualize.dilation_by_layer(nn.Sequential(DAttention(1, 1, 1, 24)), BATCH),
        ValueError, "model:", "expected deformable convolutions inside", "got Sequential without any",
    ),
    Case(
        lambda: visualize.record(nn.Sequential(Several()), BATCH),
        TypeError, "model", "expected layers with a window that read one map", "got '0', which has several maps",
    ),
    Case(
        lambda: visualize.record(model(), BATCH, ["1"]),
        ValueError, "layers:", "deformable layers out of 0", "got '1'",
    ),
    Case(
        lambda: visualize.record(model(), BATCH, call=1),
        ValueError, "call:", "expected one of the calls of a layer, at most 1 of each", "got 1",
    ),
    Case(
        lambda: visualize.offset_field(nn.Sequential(model(), Idle(model())), IMAGE, "1.layer.0"),
        ValueError, "layers:", "expected layers that run", "got '1.layer.0', which did not",
    ),
    Case(
        lambda: visualize.dilation_plot(Idle(model()), BATCH),
        ValueError, "model:", "expected deformable convolutions that run", "got layer.0, which did not",
    ),
    Case(
        lambda: visualize.record(model(), BATCH[0, 0]),
        ValueError, "images:", "expected [N, C, H, W] or [C, H, W]", "got [24, 24]",
    ),
    Case(lambda: visualize.trace([], (0, 0)), ValueError, "records:", "expected at least one layer", "got none"),
    Case(
        lambda: visualize.trace(visualize.record(model(), BATCH), (30, 3)),
        ValueError, "unit:", "expected (y, x) inside the image", "got (30, 3)",
    ),
    Case(without_matplotlib, ModuleNotFoundError, "figures", "pip install '.[visualize]'", "not installed"),
    Case(
        lambda: visualize.sampling_points(model(), IMAGE, layers=0),
        ValueError, "layers:", "expected at least 1 layer", "got 0",
    ),
    Case(
        lambda: visualize.sampling_points(model(), torch.cat([BATCH, BATCH]), picture=IMAGE),
        ValueError, "picture:", "expected 2 pictures, one for each image", "got 1",
    ),
    Case(
        lambda: visualize.sampling_points(model(), IMAGE, picture=torch.rand(3, 20, 20)),
        ValueError, "picture:", "expected [C, 24, 24]", "got [3, 20, 20]",
    ),
]  # fmt: skip
PAGES = [
    Case(explored(torch.cat([BATCH, BATCH])), ValueError, "image:", "expected one, [C, H, W]", "got [2, 1, 24, 24]"),
    Case(
        explored((255 * IMAGE).byte()),
        ValueError, "image:", "expected floating-point numbers, as the model takes them", "got torch.uint8",
    ),
    Case(
        lambda tmp_path: visualize.explore(None, IMAGE, tmp_path),
        IsADirectoryError, "path:", "expected a file", "which is a folder",
    ),
    Case(explored(layers="1"), ValueError, "layers:", "deformable layers out of 0", "got '1'"),
    Case(explored(layers=0), ValueError, "layers:", "expected at least 1 layer", "got 0"),
    Case(explored(limit_mb=0), ValueError, "limit_mb:", "expected a positive number", "got 0"),
    Case(explored(limit_mb=0.01), ValueError, "limit_mb:", "expected at least 0.1 for this image and 0", "got 0.01"),
    Case(explored(of=endless()), ValueError, "model:", "expected finite offsets", "got inf in 0"),
    Case(
        explored(of=endless(slice(18, None), float("nan"))),
        ValueError, "model:", "expected finite masks", "got nan in 0",
    ),
    Case(
        lambda tmp_path: visualize.explore(model(), IMAGE, tmp_path / "no" / "page.html"),
        FileNotFoundError, "path:", "expected a file in a folder that exists", "page.html",
    ),
]  # fmt: skip
FOUND = dict(boxes=torch.tensor([[2.0, 3.0, 10.0, 8.0]]), labels=torch.tensor([1]), scores=torch.tensor([0.9]))
DETECTION = [
    Case(
        lambda: record_bins(rfcn()(), IMAGE),
        ValueError, "model:", "expected a deformable RoI pooling layer inside", "got GeneralizedRCNN without any",
    ),
    Case(
        lambda: record_bins(detector(), IMAGE, layer="x"),
        ValueError, "layer:", "out of roi_heads.box_roi_pool", "got 'x'",
    ),
    Case(
        lambda: record_bins(Idle(DeformRoIPoolPack(2, 1, deform_fc_channels=4)), IMAGE),
        ValueError, "model:", "expected deformable RoI pooling that runs", "got layer, which did not",
    ),
    Case(
        lambda: record_bins(Given(), IMAGE, [torch.zeros(1, 4)]),
        ValueError, "boxes:", "expected None, as pool is given offsets for its own", "got boxes",
    ),
    Case(
        lambda: record_bins(detector(), IMAGE, [torch.zeros(0, 4)] * 2),
        ValueError, "boxes:", "expected those of 1 images", "got 2",
    ),
    Case(
        lambda: record_bins(detector(), IMAGE, [torch.rand(5)]),
        ValueError, "boxes:", "expected [L, 4] for each image", "got [5]",
    ),
    Case(
        lambda: draw_detections([IMAGE] * 2, [FOUND]),
        ValueError, "detections:", "expected those of 2 images, at least one", "got 1",
    ),
    Case(lambda: draw_detections(IMAGE, FOUND, [FOUND] * 3), ValueError, "targets:", "those of 1 images", "got 3"),
    Case(lambda: bin_shifts(detector(), BATCH), ValueError, "image:", "expected [C, H, W]", "got [1, 1, 24, 24]"),
    Case(lambda: bin_shifts(detector(), IMAGE), ValueError, "boxes:", "expected some to look at", "got None"),
    Case(
        lambda: bin_shifts(detector(), IMAGE, torch.zeros(0, 4)),
        ValueError, "boxes:", "expected at least one", "got none",
    ),
    Case(
        lambda: bin_shifts(detector(), IMAGE, torch.rand(2, 4), labels=torch.tensor([1])),
        ValueError, "labels:", "expected those of 2 boxes", "got 1",
    ),
]  # fmt: skip
CASES = LAYERS + PAGES + DETECTION
