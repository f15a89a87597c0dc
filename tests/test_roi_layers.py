"""RoI pooling layers against torchvision's RoIAlign, mmcv's published numbers and direct arithmetic."""

import copy
import io
import logging
import math
import pickle
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.fx
from run_python import run_python
from torch import nn

import dcn_plugin
from dcn_plugin.layers import (
    LAYERS,
    DCNv1,
    DCNv2,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
    PSRoIPool,
    drop_ins,
    offset_parameters,
)

torchvision = pytest.importorskip("torchvision")
roi_align = torchvision.ops.roi_align
MultiScaleRoIAlign = torchvision.ops.MultiScaleRoIAlign
MultiScaleDeformRoIPool = pytest.importorskip("dcn_plugin.detection").MultiScaleDeformRoIPool

MMCV_PACKS = [DeformRoIPoolPack, ModulatedDeformRoIPoolPack]
ROIS = torch.tensor([[0, 2.0, 3.0, 12.0, 11.0], [1, 0.0, 1.0, 9.5, 15.0], [0, 4.5, 2.5, 6.0, 14.0]]).double()
HALF = torch.cat([ROIS[:, :1], ROIS[:, 1:] / 2], 1)  # in pixels of a map of half the size
DOUBLE = dict(dtype=torch.float64)

