"""Detectors against torchvision's own, against values worked out by hand, and as torchvision's users use them."""

import copy
import operator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcn_plugin import load_checkpoint, ops
from dcn_plugin.detection import MultiScaleDeformRoIPool
from dcn_plugin.detection.faster_rcnn import DETECTORS, build_detector, faster_rcnn, rfcn
from dcn_plugin.detection.rfcn import PSRoIMaps
from dcn_plugin.layers import offset_parameters

TINY: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_type="deep", stem_width=8, in_chans=1)
PLAIN, DCN = dict(TINY, name="resnet18"), dict(TINY, name="resnet18_dcn")
SMALL = dict(min_size=64, rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=20, box_score_thresh=0.0)
FASTER = dict(SMALL, fpn_channels=16, box_head=dict(representation_size=32))
RFCN = dict(SMALL, group_size=3, conv_channels=32)
DEFORM_POOL = dict(type="MultiScaleDeformRoIPool", output_size=5, deform_fc_channels=32, modulated=True)
SPECS: dict[str, dict[str, Any]] = {
    "faster": dict(name="faster_rcnn", num_classes=4, backbone=PLAIN, **FASTER),
    "faster-deform": dict(name="faster_rcnn", num_classes=4, backbone=DCN, roi_pool=DEFORM_POOL, **FASTER),
    "rfcn": dict(name="rfcn", num_classes=4, backbone=PLAIN, **RFCN),
    "rfcn-deform": dict(name="rfcn", num_classes=4, backbone=DCN, deformable=True, **RFCN),
}
each = pytest.mark.parametrize("name", SPECS)


def images(*sizes: tuple[int, int], channels: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(channels, *size, generator=generator) for size in sizes]


def targets() -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [30.0, 8.0, 60.0, 60.0]])
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return [dict(boxes=boxes, labels=torch.tensor([1, 3])), nothing]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"boxes", "labels", "scores"} and len(one["boxes"])
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=1e-2)


# -- every detector ---------------------------------------------------------------------------------------------------


@each
def test_losses_are_torchvisions_and_reach_every_parameter(name):
    torch.manual_seed(0)
    model = build_detector(SPECS[name])
    losses = model(images((64, 64), (48, 72)), targets())
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    # What predicts offsets must learn from the start, though it starts at zero.
    for key in offset_parameters(model):
        if key.endswith(("4.weight", "4.bias", "conv.bias")) and "box_roi_pool" in key:
            assert dict(model.named_parameters())[key].grad.abs().max() > 0, key


@each
def test_an_image_without_objects_trains(name):
    model = build_detector(SPECS[name])
    losses = model(images((64, 64)), targets()[1:])
    assert losses["loss_box_reg"] == 0 and losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@each
def test_detections_lie_in_images_of_any_size(name):
    torch.manual_seed(0)
    model = build_detector(SPECS[name]).eval()
    sizes = [(64, 64), (50, 90)]
    for found, (height, width) in zip(model(images(*sizes)), sizes, strict=True):
        boxes = found["boxes"]
        assert len(boxes) == len(found["labels"]) == len(found["scores"]) > 0
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and set(found["labels"].tolist()) <= {1, 2, 3}


@each
def test_state_dict_and_deepcopy_round_trip(name):
    torch.manual_seed(0)
    model, other = build_detector(SPECS[name]).eval(), build_detector(SPECS[name]).eval()
    for value in model.state_dict().values():  # nothing left at its initial value
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.01)
    other.load_state_dict(model.state_dict())
    batch = images((64, 64))
    expected = model(batch)
    assert_same(other(batch), expected)
    assert_same(copy.deepcopy(model)(batch), expected)


@each
def test_bfloat16_autocast(name):
    torch.manual_seed(0)
    model = build_detector(SPECS[name])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images((64, 64)), targets()[:1])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.cuda
