"""peft's adapters, and any module put around what predicts offsets: same start, training, merging back."""

import copy
import os
from unittest import mock

import pytest
import timm
import torch
from torch import nn

from dcn_plugin.detection import MultiScaleDeformRoIPool
from dcn_plugin.detection.rfcn import PSRoIMaps
from dcn_plugin.layers import (
    DCNv1,
    DCNv2,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    OffsetConv,
    offset_parameters,
)

peft = pytest.importorskip("peft")

# peft's BOFT has a CUDA extension, which it tries to build, and warns of having none.
pytestmark = pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly")


@pytest.fixture(autouse=True)
def environment():
    """After a try that failed BOFT leaves CC and CXX at "gcc", with which nothing of C++ links."""
    with mock.patch.dict(os.environ):
        yield


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROIS = torch.tensor([[0, 1.0, 2.0, 12.0, 14.0], [1, 3.0, 0.0, 9.0, 11.0]])
CONFIGS = {
    "LoRA": lambda on: peft.LoraConfig(r=2, target_modules=on),
    "LoRA-gaussian": lambda on: peft.LoraConfig(r=2, target_modules=on, init_lora_weights="gaussian"),
    "DoRA": lambda on: peft.LoraConfig(r=2, target_modules=on, use_dora=True),
    "LoHa": lambda on: peft.LoHaConfig(r=2, target_modules=on),
    "LoKr": lambda on: peft.LoKrConfig(r=2, target_modules=on),
    "BOFT": lambda on: peft.BOFTConfig(boft_block_size=1, target_modules=on),
    "IA3": lambda on: peft.IA3Config(target_modules=on, feedforward_modules=[]),
    "HRA": lambda on: peft.HRAConfig(r=2, target_modules=on),
}
each_adapter = pytest.mark.parametrize("adapter", CONFIGS)
GEOMETRIES = {
    "padding": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, padding=1, stride=2, groups=1),
    "four-sided": dict(kernel_size=3, padding=(0, 0, 2, 2)),
    "four-sided, strided": dict(kernel_size=3, padding=(1, 0, 2, 3), stride=2),
    "same, even kernel": dict(kernel_size=2, padding="same"),
    "same, odd kernel": dict(kernel_size=3, padding="same"),
}