# Layers that take (input with 8 channels, rois); keywords go to those that have parameters.
MAKE = {
    "DeformRoIPool": lambda **kw: DeformRoIPool((2, 3), 0.5, 2),
    "DeformRoIPoolPack": lambda **kw: DeformRoIPoolPack((2, 3), 8, 16, 0.5, 2, **kw),
    "ModulatedDeformRoIPoolPack": lambda **kw: ModulatedDeformRoIPoolPack((2, 3), 8, 16, 0.5, 2, **kw),
    "PSRoIPool": lambda **kw: PSRoIPool(2, 2, (2, 3), 0.5),
    "DeformPSRoIPool": lambda **kw: DeformPSRoIPool(2, 2, (2, 3), 0.5),
    "DeformPSRoIPoolPack": lambda **kw: DeformPSRoIPoolPack(2, 2, (2, 3), 0.5, deform_fc_channels=16, **kw),
    "modulated DeformPSRoIPoolPack": lambda **kw: DeformPSRoIPoolPack(
        2, 2, (2, 3), 0.5, part_size=2, deform_fc_channels=16, offset_classes=2, modulated=True, **kw
    ),
}
PACKS = [name for name in MAKE if name.endswith("Pack")]
every_layer = pytest.mark.parametrize("name", MAKE)
every_pack = pytest.mark.parametrize("name", PACKS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(layer, scale=0.3):
    """Give the branches weights that move the bins and weigh them."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=scale)
            nn.init.normal_(module.bias, std=scale)
    return layer


def image(channels=8, size=8, **options):
    return torch.randn(2, channels, size, size, **DOUBLE | options)


def ramp(dy, dx, channels=1, size=24):
    """A map that grows by dy downwards and dx to the right: bilinear samples of it are known in closed form."""
    y, x = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    return (dy * y + dx * x).expand(1, channels, size, size).clone()


# mmcv's names: numbers, state dict, (x, y)


@pytest.mark.parametrize(
    ("pixels", "end", "expected", "gradient"),
    [
        ([[1, 2], [3, 4]], 1, [[1, 1.25], [1.5, 1.75]], [[3.0625, 0.4375], [0.4375, 0.0625]]),
        (
            [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]],
            3,
            [[1.9375, 4.75], [7.5625, 10.375]],
            [
                [0.47265625, 0.4296875, 0.4296875, 0.04296875],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.04296875, 0.0390625, 0.0390625, 0.00390625],
            ],
        ),
    ],
    ids=["2x2", "4x4"],
)
@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (DeformRoIPool(2, 1.0, 2), 1.0),
        (DeformRoIPoolPack(2, 1, 8, 1.0, 2, **DOUBLE), 1.0),
        (ModulatedDeformRoIPoolPack(2, 1, 8, 1.0, 2, **DOUBLE), 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_that_mmcv_expects(layer, factor, pixels, end, expected, gradient):
    """Values of mmcv's own tests of deform_roi_pool, where the offsets are 0.

    The first by hand: along each axis the samples are at -0.375, -0.125 (both read pixel 0), 0.125 and 0.375, so the
    bins are at 0 and 0.25 on a map that is 1 + x + 2 y. Pixel 0 has the weights 1 and 0.75, pixel 1 has 0 and 0.25.
    """
    x = torch.tensor(pixels, **DOUBLE)[None, None].requires_grad_()
    out = layer(x, torch.tensor([[0, 0, 0, end, end]], **DOUBLE))
    torch.testing.assert_close(out, factor * torch.tensor(expected, **DOUBLE)[None, None])
    grad = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(grad, factor * torch.tensor(gradient, **DOUBLE)[None, None])


@pytest.mark.parametrize("ratio", [0, -1, 1, 3])
@pytest.mark.parametrize(("cls", "factor"), [(DeformRoIPoolPack, 1), (ModulatedDeformRoIPoolPack, 0.5)])
def test_fresh_pack_is_roi_align(cls, factor, ratio):
    layer = cls((2, 3), 8, 16, 0.5, ratio, **DOUBLE)
    x = image(requires_grad=True)
    out, expected = layer(x, ROIS), factor * roi_align(x, ROIS, (2, 3), 0.5, ratio, aligned=True)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grad, truth = (torch.autograd.grad(y, x, weight)[0] for y in (out, expected))
    torch.testing.assert_close(grad, truth)


def bin_by_bin(x, rois, offset_xy, output_size, scale, ratio, gamma, aligned=True):
    """Deformable RoI pooling out of RoIAlign alone: bin p of the RoI moved by p's offset."""
    out = torch.empty(len(rois), x.shape[1], *output_size, dtype=x.dtype)
    size = rois[:, 3:] - rois[:, 1:3]
    for i in range(output_size[0]):
        for j in range(output_size[1]):
            shift = gamma * size * offset_xy[:, :, i, j]
            moved = torch.cat([rois[:, :1], rois[:, 1:3] + shift, rois[:, 3:] + shift], 1)
            out[:, :, i, j] = roi_align(x, moved, output_size, scale, ratio, aligned)[:, :, i, j]
    return out


@pytest.mark.parametrize("cls", MMCV_PACKS)
def test_packs_pool_boxes_that_are_inside_out(cls):
    """They predict from them and move their bins backwards, as RoIAlign does, of which this truth is made."""
    layer, x, turned = shaken(cls((2, 3), 8, 16, 0.5, 2, **DOUBLE)), image(), ROIS[:, [0, 3, 2, 1, 4]]
    offset, mask = layer.offsets(x, turned)
    expected = bin_by_bin(x, turned, offset.flip(1), (2, 3), 0.5, 2, 0.1)
    torch.testing.assert_close(layer(x, turned), expected if mask is None else expected * mask)
    plain = roi_align(x, turned, (2, 3), 0.5, 2, aligned=True).flatten(1)
    torch.testing.assert_close(layer.offset_fc(plain).unflatten(1, (2, 2, 3)).flip(1), offset)


@pytest.mark.parametrize("cls", MMCV_PACKS)
def test_pack_is_roi_align_bin_by_bin(cls):
    """The whole layer from the state dict, by torchvision and matrix products alone; offsets are (x, y) as in mmcv."""
    layer = shaken(cls((2, 3), 8, 16, 0.5, 2, gamma=0.2, **DOUBLE))
    x, w = image(), layer.state_dict()
    pooled = roi_align(x, ROIS, (2, 3), 0.5, 2, aligned=True).reshape(3, -1)
    h = (pooled @ w["offset_fc.0.weight"].T + w["offset_fc.0.bias"]).relu()
    h = (h @ w["offset_fc.2.weight"].T + w["offset_fc.2.bias"]).relu()
    offset_xy = (h @ w["offset_fc.4.weight"].T + w["offset_fc.4.bias"]).reshape(3, 2, 2, 3)
    expected = bin_by_bin(x, ROIS, offset_xy, (2, 3), 0.5, 2, 0.2)
    torch.testing.assert_close(DeformRoIPool((2, 3), 0.5, 2, 0.2)(x, ROIS, offset_xy), expected)
    if cls is ModulatedDeformRoIPoolPack:
        m = (pooled @ w["mask_fc.0.weight"].T + w["mask_fc.0.bias"]).relu()
        m = 1 / (1 + (-(m @ w["mask_fc.2.weight"].T + w["mask_fc.2.bias"])).exp())
        expected = expected * m.reshape(3, 1, 2, 3)
        torch.testing.assert_close(layer.offsets(x, ROIS)[1], m.reshape(3, 1, 2, 3))
    torch.testing.assert_close(layer(x, ROIS), expected)
    torch.testing.assert_close(layer.offsets(x, ROIS)[0], torch.stack((offset_xy[:, 1], offset_xy[:, 0]), 1))


def test_state_dict_is_mmcvs():
    """Names and shapes as mmcv's classes make them, for 7 x 7 bins of 256 channels and a branch of 1024."""
    offset = {
        "offset_fc.0.weight": [1024, 12544], "offset_fc.0.bias": [1024], "offset_fc.2.weight": [1024, 1024],
        "offset_fc.2.bias": [1024], "offset_fc.4.weight": [98, 1024], "offset_fc.4.bias": [98],
    }  # fmt: skip
    mask = {
        "mask_fc.0.weight": [1024, 12544], "mask_fc.0.bias": [1024], "mask_fc.2.weight": [49, 1024],
        "mask_fc.2.bias": [49],
    }  # fmt: skip
    for cls, expected in ((DeformRoIPoolPack, offset), (ModulatedDeformRoIPoolPack, {**offset, **mask})):
        layer = cls(output_size=7, output_channels=256, device="meta")
        assert {name: list(value.shape) for name, value in layer.state_dict().items()} == expected
        assert list(layer.state_dict()) == list(expected)
    assert not DeformRoIPool(7).state_dict()


def test_mmcv_arguments_in_mmcvs_order():
    layer = ModulatedDeformRoIPoolPack((3, 2), 4, 8, 0.25, 2, 0.3)
    assert (layer.output_size, layer.output_channels, layer.deform_fc_channels) == ((3, 2), 4, 8)
    assert (layer.spatial_scale, layer.sampling_ratio, layer.gamma) == (0.25, 2, 0.3)
    default = DeformRoIPoolPack(3, 4)
    assert (default.deform_fc_channels, default.spatial_scale, default.sampling_ratio) == (1024, 1.0, 0)
    assert default.gamma == 0.1


# Units and order of offsets, in closed form on a ramp


@pytest.mark.parametrize(("plane", "slope"), [(0, (0.0, 3.0)), (1, (2.0, 0.0))])
def test_mmcv_offsets_are_x_then_y_in_roi_sizes(plane, slope):
    layer = DeformRoIPoolPack(2, 1, 4, 0.5, 2, gamma=0.25, **DOUBLE)
    rois = torch.tensor([[0, 12.0, 12.0, 28.0, 22.0]], **DOUBLE)  # 8 wide and 5 high on the map
    x = ramp(*slope)
    before = layer(x, rois)
    layer.offset_fc[-1].bias.data[4 * plane : 4 * plane + 4] = torch.tensor([0.1, -0.2, 0.3, 0.4])
    size = (8, 5)[plane]
    moved = torch.tensor([0.1, -0.2, 0.3, 0.4], **DOUBLE).reshape(1, 1, 2, 2) * 0.25 * size * sum(slope)
    torch.testing.assert_close(layer(x, rois) - before, moved)
    # What offsets() returns is (y, x): what the operator takes.
    offset, mask = layer.offsets(x, rois)
    assert mask is None and offset[:, 1 - plane].any() and not offset[:, plane].any()


@pytest.mark.parametrize(("plane", "slope"), [(0, (2.0, 0.0)), (1, (0.0, 3.0))])
def test_our_offsets_are_y_then_x_in_roi_sizes(plane, slope):
    rois = torch.tensor([[0, 12.0, 12.0, 27.0, 21.0]], **DOUBLE)
    values = torch.tensor([0.1, -0.2, 0.3, 0.4], **DOUBLE)
    # Two classes of one channel; only the second one is moved. The RoI counts its last pixel: 16 x 10, halved.
    layer = DeformPSRoIPoolPack(2, 1, 2, 0.5, offset_scale=0.25, deform_fc_channels=4, offset_classes=2, **DOUBLE)
    x = ramp(*slope, channels=2)
    before = layer(x, rois)
    layer.offset_fc[-1].bias.data[8 + 4 * plane : 12 + 4 * plane] = values
    expected = torch.zeros(1, 2, 2, 2, **DOUBLE)
    expected[:, 1] = values.reshape(2, 2) * 0.25 * (5, 8)[plane] * sum(slope)
    torch.testing.assert_close(layer(x, rois) - before, expected)
    assert layer.offsets(x, rois)[0][0, 2 + plane].flatten().tolist() == values.tolist()

    pool = MultiScaleDeformRoIPool(["a"], 2, 2, in_channels=1, deform_fc_channels=4, gamma=0.25, **DOUBLE)
    maps, boxes = {"a": ramp(*slope)}, [torch.tensor([[12.0, 12.0, 28.0, 22.0]], **DOUBLE)]
    before = pool(maps, boxes, [(48, 48)])
    pool.offset_fc[-1].bias.data[4 * plane : 4 * plane + 4] = values
    expected = values.reshape(1, 1, 2, 2) * 0.25 * (5, 8)[plane] * sum(slope)
    torch.testing.assert_close(pool(maps, boxes, [(48, 48)]) - before, expected)


# Position-sensitive layers


@pytest.mark.parametrize("cls", [PSRoIPool, DeformPSRoIPool, DeformPSRoIPoolPack])
def test_each_bin_reads_its_own_channels(cls):
    """Map c is c everywhere: bin (i, j) of output d must give (d * k + i) * k + j."""
    layer = cls(3, 2, 2)
    x = torch.arange(12.0).reshape(1, 12, 1, 1).expand(1, 12, 9, 9)
    expected = torch.arange(12.0).reshape(1, 3, 2, 2)
    torch.testing.assert_close(layer(x, torch.tensor([[0, 1.0, 2.0, 6.0, 7.0]])), expected)


def test_ps_roi_pool_by_hand():
    """RoI (1, 1)-(4, 2) covers x 1..4 and y 1..2: bins of 2 x 1 whole pixels."""
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    out = PSRoIPool(1, 1, 2)(x, torch.tensor([[0, 1.0, 1.0, 4.0, 2.0]]))
    assert out.tolist() == [[[[7.5, 9.5], [13.5, 15.5]]]]


def test_deform_ps_roi_pool_by_hand():
    """On a ramp the mean is the ramp at the mean sample: start + bin * p + 3/8 of the bin, for 4 samples a side."""
    x = ramp(1.0, 10.0)
    out = DeformPSRoIPool(1, 1, 2)(x, torch.tensor([[0, 5.0, 3.0, 12.0, 8.0]], **DOUBLE))
    ys, xs = (torch.tensor([p * size / 2 + 3 / 8 * size / 2 for p in (0, 1)]).double() for size in (6, 8))
    expected = (2.5 + ys)[:, None] + 10 * (4.5 + xs)
    torch.testing.assert_close(out[0, 0], expected)


def test_part_size_and_masks():
    layer = DeformPSRoIPool(4, 1, 4, part_size=2)
    x = image(4)
    mask = torch.rand(3, 2, 2, 2, **DOUBLE)  # two classes, 2 x 2 cells of 2 x 2 bins
    factor = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x, HALF, mask=mask), factor * layer(x, HALF))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("part_size", [None, 3])