@pytest.mark.parametrize("library", ["cudnn", "cuda.matmul"])
def test_comparisons_with_a_gpu_are_of_float32(library):
    """conftest.py sees to it for every test with this mark: cuDNN rounds to TF32 unless it is told not to."""
    assert not operator.attrgetter(library)(torch.backends).allow_tf32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_gpu_computes_the_same(name):
    torch.manual_seed(0)
    model = build_detector(SPECS[name]).eval()
    batch = images((64, 64), (48, 72))
    expected = model(batch)
    model.cuda()
    found = model([image.cuda() for image in batch])
    assert_same([{key: value.cpu() for key, value in one.items()} for one in found], expected)
    moved = [{key: value.cuda() for key, value in target.items()} for target in targets()]
    losses = model.train()([image.cuda() for image in batch], moved)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -- Faster R-CNN -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    return FasterRCNN(backbone, num_classes=4, **SMALL).eval()


def test_faster_rcnn_is_torchvisions(torchvisions):
    model = faster_rcnn(4, "resnet18", **SMALL)
    assert isinstance(model, FasterRCNN) and model.backbone.out_channels == 256
    model.load_state_dict(torchvisions.state_dict())
    batch = images((64, 64), (80, 120), channels=3)
    expected = torchvisions(batch)
    assert_same(model.eval()(batch), expected)
    torch.manual_seed(5)  # samplers draw
    found = model.train()(batch, targets())
    torch.manual_seed(5)
    for key, loss in copy.deepcopy(torchvisions).train()(batch, targets()).items():
        torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-5)


def test_a_fresh_deformable_detector_continues_torchvisions_weights(torchvisions):
    pool = dict(type="MultiScaleDeformRoIPool", deform_fc_channels=16)
    model = faster_rcnn(4, "resnet18_dcn", roi_pool=pool, **SMALL)
    assert isinstance(model.roi_heads.box_roi_pool, MultiScaleDeformRoIPool)
    load_checkpoint(model, torchvisions.state_dict(), allow_missing=["*.conv_offset.*", "*.offset_fc.*"])
    batch = images((64, 96), channels=3)
    assert_same(model.eval()(batch), torchvisions(batch))


def test_options_reach_torchvision():
    anchors = dict(sizes=((8,), (16,), (32,), (64,), (128,)), aspect_ratios=((1.0, 2.0),) * 5)
    model = faster_rcnn(
        3, PLAIN, fpn_channels=16, max_size=100, size_divisible=64, image_std=[0.5], rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_test=7, box_detections_per_img=9, bbox_reg_weights=(1.0, 2.0, 3.0, 4.0),
        box_head=dict(type="FastRCNNConvFCHead", conv_layers=[12], fc_layers=[20]),
    )  # fmt: skip
    assert model.transform.max_size == 100 and model.transform.size_divisible == 64
    assert model.transform.image_std == [0.5] and model.transform.image_mean == [pytest.approx(0.449)]
    assert model.rpn.anchor_generator.num_anchors_per_location() == [2] * 5
    assert model.rpn._post_nms_top_n["testing"] == 7 and model.roi_heads.detections_per_img == 9
    assert model.roi_heads.box_coder.weights == (1.0, 2.0, 3.0, 4.0)
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (3, 20)
    assert model.rpn.head.cls_logits.out_channels == 2
    same = rfcn(3, PLAIN, max_size=100, bbox_reg_weights=(1.0, 2.0, 3.0, 4.0), box_detections_per_img=9, **RFCN)
    assert same.transform.max_size == 100 and same.transform.image_mean == [pytest.approx(0.449)]
    assert same.roi_heads.detections_per_img == 9 and same.roi_heads.box_coder.weights == (1.0, 2.0, 3.0, 4.0)


def test_modules_of_ones_own():
    class Head(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(16 * 49, 10), nn.ReLU())

    model = faster_rcnn(3, PLAIN, fpn_channels=16, box_head=Head())
    assert model.roi_heads.box_predictor.cls_score.in_features == 10
    with pytest.raises(ValueError, match="box_predictor.*Flatten"):
        faster_rcnn(3, PLAIN, fpn_channels=16, box_head=nn.Flatten())


