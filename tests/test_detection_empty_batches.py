"""Training batches that leave a detector little or nothing to learn from: losses and gradients stay numbers."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from test_detection_models import SPECS, images, targets
from torchvision.models.detection.roi_heads import RoIHeads

from dcn_plugin.detection.faster_rcnn import build_detector

HEAD = dict(type="FastRCNNConvFCHead", conv_layers=(8,), fc_layers=(16,))
SPECS = SPECS | {
    "faster-deform-norms": dict(SPECS["faster-deform"], box_head=HEAD),
    "rfcn-deform-each-class": dict(SPECS["rfcn-deform"], class_agnostic=False),
}
SOME, NONE = targets()
HEADS = ("loss_classifier", "loss_box_reg")


def losses_of(model, boxes, proposals):
    if not proposals:
        model.rpn.score_thresh = 2.0  # a probability that no proposal has
    with torch.autograd.set_detect_anomaly(True):
        losses = model(images((64, 64), (64, 64)), [dict(target) for target in boxes])
        sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("boxes", [(SOME, SOME), (SOME, NONE), (NONE, NONE)], ids=("all", "some", "none"))
@pytest.mark.parametrize("proposals", [True, False], ids=("proposals", "no-proposals"))
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_losses_and_gradients_are_numbers(name, boxes, proposals):
    torch.manual_seed(0)
    model = build_detector(SPECS[name])
    losses = losses_of(model, boxes, proposals)
    assert all(loss.isfinite() for loss in losses.values()), losses
    # Every parameter has a gradient, which processes that train together wait for.
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [key for key, value in model.named_buffers() if not value.isfinite().all()] == []
    without_boxes = not any(len(target["boxes"]) for target in boxes)
    assert without_boxes == (losses["loss_box_reg"].item() == 0)
    assert (without_boxes and not proposals) == (losses["loss_classifier"].item() == 0)
    if without_boxes and not proposals:
        heads = {key: p for key, p in model.named_parameters() if key.startswith("roi_heads.")}
        assert heads and not any(p.grad.any() for p in heads.values())
        assert losses["loss_objectness"] > 0  # the proposal network learns that there is nothing


@pytest.mark.parametrize("name", ["faster", "rfcn"])
@pytest.mark.parametrize("boxes", [(SOME, SOME), (NONE, SOME), (NONE, NONE)], ids=("all", "some", "none"))
def test_other_batches_have_torchvisions_own_losses(name, boxes):
    found = []
    for forward in (None, RoIHeads.forward):
        torch.manual_seed(0)
        model = build_detector(SPECS[name])
        if forward is not None:
            model.roi_heads.forward = forward.__get__(model.roi_heads)
        found.append(model(images((64, 64), (64, 64)), [dict(target) for target in boxes]))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1]) and set(HEADS) < set(found[1])


@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_detected_without_proposals(name):
    model = build_detector(SPECS[name]).eval()
    model.rpn.score_thresh = 2.0
    (found,) = model(images((64, 64)))
    assert found["boxes"].shape == (0, 4) and not len(found["labels"]) and not len(found["scores"])