def test_fresh_ps_pack_is_the_pool_without_offsets(modulated, part_size):
    geometry = dict(output_dim=4, group_size=2, output_size=(2, 3), spatial_scale=0.5, part_size=part_size)
    pack = DeformPSRoIPoolPack(**geometry, deform_fc_channels=8, offset_classes=2, modulated=modulated, **DOUBLE)
    x = image(16)
    torch.testing.assert_close(pack(x, ROIS), DeformPSRoIPool(**geometry)(x, ROIS), rtol=0, atol=0)


def test_mask_activations_of_the_ps_pack():
    half, full = (
        DeformPSRoIPoolPack(2, 2, 2, deform_fc_channels=8, modulated=True, mask_activation=name, **DOUBLE)
        for name in ("sigmoid", "2*sigmoid")
    )
    x = image()
    plain = DeformPSRoIPool(2, 2, 2)(x, HALF)
    torch.testing.assert_close(half(x, HALF), plain / 2)
    torch.testing.assert_close(full(x, HALF), plain)
    full.mask_fc.bias.data[:] = 1.5
    torch.testing.assert_close(full(x, HALF), plain * 2 / (1 + math.exp(-1.5)))


def charlesshang(layer):
    """A state dict as CharlesShang's DCNPooling has it: one branch, whose rows are x, y and mask of all bins."""
    state = layer.state_dict()
    y, x = state["offset_fc.4.weight"].chunk(2)
    y_bias, x_bias = state["offset_fc.4.bias"].chunk(2)
    old = {
        "offset_mask_fc.4.weight": torch.cat([x, y, state["mask_fc.weight"]]),
        "offset_mask_fc.4.bias": torch.cat([x_bias, y_bias, state["mask_fc.bias"]]),
    }
    return old | {f"offset_mask_fc.{i}.{k}": state[f"offset_fc.{i}.{k}"] for i in (0, 2) for k in ("weight", "bias")}