def test_default_anchors_are_torchvisions_for_its_strides():
    model = faster_rcnn(3, PLAIN, fpn_channels=16)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    three = faster_rcnn(3, dict(PLAIN, out_indices=(2, 3, 4)), fpn_channels=16)
    assert three.rpn.anchor_generator.sizes == ((64,), (128,), (256,), (512,))
    assert three.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2"]


def test_the_strides_are_the_backbones_whatever_the_first_image():
    """torchvision infers them from the first batch; a small padded image misleads it for good."""
    model = faster_rcnn(3, PLAIN, **dict(FASTER, min_size=40, size_divisible=64)).eval()
    model(images((40, 40)))
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert (model.roi_heads.box_roi_pool.map_levels.k_min, model.roi_heads.box_roi_pool.map_levels.k_max) == (2, 5)
    some = faster_rcnn(3, PLAIN, fpn_channels=16, roi_pool=dict(featmap_names=["1", "2"])).roi_heads.box_roi_pool
    assert some.scales == [1 / 8, 1 / 16] and (some.map_levels.k_min, some.map_levels.k_max) == (3, 4)


def test_any_timm_model_is_a_backbone():
    swin = dict(name="swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1), embed_dim=12)
    model = faster_rcnn(4, dict(swin, num_heads=(1, 2, 3, 4)), **dict(FASTER, fixed_size=(64, 64)))
    assert model.backbone.strides == [4, 8, 16, 32]
    losses = model(images((64, 64), channels=3), targets()[:1])
    assert all(loss.isfinite() for loss in losses.values())


# -- R-FCN ------------------------------------------------------------------------------------------------------------


def rfcn_maps(**options) -> PSRoIMaps:
    torch.manual_seed(0)
    maps = PSRoIMaps(6, num_classes=3, stride=8, group_size=2, conv_channels=5, **options)
    for conv in (maps.conv, maps.scores, maps.boxes):
        nn.init.normal_(conv.weight, std=0.5)
    return maps


BOXES = [torch.tensor([[0.0, 0.0, 32.0, 40.0], [8.0, 16.0, 60.0, 50.0]]), torch.tensor([[10.0, 4.0, 50.0, 61.0]])]


@pytest.mark.parametrize("deformable", [False, True])
def test_bins_read_the_maps_of_their_own_position_and_class(deformable):
    maps = rfcn_maps(deformable=deformable)
    for conv in (maps.scores, maps.boxes):
        nn.init.zeros_(conv.weight)
        with torch.no_grad():
            conv.bias.copy_(torch.arange(float(conv.out_channels)))
    scores, deltas = maps({"0": torch.rand(2, 6, 9, 9)}, BOXES, [(64, 64)] * 2)
    # Channel (class * k + row) * k + column, as in the paper's figure 1.
    torch.testing.assert_close(scores, torch.arange(12.0).reshape(1, 3, 2, 2).expand(3, -1, -1, -1))
    torch.testing.assert_close(deltas, torch.arange(16.0).reshape(1, 4, 2, 2).expand(3, -1, -1, -1))


@pytest.mark.parametrize("deformable", [False, True])
def test_boxes_that_are_inside_out_are_regions_of_the_least_size(deformable):
    """0.1 pixels of the map: each bin reads the one pixel (or, deformable, the place) at which its box begins."""
    maps = rfcn_maps(deformable=deformable, offset_scale=0.2)
    features = {"0": torch.rand(2, 6, 9, 9)}
    turned = [torch.tensor([[24.0, 40.0, 3.0, 5.0], [8.0, 64.0, -1.0, 9.0]]), torch.tensor([[16.0, 32.0, 15.0, 31.0]])]
    scores, deltas = maps(features, turned, [(72, 72)] * 2)
    places = [(0, 5, 3), (0, 8, 1), (1, 4, 2)]
    x = torch.relu(maps.conv(features["0"]))
    for found, conv in ((scores, maps.scores), (deltas, maps.boxes)):
        values = conv(x)
        if not deformable:
            expected = torch.stack([values[n, :, y, x] for n, y, x in places])
            torch.testing.assert_close(found, expected.reshape(found.shape))
        else:  # half a pixel before it, and less than 0.1 behind that
            around = torch.stack([values[n, :, y - 1 : y + 1, x - 1 : x + 1].mean((1, 2)) for n, y, x in places])
            bound = 0.1 * (values.amax((2, 3)) - values.amin((2, 3)))[[0, 0, 1]] * 2
            assert ((found.flatten(1) - around).abs() <= bound).all()
    sum(t.square().sum() for t in (scores, deltas)).backward()
    assert all(p.grad.isfinite().all() for p in maps.parameters() if p.grad is not None)
    assert all(conv.weight.grad.any() for conv in (maps.conv, maps.scores, maps.boxes))


def test_votes_are_averaged_and_every_class_gets_the_one_box():
    model = rfcn(4, PLAIN, **RFCN)
    pooled = torch.rand(5, 4, 3, 3), torch.rand(5, 4, 3, 3)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    torch.testing.assert_close(logits, pooled[0].flatten(2).mean(2))
    for label in range(4):
        torch.testing.assert_close(deltas.reshape(5, 4, 4)[:, label], pooled[1].flatten(2).mean(2))
    each_class = rfcn(4, PLAIN, class_agnostic=False, **RFCN).roi_heads
    assert each_class.box_roi_pool.boxes.out_channels == 9 * 16
    votes = torch.rand(5, 4), torch.rand(5, 16)
    assert torch.equal(each_class.box_predictor(votes)[1], votes[1])


@pytest.mark.parametrize("class_aware", [True, False])
def test_offset_fields_shift_the_bins(class_aware):
    maps = rfcn_maps(deformable=True, class_aware_offsets=class_aware, offset_scale=0.2, samples_per_part=3)
    classes = 3 if class_aware else 1
    features = {"0": torch.rand(2, 7, 8, 8), "1": torch.rand(2, 6, 8, 8)}
    common = dict(group_size=2, output_size=2, spatial_scale=1 / 8, offset_scale=0.2, samples_per_part=3)
    x = torch.relu(maps.conv(features["1"]))

    def expected(offset, box_offset):
        return (
            ops.deform_ps_roi_pool(maps.scores(x), BOXES, offset, output_dim=3, **common),
            ops.deform_ps_roi_pool(maps.boxes(x), BOXES, box_offset, output_dim=4, **common),
        )

    still = maps(features, BOXES, [(64, 64)] * 2)
    for found, value in zip(still, expected(None, None), strict=True):
        torch.testing.assert_close(found, value)
    with torch.no_grad():  # a bias is a field that is the same everywhere: the pooled offset is the bias itself
        maps.score_offsets.conv.bias.normal_()
        maps.box_offsets.conv.bias.normal_()
    offset = maps.score_offsets.conv.bias.detach().reshape(1, 2 * classes, 2, 2).expand(3, -1, -1, -1)
    box_offset = maps.box_offsets.conv.bias.detach().reshape(1, 2, 2, 2).expand(3, -1, -1, -1)
    moved = maps(features, BOXES, [(64, 64)] * 2)
    torch.testing.assert_close(maps.offsets(features, BOXES, [(64, 64)] * 2)[0], offset)
    for found, value, before in zip(moved, expected(offset, box_offset), still, strict=True):
        torch.testing.assert_close(found, value)
        assert not torch.allclose(found, before)


def test_rfcn_reads_two_maps_at_stride_16():
    model = rfcn(3, PLAIN, **RFCN)
    assert isinstance(model, GeneralizedRCNN)
    assert model.backbone.strides == [16, 16] and model.backbone.channels == [32, 64]
    assert model.rpn.head.conv[0][0].in_channels == 32 and model.roi_heads.box_roi_pool.conv.in_channels == 64
    assert model.rpn.anchor_generator.sizes == ((64, 128, 256, 512),)
    one = rfcn(3, dict(PLAIN, output_stride=8, out_indices=(4,)), **RFCN)
    assert one.backbone.strides == [8] and one.rpn.anchor_generator.sizes == ((32, 64, 128, 256),)
    assert rfcn(3, dict(PLAIN, output_stride=None), **RFCN).backbone.strides == [16, 32]


def test_offset_parameters_of_detectors():
    found = offset_parameters(build_detector(SPECS["rfcn-deform"]))
    fields = {key: value for key, value in found.items() if "conv_offset" not in key}
    path = "roi_heads.box_roi_pool"
    assert fields == {f"{path}.{n}_offsets.conv.{p}": 1.0 for n in ("score", "box") for p in ("weight", "bias")}
    found = offset_parameters(build_detector(SPECS["faster-deform"]))
    assert {value for key, value in found.items() if "box_roi_pool" in key} == {0.01}
    with pytest.raises(ValueError, match="deformable=True"):
        build_detector(SPECS["rfcn"]).roi_heads.box_roi_pool.offsets({"0": torch.rand(1, 64, 4, 4)}, BOXES[:1], [])


# -- freezing ---------------------------------------------------------------------------------------------------------


STAGES = {5: (), 4: ("conv1", "bn1"), 3: ("conv1", "bn1", "layer1"), 0: ("conv1", "bn1", "layer")}


@pytest.mark.parametrize(("trainable", "frozen"), STAGES.items())
def test_stages_are_frozen_as_in_torchvision(trainable, frozen):
    model = faster_rcnn(4, PLAIN, trainable_backbone_layers=trainable, **FASTER).train()
    for name, parameter in model.backbone.body.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen or "-"), name
    training = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert all(not name.startswith(tuple(f"backbone.body.{f}" for f in frozen or "-")) for name in training)
    assert ("backbone.body.layer4.0.bn1" in training) == bool(trainable)
    before = model.backbone.body.layer1[0].bn1.running_mean.clone()
    model(images((64, 64)), targets()[:1])
    assert torch.equal(before, model.backbone.body.layer1[0].bn1.running_mean) == (trainable < 4)
    model.eval()
    assert not any(m.training for m in model.modules())


