"""RF-DETR's smallest model, with random weights, on our operator: the same results and gradients, and theirs again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rfdetr")

from rfdetr.config import RFDETRNanoConfig, TrainConfig  # noqa: E402
from rfdetr.models.lwdetr import build_model_from_config  # noqa: E402
from rfdetr.models.ops import functions  # noqa: E402
from rfdetr.models.ops.modules import ms_deform_attn  # noqa: E402
from rfdetr.utilities.tensors import nested_tensor_from_tensor_list  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from dcn_plugin.integrations.rfdetr import accelerate, installed  # noqa: E402


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    # A name in the place of weights: without one, their backbone's would be fetched.
    config = RFDETRNanoConfig(pretrain_weights="none.pth", device="cpu", num_classes=3)
    folder = str(tmp_path_factory.mktemp("rfdetr"))
    model = build_model_from_config(config, TrainConfig(dataset_dir=folder, output_dir=folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name or "bbox_embed.layers.2" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def outputs(model):
    torch.manual_seed(1)
    return [t for t in tree_leaves(model(nested_tensor_from_tensor_list([*torch.rand(2, 3, 128, 128)])))]


def test_results_and_gradients(detector):
    wanted = outputs(detector)
    sum(t.square().mean() for t in wanted).backward()
    gradients = {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}
    detector.zero_grad()
    theirs = functions.ms_deform_attn_core_pytorch
    with accelerate() as accelerated:
        assert {"rfdetr.models.ops.functions", "rfdetr.models.ops.modules.ms_deform_attn"} <= {*installed()}
        assert ms_deform_attn.ms_deform_attn_core_pytorch is functions.ms_deform_attn_core_pytorch is not theirs
        found = outputs(detector)
        sum(t.square().mean() for t in found).backward()
    assert "ms_deform_attn_core_pytorch of models.ops" in str(accelerated)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    moved = [name for name in gradients if "sampling_offsets" in name]
    assert moved and all(gradients[name].any() for name in moved)
    overall = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in detector.named_parameters():
        if name in gradients:
            largest = gradients[name].abs().max() + 1e-3 * overall
            torch.testing.assert_close(parameter.grad / largest, gradients[name] / largest, rtol=0, atol=1e-4)
    assert installed() == () and ms_deform_attn.ms_deform_attn_core_pytorch is theirs
    assert all(torch.equal(one, other) for one, other in zip(outputs(detector), wanted, strict=True))


def test_both_forms_of_their_module():
    """As it runs, and as it is made to be exported: other shapes, and sizes in Python."""
    torch.manual_seed(0)
    layer = ms_deform_attn.MSDeformAttn(32, 2, 4, 3)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    shapes, query, value = [(6, 5), (3, 4)], torch.randn(2, 7, 32), torch.randn(2, 42, 32)
    first = torch.tensor([0, 30])
    for export in (False, True):
        if export:
            layer.export()
        for boxes in (torch.rand(2, 7, 2, 2), torch.rand(2, 7, 1, 4)):
            given = query, boxes, value, torch.tensor(shapes), first
            wanted = layer(*given, input_spatial_shapes_hw=shapes)
            with accelerate():
                torch.testing.assert_close(layer(*given, input_spatial_shapes_hw=shapes), wanted, rtol=1e-4, atol=1e-5)
                if not export:
                    torch.testing.assert_close(layer(*given), wanted, rtol=1e-4, atol=1e-5)