def test_offset_mask_fc_loads(caplog):
    def make(**options):
        options = dict(dict(modulated=True, mask_activation="sigmoid"), **options)
        return DeformPSRoIPoolPack(4, 1, (2, 3), 0.5, deform_fc_channels=8, **options, **DOUBLE)

    source = shaken(make())
    old, x = charlesshang(source), image(4)
    assert {key: list(value.shape) for key, value in old.items()} == {
        "offset_mask_fc.0.weight": [8, 24], "offset_mask_fc.0.bias": [8], "offset_mask_fc.2.weight": [8, 8],
        "offset_mask_fc.2.bias": [8], "offset_mask_fc.4.weight": [18, 8], "offset_mask_fc.4.bias": [18],
    }  # fmt: skip
    target = make()
    target.load_state_dict(old)
    torch.testing.assert_close(target(x, ROIS), source(x, ROIS), rtol=0, atol=0)
    assert "offset_mask_fc.4.weight" in old  # the caller's dict is left alone

    inner = nn.Sequential(nn.Identity(), make())
    inner.load_state_dict({f"1.{key}": value for key, value in old.items()})
    torch.testing.assert_close(inner[1](x, ROIS), source(x, ROIS), rtol=0, atol=0)
    with caplog.at_level(logging.INFO, "dcn_plugin"):
        model = nn.ModuleDict(dict(pool=make(mask_activation="2*sigmoid")))
        report = dcn_plugin.load_checkpoint(model, {f"pool.{key}": value for key, value in old.items()})
    assert len(report.loaded) == 8 and not report.problems
    assert report.renamed["pool.offset_mask_fc.4.bias"] == "pool.offset_fc.4.bias and pool.mask_fc.bias"
    assert "mask_activation='sigmoid'" in str(report)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[f"pool.{key}"], value)

    # Where there is no place for it, it is refused by name.
    for options in (dict(modulated=False), dict(offset_classes=2)):
        with pytest.raises(RuntimeError, match="offset_mask_fc"):
            make(**options).load_state_dict(old)


# What every layer owes


@every_pack
def test_last_layers_start_at_zero_and_after_reset(name):
    layer = MAKE[name]()
    mask = getattr(layer, "mask_fc", None)
    last = [layer.offset_fc[4]]
    if mask is not None:
        last.append(mask[2] if isinstance(mask, nn.Sequential) else mask)
    assert not any(p.any() for module in last for p in module.parameters())
    shaken(layer).reset_parameters()
    assert not any(p.any() for module in last for p in module.parameters()) and layer.offset_fc[0].weight.any()
    # What FSDP and torch's own recipe do: build without storage, allocate, call every module's reset_parameters.
    layer = MAKE[name](device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x, rois = image(dtype=torch.float32), ROIS.float()
    assert not layer.offsets(x, rois)[0].any() and layer.offset_fc[0].weight.any()


@every_pack
def test_every_parameter_learns(name):
    layer = MAKE[name]()
    x, rois = image(dtype=torch.float32).requires_grad_(), ROIS.float()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x, rois).square().sum().backward()
    # Behind a last layer of zeros nothing is to be learnt yet, but every gradient is there (no unused parameters).
    assert all(p.grad is not None for p in layer.parameters()) and layer.offset_fc[-1].weight.grad.any()
    optimizer.step()
    layer(x, rois).square().sum().backward()
    for key, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad.any() and tensor.grad.isfinite().all(), key


