"""`torch.jit.trace`: no check of ours warns, and the trace computes what the module does, for other sizes too."""

import io
import warnings

import pytest
import timm
import torch
from torch import nn

from dcn_plugin import layers, ops, registry
from dcn_plugin.detection import MultiScaleDeformRoIPool
from dcn_plugin.detection.faster_rcnn import build_detector
from transforms.parts import each_layer, make_layer

# torch deprecates it as a whole.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")

BOXES = (torch.tensor([[1.0, 1, 20, 20]]), torch.tensor([[1.0, 1, 20, 22], [0, 0, 30, 30]]))
MORE_BOXES = (torch.tensor([[2.0, 3, 30, 25], [0, 0, 9, 9]]), torch.tensor([[5.0, 4, 9, 31]]))
ROIS = torch.tensor([[0.0, 1, 1, 5, 5], [1, 2, 0, 8, 6]])


def trace(module, inputs):
    """Trace, save and load; a warning of the tracer is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, inputs)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@each_layer
def test_layers_that_predict(name):
    layer, inputs = make_layer(name)
    torch.testing.assert_close(trace(layer, inputs)(*inputs), layer(*inputs))


# Maps with as many pixels in rows of another length, too: nothing but the numbers would tell.
SIZES = [(2, 4, 8, 12), (2, 4, 12, 8), (3, 4, 11, 7)]
OF_ONE_SIZE = {
    "DeformMaxPool2d": lambda: layers.DeformMaxPool2dPack(4, 3, 2, 1, offset_groups=2),
    "SpatialTransformer": lambda: layers.SpatialTransformer(4),
    "SpatialTransformer-pixels": lambda: layers.SpatialTransformer(4, padding_mode="reflection", per_pixel=True),
    "SpatialTransformer-size": lambda: layers.SpatialTransformer(4, output_size=(5, 1), align_corners=True),
}


def moved(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return layer


def test_active_convolutions_take_other_sizes():
    layer = moved(layers.ActiveConv2d(4, 6, 3, stride=2, padding=1))
    traced = trace(layer, (torch.rand(SIZES[0]),))
    for size in SIZES:
        x = torch.rand(size)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_samplers_take_maps_of_the_size_they_were_traced_with_alone(name):
    layer = moved(OF_ONE_SIZE[name]())
    traced = trace(layer, (torch.rand(SIZES[0]),))
    for images in (2, 3):
        x = torch.rand(images, *SIZES[0][1:])
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)
    for size in SIZES[1:]:
        with pytest.raises(RuntimeError, match="The expanded size of the tensor"):
            traced(torch.rand(size))


class Pyramid(nn.Module):
    def __init__(self, modulated):
        super().__init__()
        self.pool = MultiScaleDeformRoIPool(
            ["0", "1"], 2, 2, in_channels=4, deform_fc_channels=4, canonical_level=3, modulated=modulated
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, fine, coarse, *boxes):
        return self.pool({"0": fine, "1": coarse}, list(boxes), [(64, 64)] * 2)


class Operators(nn.Module):
    """A module of a user's, with the functions in it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x, offset, *boxes):
        x = ops.deform_conv2d(x, offset, self.weight, padding=(1, 1), mask=offset[:, ::2].sigmoid())
        boxes = list(boxes)
        return (
            ops.deform_roi_pool(x, boxes, output_size=2, spatial_scale=0.25)
            + ops.deform_ps_roi_pool(x.repeat(1, 4, 1, 1), boxes, output_dim=4, group_size=2, output_size=2)
            + ops.ps_roi_pool(x, torch.cat([nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)]),
                              output_dim=4, group_size=1, output_size=2)
        )  # fmt: skip


def image(size, channels=4):
    return torch.rand(2, channels, size, size + 1)


