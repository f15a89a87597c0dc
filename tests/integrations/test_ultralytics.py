"""ultralytics' RT-DETR, made small, on our operator: the same results and gradients, and theirs again afterwards."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ultralytics")

from torch.utils._pytree import tree_leaves  # noqa: E402
from ultralytics.nn.modules import transformer, utils  # noqa: E402
from ultralytics.nn.modules.head import RTDETRDecoder  # noqa: E402

from dcn_plugin.integrations.ultralytics import accelerate, installed  # noqa: E402


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    model = RTDETRDecoder(nc=3, ch=(16, 16, 16), hd=32, nq=20, nh=4, ndp=4, ndl=2, d_ffn=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as after a training: what is predicted moves samples
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name or "bbox_head" in name:
                parameter.normal_(std=0.2)
    return model.train()


def maps():
    return [torch.randn(2, 16, size, size, generator=torch.Generator().manual_seed(size)) for size in (12, 6, 3)]


def boxes_and_scores(model):
    return [t for t in tree_leaves(model(maps())) if torch.is_tensor(t)]


def test_results_and_gradients(decoder):
    wanted = boxes_and_scores(decoder)
    sum(t.square().sum() for t in wanted).backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    theirs = transformer.multi_scale_deformable_attn_pytorch
    with accelerate() as accelerated:
        assert {"ultralytics.nn.modules.utils", "ultralytics.nn.modules.transformer"} <= {*installed()}
        assert (
            transformer.multi_scale_deformable_attn_pytorch is utils.multi_scale_deformable_attn_pytorch is not theirs
        )
        found = boxes_and_scores(decoder)
        sum(t.square().sum() for t in found).backward()
    assert "multi_scale_deformable_attn_pytorch of nn.modules" in str(accelerated)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    moved = [name for name in gradients if "sampling_offsets" in name]
    assert len(moved) == 4 and all(gradients[name].any() for name in moved)
    overall = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in decoder.named_parameters():
        if name in gradients:
            largest = gradients[name].abs().max() + 1e-3 * overall
            torch.testing.assert_close(parameter.grad / largest, gradients[name] / largest, rtol=0, atol=1e-4)
    assert installed() == () and transformer.multi_scale_deformable_attn_pytorch is theirs
    assert all(torch.equal(one, other) for one, other in zip(boxes_and_scores(decoder), wanted, strict=True))


def test_it_is_ours_that_runs(decoder, monkeypatch):
    """And in their own tracing exporters it is theirs."""
    layer, value = decoder.decoder.layers[0].cross_attn.requires_grad_(False), torch.randn(2, 189, 32)
    shapes, query, boxes = [[12, 12], [6, 6], [3, 3]], torch.randn(2, 5, 32), torch.rand(2, 5, 1, 4)
    with accelerate():
        monkeypatch.setattr(
            utils.multi_scale_deformable_attn_pytorch.__wrapped__, "__code__", (lambda *_: 1 / 0).__code__
        )
        layer(query, boxes, value, shapes)
        with pytest.raises(ZeroDivisionError):
            torch.jit.trace(lambda *t: layer(*t, shapes), (query, boxes, value))