def moved(model, scale=0.05):
    """Offsets and masks that show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name in offset_parameters(model):
            model.get_parameter(name).uniform_(-scale, scale)
    return model.eval()


def check(model, config, *inputs):
    """The adapted model starts as the model, learns through the adapter, and keeps what it has learnt when merged."""
    with torch.no_grad():
        expected = model(*inputs)
    adapted = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(adapted(*inputs), expected, rtol=1e-4, atol=1e-5)
    adapted.train()
    adapted(*inputs).square().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn_like(p))
        outputs = adapted.eval()(*inputs)
        assert not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5), "the adapter has no effect"
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(*inputs), outputs, rtol=1e-3, atol=1e-4)
    return merged


@each_adapter
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_adapters_of_conv_offset(adapter, geometry):
    layer = DCNv2(3, 4, **GEOMETRIES[geometry], offset_groups=3)
    merged = check(nn.Sequential(moved(layer)), CONFIGS[adapter](["conv_offset"]), IMAGES)
    assert type(merged[0].conv_offset) is type(DCNv2(3, 4, 3).conv_offset)


@pytest.mark.parametrize("name", ["resnet18_dcn", "resnet18_dcnv1"])
@pytest.mark.parametrize("adapter", ["LoRA", "LoHa", "LoKr", "BOFT"])
def test_adapters_of_a_model(name, adapter):
    torch.manual_seed(0)
    model = timm.create_model(name, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3, zero_init_last=False)
    x = torch.rand(2, 3, 64, 64)
    check(moved(model), CONFIGS[adapter](["conv_offset"]), x)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = MultiScaleDeformRoIPool(["0"], 2, 2, in_channels=3, deform_fc_channels=4, modulated=True)

    def forward(self, x, rois):
        boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(x))]
        return self.pool({"0": x}, boxes, [(16, 16)] * len(x))


class Votes(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = PSRoIMaps(3, 2, stride=2, group_size=2, conv_channels=4, deformable=True)
        for conv in (self.maps.scores, self.maps.boxes):
            nn.init.normal_(conv.weight)

    def forward(self, x, rois):
        boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(x))]
        scores, deltas = self.maps({"0": x}, boxes, [(16, 16)] * len(x))
        return torch.cat([scores.flatten(), deltas.flatten()])


REGIONS = {
    "DeformRoIPoolPack": (lambda: nn.ModuleList([DeformRoIPoolPack(2, 3, 4)]), ["offset_fc.0", "offset_fc.4"]),
    "ModulatedDeformRoIPoolPack": (lambda: nn.ModuleList([ModulatedDeformRoIPoolPack(2, 3, 4)]), ["4", "mask_fc.2"]),
    "DeformPSRoIPoolPack": (
        lambda: nn.ModuleList([DeformPSRoIPoolPack(3, 1, 2, deform_fc_channels=4, modulated=True)]),
        ["offset_fc.4", "mask_fc"],
    ),
    "MultiScaleDeformRoIPool": (Pyramid, ["offset_fc.4", "mask_fc"]),
    "PSRoIMaps": (Votes, ["score_offsets.conv", "box_offsets.conv"]),
}


class Only(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.inner = layers[0]

    def forward(self, *inputs):
        return self.inner(*inputs)


@pytest.mark.parametrize("adapter", ["LoRA", "LoHa", "LoKr", "BOFT"])
@pytest.mark.parametrize("name", REGIONS)
def test_adapters_of_what_moves_regions(name, adapter):
    torch.manual_seed(0)
    make, on = REGIONS[name]
    model = make()
    model = Only(model) if isinstance(model, nn.ModuleList) else model
    check(moved(model, 0.8), CONFIGS[adapter](on), IMAGES, ROIS)


# -- anything else around ----------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Calls what it wraps, and has nothing of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("cls", [DCNv1, DCNv2])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_module_around_conv_offset(cls, geometry):
    layer = moved(cls(3, 4, **GEOMETRIES[geometry]))
    expected, parts = layer(IMAGES), layer.offsets(IMAGES)
    layer.conv_offset = Around(layer.conv_offset)
    assert torch.equal(layer(IMAGES), expected)
    for found, part in zip(layer.offsets(IMAGES), parts, strict=True):
        assert found is part is None or torch.equal(found, part)
    assert "Around" in repr(layer)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(IMAGES), expected)
    missing, unexpected = copied.load_state_dict({"conv_offset.weight": torch.zeros(2)}, strict=False)
    assert unexpected == ["conv_offset.weight"] and "conv_offset.inner.weight" in missing


@pytest.mark.parametrize("name", REGIONS)
def test_a_module_around_a_part_of_a_branch(name):
    torch.manual_seed(0)
    make, on = REGIONS[name]
    model = make()
    model = Only(model) if isinstance(model, nn.ModuleList) else model
    expected = moved(model)(IMAGES, ROIS)
    wrapped = [n for n, _ in model.named_modules() if n.endswith(tuple(f".{part}" for part in on))]
    assert len(wrapped) == len(on)
    for path in wrapped:
        model.set_submodule(path, Around(model.get_submodule(path)))
    assert torch.equal(model(IMAGES, ROIS), expected)


@pytest.mark.parametrize("make", [lambda: DeformRoIPoolPack(2, 3, 4), lambda: ModulatedDeformRoIPoolPack(2, 3, 4)])
def test_a_module_around_a_whole_branch(make):
    layer = moved(make())
    expected = layer(IMAGES, ROIS)
    layer.offset_fc = Around(layer.offset_fc)
    assert torch.equal(layer(IMAGES, ROIS), expected)


def test_conv_offset_has_the_constructor_of_a_convolution():
    made = type(DCNv2(3, 4, 3).conv_offset)(
        3, 4, kernel_size=(3, 2), stride=2, padding=1, dilation=2, groups=1, bias=False, padding_mode="reflect"
    )
    assert isinstance(made, nn.Conv2d) and made.bias is None and not made.weight.any()
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, (3, 2), 2, 1, 2, bias=False, padding_mode="reflect")
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made(IMAGES), plain(IMAGES))
    assert issubclass(DCNv2, OffsetConv)