@every_pack
def test_gradcheck(name):
    layer = shaken(MAKE[name](**DOUBLE), 0.1)
    x, rois = image(size=6).requires_grad_(), ROIS[1:]
    names = list(dict(layer.named_parameters()))[-2:]  # the others follow by torch's own chain rule

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, rois))

    parameters = [dict(layer.named_parameters())[key] for key in names]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@every_layer
def test_boxes_as_a_list(name):
    layer = shaken(MAKE[name](**DOUBLE))
    boxes = [torch.tensor([[2.0, 3.0, 12.0, 11.0], [0.0, 1.0, 9.5, 15.0]]).double(), torch.empty(0, 4, **DOUBLE)]
    rois = torch.cat([torch.zeros(2, 1, **DOUBLE), boxes[0]], 1)
    x = image()
    torch.testing.assert_close(layer(x, boxes), layer(x, rois), rtol=0, atol=0)
    torch.testing.assert_close(layer(x, boxes[::-1])[0], layer(x.flip(0), rois)[0], rtol=0, atol=0)


@every_layer
def test_no_rois_and_empty_batch(name):
    layer = MAKE[name]()
    x = image(dtype=torch.float32).requires_grad_()
    channels = layer(x, ROIS.float()).shape[1]
    for input, rois in ((x, torch.empty(0, 5)), (x, [torch.empty(0, 4)] * 2), (x[:0], torch.empty(0, 5)), (x[:0], [])):
        out = layer(input, rois)
        assert out.shape == (0, channels, 2, 3)
        x.grad = None
        layer.zero_grad()
        out.sum().backward()
        assert x.grad is not None and not x.grad.any()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
        if name in PACKS:
            assert layer.offsets(input, rois)[0].shape[0] == 0


@every_layer
def test_half_precision_and_autocast(name):
    layer = shaken(MAKE[name](), 0.05)
    x, rois = image(dtype=torch.float32).requires_grad_(), ROIS.float()
    expected = layer(x, rois)
    for dtype in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(layer).to(dtype)(x.to(dtype), rois)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=0.06, rtol=0.06)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, rois)
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.06, rtol=0.06)
    out.float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@every_layer
def test_channels_last(name):
    layer = shaken(MAKE[name](**DOUBLE))
    x = image()
    out = layer(x.to(memory_format=torch.channels_last), ROIS)
    torch.testing.assert_close(out, layer(x, ROIS))
    assert out.is_contiguous(memory_format=torch.channels_last)


@every_layer
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(name, copier):
    layer = shaken(MAKE[name](**DOUBLE))
    twin, x = copier(layer), image()
    assert repr(twin) == repr(layer)
    torch.testing.assert_close(twin(x, ROIS), layer(x, ROIS), rtol=0, atol=0)


@every_pack
def test_state_dict_round_trip_and_functional_call(name):
    layer, other, x = shaken(MAKE[name](**DOUBLE)), MAKE[name](**DOUBLE), image()
    swapped = torch.func.functional_call(other, dict(layer.named_parameters()), (x, ROIS))
    torch.testing.assert_close(swapped, layer(x, ROIS), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x, ROIS), layer(x, ROIS), rtol=0, atol=0)


@every_layer
def test_symbolic_trace(name):
    layer, x = shaken(MAKE[name](**DOUBLE)), image()
    traced = torch.fx.symbolic_trace(layer)
    calls = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert calls.count("deform_roi_pool") + calls.count("deform_ps_roi_pool") + calls.count("ps_roi_pool") >= 1
    torch.testing.assert_close(traced(x, ROIS), layer(x, ROIS), rtol=0, atol=0)
    torch.testing.assert_close(traced(x, ROIS[:2]), layer(x, ROIS[:2]), rtol=0, atol=0)


@every_layer
def test_compiles_as_one_graph(name):
    layer, x, rois = shaken(MAKE[name](**DOUBLE)), image(), ROIS
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 2):
        torch.testing.assert_close(compiled(x, rois[:count]), layer(x, rois[:count]))
    if name in PACKS:
        compiled(x, rois).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_representations():
    text = repr(DeformRoIPoolPack(7, 256, 16, 0.25, 2))
    start = "DeformRoIPoolPack(\n  output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, gamma=0.1, "
    assert text.startswith(start + "output_channels=256, deform_fc_channels=16\n")
    assert repr(PSRoIPool(3, 2, 4)) == "PSRoIPool(output_dim=3, group_size=2, output_size=(4, 4), spatial_scale=1.0)"
    text = repr(DeformPSRoIPoolPack(4, 3, 3, part_size=(1, 2), deform_fc_channels=8, modulated=True))
    assert "part_size=(1, 2), samples_per_part=4, offset_scale=0.1, deform_fc_channels=8, offset_classes=1" in text
    assert "modulated=True, mask_activation='2*sigmoid'" in text
    assert "mask_activation" not in repr(DeformPSRoIPoolPack(4, 3, 3, deform_fc_channels=8))
    text = repr(MultiScaleDeformRoIPool(["0", "1"], 7, 2, in_channels=4, deform_fc_channels=8, aligned=True))
    assert "featmap_names=['0', '1'], output_size=(7, 7), sampling_ratio=2, in_channels=4" in text
    assert "aligned=True" in text and "(offset_fc)" in text


# Registration and learning rates