def test_a_pretrained_backbone_keeps_its_statistics_and_its_first_stages(tmp_path):
    import timm

    torch.save(timm.create_model("resnet18", **TINY).state_dict(), tmp_path / "resnet.pth")
    trained = dict(PLAIN, checkpoint_path=str(tmp_path / "resnet.pth"))
    model = faster_rcnn(3, trained, **FASTER).train()
    assert not any(m.training for m in model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d))
    frozen = {name for name, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("conv1", "bn1", "layer1")) for name in frozen)
    assert model.backbone.body.layer2[0].bn1.weight.requires_grad
    free = faster_rcnn(3, trained, trainable_backbone_layers=5, norm_eval=False, **FASTER).train()
    assert all(p.requires_grad for p in free.parameters()) and free.backbone.body.bn1.training


def test_stages_of_other_families_are_frozen():
    convnext = dict(name="convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    model = faster_rcnn(3, convnext, trainable_backbone_layers=2, **FASTER)
    trains = {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trains == {"stages_2", "stages_3"}
    # Projections that lead from stage to stage are defined behind all stages.
    dat = dict(name="dat_tiny", dim=16, depths=(2, 2, 2, 2), spec=("LS", "LS", "LD", "LD"), heads=(1, 2, 4, 8))
    model = faster_rcnn(3, dict(dat, groups=(0, 0, 1, 2), img_size=64), trainable_backbone_layers=2, **FASTER)
    names = (name.split(".") for name, p in model.backbone.body.named_parameters() if p.requires_grad)
    trains = {".".join(name[1:3]) for name in names}
    assert trains == {"stages.2", "stages.3", "down_projs.1", "down_projs.2"}


def test_detectors_table():
    assert set(DETECTORS) == {"faster_rcnn", "rfcn"}