CALLED_WITH_OFFSETS = {
    "DeformConv2d": (
        lambda: layers.DeformConv2d(4, 6, 3, padding=1),
        lambda n: (image(n), torch.randn(2, 18, n, n + 1), torch.rand(2, 9, n, n + 1)),
    ),
    "DCNv2-padding": (lambda: layers.DCNv2(4, 6, (2, 3), padding="same"), lambda n: (image(n),)),
    "DeformRoIPool": (lambda: layers.DeformRoIPool(2), lambda n: (image(n), ROIS, torch.randn(2, 2, 2, 2))),
    "PSRoIPool": (lambda: layers.PSRoIPool(1, 2, 2), lambda n: (image(n), ROIS)),
    "DeformPSRoIPool": (
        lambda: layers.DeformPSRoIPool(1, 2, 2),
        lambda n: (image(n), ROIS, torch.randn(2, 2, 2, 2), torch.rand(2, 1, 2, 2)),
    ),
    "Operators": (
        Operators,
        lambda n: (image(n), torch.randn(2, 18, n, n + 1), *(BOXES if n == 8 else MORE_BOXES)),
    ),
}


@pytest.mark.parametrize("name", CALLED_WITH_OFFSETS)
def test_what_is_given_its_offsets(name):
    make, call = CALLED_WITH_OFFSETS[name]
    torch.manual_seed(0)
    module = make()
    traced = trace(module, call(8))
    for size in (8, 11):
        inputs = call(size)
        torch.testing.assert_close(traced(*inputs), module(*inputs))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("called_before", [False, True])
def test_pooling_from_a_pyramid(modulated, called_before):
    torch.manual_seed(0)
    module = Pyramid(modulated)
    maps = torch.rand(2, 4, 16, 16), torch.rand(2, 4, 8, 8)
    if called_before:
        module(*maps, *BOXES)
    traced = trace(module, (*maps, *BOXES))
    for boxes in (BOXES, MORE_BOXES):
        torch.testing.assert_close(traced(*maps, *boxes), module(*maps, *boxes))


def test_a_classifier():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_dcn", channels=(8, 8, 8, 8), num_classes=3).eval()
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.1)
    traced = trace(model, torch.rand(1, 3, 64, 64))
    x = torch.rand(2, 3, 96, 80)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_backbone_of_mmengine():
    pytest.importorskip("mmengine")
    config = dict(type="DCNResNet", depth=18, base_channels=8, dcn=dict(type="DCNv2", deform_groups=1))
    model = registry.MODELS.build(config | dict(stage_with_dcn=(False, True, True, True))).eval()
    x = torch.rand(1, 3, 64, 64)
    traced = trace(model, x)
    for found, expected in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


BACKBONE = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_type="deep", stem_width=8)
DETECTORS = {
    "faster_rcnn": dict(
        fpn_channels=8, box_head=dict(representation_size=8), rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=8,
        roi_pool=dict(type="MultiScaleDeformRoIPool", output_size=3, deform_fc_channels=8, modulated=True),
    ),
    "rfcn": dict(group_size=3, conv_channels=8, deformable=True, rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=8),
}  # fmt: skip


class Scores(nn.Module):
    """What a trace can return of a detector."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, image):
        (found,) = self.detector([image])
        return found["boxes"], found["scores"]


@pytest.mark.parametrize("name", DETECTORS)
def test_no_warning_for_a_detector_comes_from_this_package(name):
    """torchvision's own parts warn."""
    torch.manual_seed(0)
    detector = build_detector(
        dict(name=name, num_classes=3, backbone=BACKBONE, min_size=64, box_score_thresh=0.0, **DETECTORS[name])
    )
    model, x = Scores(detector).eval(), torch.rand(3, 64, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, x, check_trace=False)
    tracer = [w for w in caught if issubclass(w.category, torch.jit.TracerWarning)]
    assert tracer and not [f"{w.filename}:{w.lineno}" for w in tracer if "dcn_plugin" in w.filename]
    for found, expected in zip(traced(x), model(x), strict=True):
        assert len(expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_errors_are_the_same_while_tracing():
    layer = layers.DCNv2(4, 6, 3)
    with pytest.raises(ValueError, match=r"input: expected \[N, 4, H, W\], got \[1, 3, 8, 8\]"):
        torch.jit.trace(layer, torch.rand(1, 3, 8, 8))
    rois = torch.tensor([[7.0, 1, 1, 5, 5]])
    with pytest.raises(ValueError, match="rois: expected a batch index from 0 to 1"):
        torch.jit.trace(layers.DeformRoIPool(2), (torch.rand(2, 4, 8, 8), rois, torch.zeros(1, 2, 2, 2)))
    assert not torch.jit.is_tracing()