def test_layers_are_listed_and_are_no_stand_ins_for_convolutions():
    pools = (DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack)
    position_sensitive = (PSRoIPool, DeformPSRoIPool, DeformPSRoIPoolPack)
    for name, cls in {cls.__name__: cls for cls in (*pools, *position_sensitive)}.items():
        assert LAYERS[name] is cls and cls.drop_in is False
        with pytest.raises(ValueError, match=f"out of {', '.join(drop_ins())}, got '{name}', which cannot stand in"):
            dcn_plugin.convert(nn.Sequential(nn.Conv2d(3, 3, 3)), dict(match="0", layer=dict(type=name)))


def test_offset_parameters():
    class Own(nn.Module):
        offset_branches = {"field": 0.5, "without": 0.1}

        def __init__(self):
            super().__init__()
            self.field, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.without = None

    shared = DeformRoIPoolPack(2, 4, 8)
    model = nn.ModuleDict(
        dict(
            conv=DCNv2(4, 4, 3),
            pools=nn.ModuleList([shared, shared]),
            ps=DeformPSRoIPoolPack(4, 1, 2, deform_fc_channels=8, modulated=True),
            plain=DeformPSRoIPool(4, 1, 2),
            own=Own(),
            scales=MultiScaleDeformRoIPool(["0"], 2, 2, in_channels=4, deform_fc_channels=8, modulated=True),
        )
    )
    branches = [f"offset_fc.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    branches_and_mask = [*branches, "mask_fc.weight", "mask_fc.bias"]
    assert offset_parameters(model) == {
        **{f"conv.conv_offset.{kind}": 1.0 for kind in ("weight", "bias")},
        **{f"pools.0.{name}": 0.01 for name in branches},
        **{f"ps.{name}": 0.01 for name in branches_and_mask},
        **{f"own.field.{kind}": 0.5 for kind in ("weight", "bias")},
        **{f"scales.{name}": 0.01 for name in branches_and_mask},
    }
    assert offset_parameters(nn.Linear(2, 2)) == {}
    assert set(offset_parameters(DCNv1(2, 2, 3))) == {"conv_offset.weight", "conv_offset.bias"}


# On a pyramid, in torchvision's place

SHAPES = [(128, 96), (120, 128)]


def pyramid(channels=4, levels=3, dtype=torch.float64):
    maps = [torch.randn(2, channels, 32 >> i, 32 >> i, dtype=dtype, requires_grad=True) for i in range(levels)]
    return OrderedDict((str(i), value) for i, value in enumerate(maps))


def boxes_of_all_sizes(*counts, dtype=torch.float64):
    """Boxes whose sizes fall on all levels, in no order."""
    found = []
    for count in counts:
        corner, ratio = 60 * torch.rand(count, 1), torch.rand(count, 1)
        size = 2 ** (3 + 4 * torch.linspace(0, 1, count)[torch.randperm(count)])[:, None]
        found.append(torch.cat([corner, corner, corner + size * 2**-ratio, corner + size * 2**ratio], 1).to(dtype))
    return found


def multiscale(levels=3, **options):
    options = dict(in_channels=4, deform_fc_channels=16, canonical_scale=32, canonical_level=3, **DOUBLE) | options
    return MultiScaleDeformRoIPool([str(i) for i in range(levels)], (2, 3), 2, **options)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("counts", [(9, 7), (0, 6), (6, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("modulated", [False, True])
def test_fresh_is_multi_scale_roi_align(levels, counts, modulated):
    ours = multiscale(levels, modulated=modulated)
    theirs = MultiScaleRoIAlign(ours.featmap_names, (2, 3), 2, canonical_scale=32, canonical_level=3)
    maps, boxes = pyramid(levels=levels), boxes_of_all_sizes(*counts)
    out, expected = ours(maps, boxes, SHAPES), theirs(maps, boxes, SHAPES)
    torch.testing.assert_close(out, expected)
    assert ours.scales == theirs.scales and vars(ours.map_levels) == vars(theirs.map_levels)
    if sum(counts) and levels > 1:
        assert len(ours.map_levels(boxes).unique()) == levels, "the boxes should use every level"
    weight = torch.randn_like(out)
    for left, right in zip(
        *(torch.autograd.grad(y, list(maps.values()), weight) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_other_arguments_of_multi_scale_roi_align():
    maps, boxes = pyramid(), boxes_of_all_sizes(8, 8)
    for names, size, ratio, options in (
        (["0", "2"], 3, 0, {}),
        (["2", "1", "0"], (1, 2), -1, dict(canonical_scale=64)),
        (["1", "absent"], 2, 1, dict(canonical_level=2)),
    ):
        ours = MultiScaleDeformRoIPool(names, size, ratio, in_channels=4, deform_fc_channels=8, **options, **DOUBLE)
        theirs = MultiScaleRoIAlign(names, size, ratio, **options)
        torch.testing.assert_close(ours(maps, boxes, SHAPES), theirs(maps, boxes, SHAPES))


def test_aligned_and_moved_bins_level_by_level():
    pool = shaken(multiscale(modulated=True, aligned=True, gamma=0.3))
    maps, boxes = pyramid(), boxes_of_all_sizes(9, 7)
    with torch.no_grad():
        out = pool(maps, boxes, SHAPES)
        offset, mask = pool.offsets(maps, boxes, SHAPES)
    assert offset.shape == (16, 2, 2, 3) and mask.shape == (16, 1, 2, 3) and offset.std() > 0.1
    index = torch.tensor([0.0] * 9 + [1.0] * 7, **DOUBLE)[:, None]
    rois = torch.cat([index, torch.cat(boxes)], 1)
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    level = (3 + (area.sqrt() / 32).log2() + 1e-6).floor().clamp(2, 4).long() - 2  # Lin et al. 2017, eq. 1
    for i, roi in enumerate(rois):
        x, scale = list(maps.values())[level[i]].detach(), 0.25 / 2 ** level[i].item()
        plain = roi_align(x, roi[None], (2, 3), scale, 2, aligned=True)
        h = pool.offset_fc[:4](plain.flatten(1))
        torch.testing.assert_close(offset[i], pool.offset_fc[4](h).reshape(2, 2, 3))
        torch.testing.assert_close(mask[i], 2 * pool.mask_fc(h).sigmoid().reshape(1, 2, 3))
        expected = mask[i] * bin_by_bin(x, roi[None], offset[i : i + 1].flip(1), (2, 3), scale, 2, 0.3)[0]
        torch.testing.assert_close(out[i], expected)


def test_aligned_fresh_layer_is_aligned_roi_align():
    pool, maps, boxes = multiscale(1, aligned=True), pyramid(levels=1), boxes_of_all_sizes(3, 4)
    torch.testing.assert_close(pool(maps, boxes, SHAPES), roi_align(maps["0"], boxes, (2, 3), 0.25, 2, aligned=True))


def test_every_parameter_of_the_pyramid_pool_learns():
    pool, maps, boxes = multiscale(modulated=True), pyramid(), boxes_of_all_sizes(5, 6)
    optimizer = torch.optim.SGD(pool.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        pool(maps, boxes, SHAPES).square().sum().backward()
        assert pool.offset_fc[4].weight.grad.any() and pool.mask_fc.weight.grad.any()
        optimizer.step()
    assert all(p.grad.any() for p in pool.parameters())
    # No boxes at all: zero gradients, not none, so that processes that share gradients agree.
    optimizer.zero_grad()
    out = pool(maps, boxes_of_all_sizes(0, 0), SHAPES)
    assert out.shape == (0, 4, 2, 3)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in pool.parameters())


def test_pyramid_pool_in_half_precision_and_channels_last():
    pool = shaken(multiscale(modulated=True, dtype=torch.float32), 0.05)
    maps, boxes = pyramid(dtype=torch.float32), boxes_of_all_sizes(5, 6, dtype=torch.float32)
    expected = pool(maps, boxes, SHAPES)
    last = {name: value.to(memory_format=torch.channels_last) for name, value in maps.items()}
    out = pool(last, boxes, SHAPES)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    small = [b[:1] for b in boxes]  # not every level has one
    assert pool(last, small, SHAPES).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = pool(maps, boxes, SHAPES)
        assert out.dtype == torch.bfloat16
        # As in a real model: autocast gives maps of different types.
        mixed = OrderedDict(maps, **{"1": maps["1"].bfloat16()})
        torch.testing.assert_close(pool(mixed, boxes, SHAPES).float(), expected, atol=0.06, rtol=0.06)
    torch.testing.assert_close(out.float(), expected, atol=0.06, rtol=0.06)
    half = copy.deepcopy(pool).bfloat16()({name: value.bfloat16() for name, value in maps.items()}, boxes, SHAPES)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.06, rtol=0.06)


def test_pyramid_pool_copies_and_compiles():
    pool, maps, boxes = shaken(multiscale(modulated=True)), pyramid(), boxes_of_all_sizes(5, 6)
    expected = pool(maps, boxes, SHAPES)
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        torch.testing.assert_close(twin(maps, boxes, SHAPES), expected, rtol=0, atol=0)
    swapped = torch.func.functional_call(
        multiscale(modulated=True), dict(pool.named_parameters()), (maps, boxes, SHAPES)
    )
    torch.testing.assert_close(swapped, expected, rtol=0, atol=0)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, boxes, SHAPES), expected)


@pytest.mark.parametrize("levels", [1, 3])
def test_pyramid_pool_traces_symbolically(levels):
    pool, maps, boxes = shaken(multiscale(levels, modulated=True)), pyramid(levels=levels), boxes_of_all_sizes(5, 6)
    traced = torch.fx.symbolic_trace(pool)
    assert pool.scales is None and pool.map_levels is None
    torch.testing.assert_close(traced(maps, boxes, SHAPES), pool(maps, boxes, SHAPES), rtol=0, atol=0)
    boxes = boxes_of_all_sizes(0, 4)
    again = torch.fx.symbolic_trace(pool)  # now that it knows its scales
    torch.testing.assert_close(again(maps, boxes, SHAPES), pool(maps, boxes, SHAPES), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, for index_copy_
def test_pyramid_pool_under_function_transforms():
    pool, maps, boxes = shaken(multiscale(2, modulated=True)), pyramid(levels=2), boxes_of_all_sizes(3, 2)
    parameters = dict(pool.named_parameters())

    def loss(parameters, *maps):
        named = dict(zip("01", maps, strict=True))
        return torch.func.functional_call(pool, parameters, (named, boxes, SHAPES)).square().sum()

    values = [value.detach() for value in maps.values()]
    expected = torch.autograd.grad(loss(parameters, *values), list(parameters.values()))
    found = torch.func.grad(loss)(parameters, *values)
    for left, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(left, right)
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
    slope = torch.func.jvp(lambda p: loss(p, *values), (parameters,), (tangents,))[1]
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True)))
    several = torch.vmap(loss, in_dims=(None, 0, 0))(parameters, *(torch.stack([v, v.flip(1)]) for v in values))
    torch.testing.assert_close(several[1], loss(parameters, *(v.flip(1) for v in values)))


def test_unsound_boxes_of_the_pyramid_pool_are_named():
    pool, maps, boxes = multiscale(), pyramid(), boxes_of_all_sizes(2, 3)
    for wrong in (math.nan, math.inf):  # it has no level, but is not left out
        bad = [boxes[0].clone(), boxes[1]]
        bad[0][0, 2] = wrong
        with pytest.raises(ValueError, match="rois.*row 0"):
            pool(maps, bad, SHAPES)


def test_boxes_that_are_inside_out_are_pooled_from_a_pyramid():
    """From the level of their area, as torchvision has it; where that is below 0 they have none: here the finest."""
    ours, maps = multiscale(), pyramid()
    theirs = MultiScaleRoIAlign(ours.featmap_names, (2, 3), 2, canonical_scale=32, canonical_level=3)
    boxes = boxes_of_all_sizes(5, 4)
    both = [b[:, [2, 3, 0, 1]] for b in boxes]
    torch.testing.assert_close(ours(maps, both, SHAPES), theirs(maps, both, SHAPES))
    one = [boxes[0], boxes[1].clone()]
    one[1][2] = one[1][2, [2, 1, 0, 3]]
    found, expected = ours(maps, one, SHAPES), ours(maps, boxes, SHAPES)
    torch.testing.assert_close(found[:7], expected[:7])
    torch.testing.assert_close(found[8:], expected[8:])
    torch.testing.assert_close(found[7:8], roi_align(maps["0"][1:], [one[1][2:3]], (2, 3), 1 / 4, 2))


def test_trains_in_torchvisions_faster_rcnn():
    """Fresh, the losses are those of the same detector with RoIAlign; after one step every part of the pool learns."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    class Backbone(nn.Module):
        out_channels = 8

        def __init__(self):
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)

        def forward(self, x):
            fine = self.stem(x).relu()
            return OrderedDict([("0", fine), ("1", self.down(fine))])

    def detector(pool):
        torch.manual_seed(0)
        return FasterRCNN(
            Backbone(), num_classes=3, min_size=64, max_size=64, box_roi_pool=pool, rpn_post_nms_top_n_train=20,
            rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2), box_batch_size_per_image=16,
        )  # fmt: skip

    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 24.0], [30.0, 8.0, 60.0, 60.0]]), torch.tensor([[2.0, 2.0, 14.0, 12.0]])]
    targets = [dict(boxes=b, labels=torch.ones(len(b), dtype=torch.long)) for b in boxes]

    def losses(model):
        torch.manual_seed(1)
        return model(images, targets)

    pool = MultiScaleDeformRoIPool(["0", "1"], 5, 2, in_channels=8, deform_fc_channels=16, modulated=True)
    ours, theirs = detector(pool), detector(MultiScaleRoIAlign(["0", "1"], 5, 2))
    report = dcn_plugin.load_checkpoint(ours, theirs.state_dict(), allow_missing="*.box_roi_pool.*")
    assert len(report.allowed) == len(pool.state_dict())
    first, expected = losses(ours), losses(theirs)
    assert list(first) == list(expected) and len(first) == 4
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value)

    optimizer = torch.optim.SGD(ours.parameters(), 0.05)
    sum(first.values()).backward()
    assert pool.offset_fc[4].weight.grad.any() and pool.mask_fc.weight.grad.any()
    optimizer.step()
    optimizer.zero_grad()
    sum(losses(ours).values()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or not name.startswith("roi_heads.box_roi_pool"), name
    found = ours.eval()(images)
    assert [set(result) for result in found] == [{"boxes", "labels", "scores"}] * 2


def test_needs_torchvision_only_when_used():
    code = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "timm", "mmengine"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, dcn_plugin
from dcn_plugin.layers import *
assert DeformRoIPoolPack(2, 4, 8)(torch.rand(1, 4, 8, 8), torch.tensor([[0, 1.0, 1.0, 5.0, 5.0]])).shape == (1, 4, 2, 2)
try:
    from dcn_plugin.detection import MultiScaleDeformRoIPool
except ModuleNotFoundError as error:
    print(error)
try:
    dcn_plugin.layers.Absent
except AttributeError as error:
    print(error)
"""
    assert run_python(code, "-W", "error").splitlines() == [
        "dcn_plugin.detection needs torchvision, which is not installed: pip install torchvision",
        "module 'dcn_plugin.layers' has no attribute 'Absent'",
    ]


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction])
def test_scales_come_as_any_real_number(number):
    x, rois = torch.rand(2, 3, 8, 8).double(), ROIS
    layer = DeformRoIPool(2, number(0.5), 2, gamma=number(0.25))
    offset = torch.rand(3, 2, 2, 2).double()
    assert torch.equal(layer(x, rois, offset), DeformRoIPool(2, 0.5, 2, gamma=0.25)(x, rois, offset))


def test_torchvision_takes_it_for_its_own():
    assert issubclass(MultiScaleDeformRoIPool, MultiScaleRoIAlign)
