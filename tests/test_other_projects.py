"""Files of other projects' models: loaded under their names, they compute what their own code would.

Each model here is written from its project's formulas, on torchvision's operator, with that project's names and shapes
(narrower): what its checkpoint holds is its state dict.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcn_plugin
from dcn_plugin import DCNv1, DCNv2, DeformConv2d, SecondOrderDeformableAlignment, load_checkpoint
from dcn_plugin.layers import OffsetPredictor, PrefixPredictor

deform_conv2d = pytest.importorskip("torchvision.ops").deform_conv2d
timm = pytest.importorskip("timm")


def filled(model, seed=0):
    """Values for everything, such that offsets are some pixels and nothing is at a trivial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn + 0.5 if "running_var" in name else (drawn - 0.5) * 0.6)
    return model.eval()


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path, state):
    torch.save(state, path)
    return path


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


class Plain(nn.Module):
    """Weight and bias of a deformable convolution; a subclass says where it samples."""

    def __init__(self, ins, outs, kernel=3, stride=1, padding=1, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outs, ins, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outs)) if bias else None
        self.stride, self.padding = stride, padding

    def sample(self, x, offset, mask):
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, 1, mask)


# -- BiRefNet ----------------------------------------------------------------------------------------------------------


class BiRefNetConv(nn.Module):
    """`offset_conv` and `modulator_conv` read x; the weight is an inner convolution's; masks go from 0 to 2."""

    def __init__(self, ins, outs, kernel_size=3, stride=1, padding=1, bias=False):
        super().__init__()
        geometry = dict(kernel_size=kernel_size, stride=stride, padding=padding)
        self.offset_conv = nn.Conv2d(ins, 2 * kernel_size**2, **geometry)
        self.modulator_conv = nn.Conv2d(ins, kernel_size**2, **geometry)
        self.regular_conv = nn.Conv2d(ins, outs, bias=bias, **geometry)
        self.stride, self.padding = stride, padding

    def forward(self, x):
        mask = 2 * torch.sigmoid(self.modulator_conv(x))
        conv = self.regular_conv
        return deform_conv2d(x, self.offset_conv(x), conv.weight, conv.bias, self.stride, self.padding, 1, mask)


class BiRefNetASPP(nn.Module):
    """The deformable pyramid of its decoder, with the class of its convolutions named in one place, as in its code."""

    def __init__(self, convolution, channels=6, inner=4):
        super().__init__()

        def part(kernel, padding):
            module = nn.Module()
            module.atrous_conv = convolution(channels, inner, kernel_size=kernel, stride=1, padding=padding, bias=False)
            module.bn = nn.BatchNorm2d(inner)
            return module

        self.aspp1 = part(1, 0)
        self.aspp_deforms = nn.ModuleList([part(kernel, kernel // 2) for kernel in (1, 3, 7)])
        self.conv1 = nn.Conv2d(4 * inner, channels, 1, bias=False)

    def forward(self, x):
        parts = [part.bn(part.atrous_conv(x)).relu() for part in (self.aspp1, *self.aspp_deforms)]
        return self.conv1(torch.cat(parts, 1))


@pytest.mark.parametrize("load", [load_checkpoint, nn.Module.load_state_dict], ids=["load_checkpoint", "plain"])
def test_birefnet_takes_our_layer_in_one_line(tmp_path, load):
    original, x = filled(BiRefNetASPP(BiRefNetConv)), drawn(2, 6, 9, 8)
    ours = BiRefNetASPP(DCNv2).eval()  # DeformableConv2d = dcn_plugin.DCNv2
    if load is load_checkpoint:
        report = load(
            ours, saved(tmp_path / "birefnet.pth", {f"module.{k}": v for k, v in original.state_dict().items()})
        )
        name = "aspp_deforms.1.atrous_conv"
        assert report.renamed[f"{name}.offset_conv.weight"] == f"{name}.conv_offset.weight"
        assert report.renamed[f"{name}.modulator_conv.weight"] == f"{name}.conv_offset.weight"
        assert report.renamed[f"{name}.regular_conv.weight"] == f"{name}.weight"
        assert not report.problems and not any("trained with" in note for note in report.notes)
    else:
        assert str(load(ours, original.state_dict())) == "<All keys matched successfully>"
    assert (original(x) - original(x * 0)).abs().max() > 0.01
    close(ours(x), original(x))


def test_birefnets_masks_are_noted_where_the_layers_differ():
    original = filled(BiRefNetASPP(BiRefNetConv))
    ours = BiRefNetASPP(lambda *args, **options: DCNv2(*args, mask_activation="sigmoid", **options))
    (note,) = load_checkpoint(ours, original.state_dict()).notes
    assert "trained with mask_activation='2*sigmoid', but this model has 'sigmoid'" in note


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("compiled", [False, True])
def test_wrappers_are_found_where_every_name_is_another_projects(start, compiled):
    """A block by itself: none of its names is ours before it is renamed."""
    original, x = filled(BiRefNetConv(4, 6)), drawn(2, 4, 9, 8)
    ours = nn.Sequential(DCNv2(4, 6, 3, padding=1, bias=False))
    model = torch.compile(ours, backend="eager") if compiled else ours
    load_checkpoint(model, {f"{start}0.{name}": value for name, value in original.state_dict().items()})
    close(ours(x), original(x))


def test_what_does_not_fit_is_all_told():
    state = filled(BiRefNetASPP(BiRefNetConv)).state_dict()
    del state["aspp1.atrous_conv.modulator_conv.weight"], state["aspp1.bn.weight"]
    state["aspp_deforms.0.atrous_conv.regular_conv.bias"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match="nothing was loaded") as error:
        load_checkpoint(BiRefNetASPP(DCNv2), state)
    for words in (
        "1 missing (in the model, not in the source): aspp1.bn.weight",
        "1 unexpected (in the source, not in the model): aspp_deforms.0.atrous_conv.bias",
        "shape of aspp1.atrous_conv.conv_offset.weight differs: source has [2, 6, 1, 1], model has [3, 6, 1, 1]",
        "2 outputs would fit DCNv1 with offset_groups=1",
    ):
        assert words in str(error.value)


def test_a_file_without_masks_goes_into_dcnv1():
    conv = filled(BiRefNetConv(4, 6))
    state = {f"conv.{k}": v for k, v in conv.state_dict().items() if "modulator" not in k}
    ours = nn.ModuleDict(dict(conv=DCNv1(4, 6, 3, padding=1, bias=False)))
    load_checkpoint(ours, state)
    x = drawn(1, 4, 7, 7)
    close(ours["conv"](x), deform_conv2d(x, conv.offset_conv(x), conv.regular_conv.weight, padding=1))


# -- EDVR, and what aligns frames as it does ---------------------------------------------------------------------------


class DCNv2Pack(Plain):
    """BasicSR's (`conv_offset`), EDVR's first and Zooming Slow-Mo's (`conv_offset_mask`): another map tells."""

    def __init__(self, ins, outs, groups, name="conv_offset"):
        super().__init__(ins, outs)
        self.name = name
        self.add_module(name, nn.Conv2d(ins, 27 * groups, 3, 1, 1))

    def forward(self, x, feature):
        one, two, mask = self.get_submodule(self.name)(feature).chunk(3, dim=1)
        return self.sample(x, torch.cat((one, two), 1), mask.sigmoid())


class PCDAlignment(nn.Module):
    """Two levels of EDVR's pyramid, and the cascade, with BasicSR's names."""

    def __init__(self, pack, width=8):
        super().__init__()
        conv = [nn.Conv2d(2 * width, width, 3, 1, 1) for _ in range(4)]
        self.offset_conv1 = nn.ModuleDict(dict(l2=conv[0], l1=conv[1]))
        self.offset_conv2 = nn.ModuleDict(dict(l1=conv[2]))
        self.dcn_pack = nn.ModuleDict(dict(l2=pack(width, width), l1=pack(width, width)))
        self.cas_offset_conv1 = conv[3]
        self.cas_dcnpack = pack(width, width)

    def forward(self, neighbour, reference):
        maps = [torch.cat(pair, 1) for pair in zip(neighbour, reference, strict=True)]
        offset = F.leaky_relu(self.offset_conv1["l2"](maps[1]), 0.1)
        feature = F.leaky_relu(self.dcn_pack["l2"](neighbour[1], offset), 0.1)
        up = F.interpolate(offset, scale_factor=2, mode="bilinear", align_corners=False) * 2
        offset = F.leaky_relu(self.offset_conv1["l1"](maps[0]), 0.1)
        offset = F.leaky_relu(self.offset_conv2["l1"](torch.cat([offset, up], 1)), 0.1)
        up = F.interpolate(feature, scale_factor=2, mode="bilinear", align_corners=False)
        feature = self.dcn_pack["l1"](neighbour[0], offset) + up
        offset = F.leaky_relu(self.cas_offset_conv1(torch.cat([feature, reference[0]], 1)), 0.1)
        return F.leaky_relu(self.cas_dcnpack(feature, offset), 0.1)


@pytest.mark.parametrize("name", ["conv_offset", "conv_offset_mask"])
def test_edvr_reads_the_offsets_from_another_map(tmp_path, name):
    original = filled(PCDAlignment(lambda ins, outs: DCNv2Pack(ins, outs, groups=4, name=name)))
    ours = PCDAlignment(
        lambda ins, outs: DCNv2(ins, outs, 3, padding=1, offset_groups=4, mask_activation="sigmoid")
    ).eval()
    report = load_checkpoint(ours, saved(tmp_path / "EDVR.pth", {"params": original.state_dict()}))
    assert len(report.renamed) == (6 if name == "conv_offset_mask" else 0) and not report.notes
    frames = [[drawn(1, 8, 16 // s, 12 // s, seed=seed + s) for s in (1, 2)] for seed in (0, 10)]
    close(ours(*frames), original(*frames))


class FaPNConv(nn.Module):
    """FaPN's on torchvision: `offset_mask` reads the other map, `dcn` holds the weight."""

    def __init__(self, ins, outs):
        super().__init__()
        self.dcn = Plain(ins, outs)
        self.offset_mask = nn.Conv2d(outs, 27, 3, 1, 1)

    def forward(self, x, feature):
        one, two, mask = self.offset_mask(feature).chunk(3, dim=1)
        return self.dcn.sample(x, torch.cat((one, two), 1), mask.sigmoid())


def test_fapn_reads_a_map_of_its_own_width():
    original = nn.ModuleDict(dict(dcpack_L2=filled(FaPNConv(4, 6))))
    ours = nn.ModuleDict(dict(dcpack_L2=DCNv2(4, 6, 3, padding=1, mask_activation="sigmoid", offset_channels=6)))
    report = load_checkpoint(ours, original.state_dict())
    assert report.renamed["dcpack_L2.dcn.weight"] == "dcpack_L2.weight" and not report.notes
    x, feature = drawn(2, 4, 8, 8), drawn(2, 6, 8, 8, seed=2)
    close(ours["dcpack_L2"](x, feature), original["dcpack_L2"](x, feature))


def predictor(reads, width, outputs, last=nn.Conv2d):
    inner = [nn.Conv2d(reads, width, 3, 1, 1), *(nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))]
    steps = [step for conv in inner for step in (conv, nn.LeakyReLU(0.1, inplace=True))]
    return nn.Sequential(*steps, last(width, outputs, 3, 1, 1))


class FlowAlignment(Plain):
    """BasicVSR++'s second-order alignment: the offsets are a bounded residual of two flows, (x, y) each."""

    def __init__(self, ins, outs, groups, residue=10):
        super().__init__(ins, outs)
        self.conv_offset = predictor(3 * outs + 4, outs, 27 * groups)
        self.residue = residue

    def forward(self, x, feature, flow_1, flow_2):
        raw = self.conv_offset(torch.cat([feature, flow_1, flow_2], 1))
        one, two, mask = raw.chunk(3, dim=1)
        offset = self.residue * torch.tanh(torch.cat((one, two), 1))
        moves = [
            half + flow.flip(1).repeat(1, half.shape[1] // 2, 1, 1)
            for half, flow in zip(offset.chunk(2, dim=1), (flow_1, flow_2), strict=True)
        ]
        return self.sample(x, torch.cat(moves, 1), mask.sigmoid())


class ResidualOfFlow(nn.Sequential):
    """The same as a branch alone: the flows are the last channels that it reads."""

    def forward(self, feature):
        raw = super().forward(feature)
        offset, mask = raw.split([raw.shape[1] // 3 * 2, raw.shape[1] // 3], 1)
        flows = [flow.flip(1).repeat(1, offset.shape[1] // 4, 1, 1) for flow in feature[:, -4:].split(2, 1)]
        return torch.cat([10 * torch.tanh(offset) + torch.cat(flows, 1), mask], 1)


def test_basicvsrpp_moves_along_the_flow(tmp_path):
    original = nn.ModuleDict(dict(deform_align=nn.ModuleDict(dict(backward_1=FlowAlignment(8, 4, groups=2)))))
    file = saved(
        tmp_path / "basicvsr_plusplus.pth",
        {"state_dict": {f"generator.{k}": v for k, v in filled(original).state_dict().items()}},
    )
    shapes = dict(x=8, feature=12, flow_1=2, flow_2=2)
    maps = [drawn(2, channels, 9, 10, seed=seed) for seed, channels in enumerate(shapes.values())]
    expected = original["deform_align"]["backward_1"](*maps)

    ours = nn.ModuleDict(
        dict(
            deform_align=nn.ModuleDict(
                dict(backward_1=SecondOrderDeformableAlignment(8, 4, 3, padding=1, deform_groups=2))
            )
        )
    )
    report = load_checkpoint(ours, file)
    assert "deform_align.backward_1.conv_offset.6.weight" in report.loaded and not report.renamed
    layer = ours["deform_align"]["backward_1"]
    close(layer(*maps), expected)

    seen = []
    with layer.register_sampling_hook(lambda layer, samples: seen.append(samples)):
        layer(*maps)
    assert seen[0].offset.shape == (2, 36, 9, 10) and torch.equal(seen[0].input, maps[0])

    alone = DCNv2(8, 4, 3, padding=1, offset_groups=2, mask_activation="sigmoid", offset_channels=16)
    alone.conv_offset = ResidualOfFlow(*predictor(16, 4, 54, last=OffsetPredictor))
    alone.load_state_dict(original["deform_align"]["backward_1"].state_dict())
    close(alone(maps[0], torch.cat(maps[1:], 1)), expected)
    alone.reset_offsets()
    moves, masks = alone.offsets(maps[0], torch.cat(maps[1:], 1))
    assert torch.equal(moves[:, :2], maps[2].flip(1)) and (masks == 0.5).all()


# -- CenterNet and YOLACT++ --------------------------------------------------------------------------------------------


class DCN(Plain):
    """CharlesShang's layer, which both use: `conv_offset_mask` reads the input; a bias even before a norm."""

    def __init__(self, ins, outs, kernel_size, stride, padding, dilation=1, deformable_groups=1):
        assert dilation == 1
        super().__init__(ins, outs, 3, stride, padding)
        self.conv_offset_mask = nn.Conv2d(ins, 27 * deformable_groups, 3, stride, padding)

    def forward(self, x):
        one, two, mask = self.conv_offset_mask(x).chunk(3, dim=1)
        return self.sample(x, torch.cat((one, two), 1), mask.sigmoid())


class CenterNetHead(nn.Module):
    """A node of DLA's `ida_up`, and the upsampling of the ResNet, `deconv_layers`."""

    def __init__(self, dcn):
        super().__init__()

        def block(ins, outs):
            module = nn.Module()
            module.actf = nn.Sequential(nn.BatchNorm2d(outs), nn.ReLU())
            module.conv = dcn(ins, outs, kernel_size=(3, 3), stride=1, padding=1, dilation=1, deformable_groups=1)
            return module

        self.ida_up = nn.ModuleDict(dict(proj_1=block(6, 4), node_1=block(4, 4)))
        self.deconv_layers = nn.Sequential(
            dcn(4, 8, kernel_size=(3, 3), stride=1, padding=1, dilation=1, deformable_groups=1),
            nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        for part in self.ida_up.values():
            x = part.actf(part.conv(x))
        return self.deconv_layers(x)


@pytest.mark.parametrize("load", [load_checkpoint, nn.Module.load_state_dict], ids=["load_checkpoint", "plain"])
def test_centernet_takes_our_layer_in_one_line(load):
    original = filled(CenterNetHead(DCN))
    # The authors import `DCN` from `dcn_v2`.
    stand_in = types.SimpleNamespace(DCN=dcn_plugin.mm.build_dcnv2)
    ours = CenterNetHead(stand_in.DCN).eval()
    load(ours, original.state_dict())
    x = drawn(1, 6, 8, 8)
    close(ours(x), original(x))


class YolactBlock(nn.Module):
    def __init__(self, ins, planes, stride, deformable):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, planes, 1, bias=False), nn.BatchNorm2d(planes)
        if deformable:
            self.conv2 = DCN(planes, planes, 3, stride, 1)
        else:
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Sequential(nn.Conv2d(ins, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + self.downsample(x)).relu()


class YolactBackbone(nn.Module):
    """One block a stage; `layers` is a list, and stages 2 to 4 deform."""

    def __init__(self, widths):
        super().__init__()
        self.layers, ins = nn.ModuleList(), 4
        self.conv1, self.bn1 = nn.Conv2d(3, ins, 7, 2, 3, bias=False), nn.BatchNorm2d(ins)
        for stage, planes in enumerate(widths):
            self.layers.append(nn.Sequential(YolactBlock(ins, planes, 2 if stage else 1, stage > 0)))
            ins = 4 * planes

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for layer in self.layers:
            x = layer(x)
        return x


WIDTHS = (4, 8, 12, 16)


def resnet(bias, **layer):
    model = timm.create_model("resnet50", layers=(1,) * 4, channels=WIDTHS, stem_width=4, num_classes=0)
    model.conv1, model.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
    for block in (getattr(model, f"layer{i}")[0] for i in (1, 2, 3, 4)):
        for conv in [block.conv1] if block is model.layer1[0] else []:
            block.conv1 = nn.Conv2d(4, conv.out_channels, 1, bias=False)
            block.downsample[0] = nn.Conv2d(4, 4 * WIDTHS[0], 1, bias=False)
    if bias:  # CharlesShang's layer has one
        for i in (2, 3, 4):
            conv = getattr(model, f"layer{i}")[0].conv2
            conv.register_parameter("bias", nn.Parameter(torch.zeros(conv.out_channels)))
    dcn_plugin.convert(model, dict(match="layer[2-4].*.conv2", layer=dict(type="DCNv2", mask_activation="sigmoid")))
    return model.eval()


def test_yolactpp_goes_into_timms_resnet(tmp_path):
    original, x = filled(YolactBackbone(WIDTHS)), drawn(1, 3, 64, 64)
    state = {f"backbone.{k}": v for k, v in original.state_dict().items()} | {"proto_net.0.weight": torch.zeros(2)}
    ours = resnet(bias=True)
    report = load_checkpoint(ours, saved(tmp_path / "yolact_plus_resnet50.pth", state))
    assert report.renamed["layers.1.0.conv2.conv_offset_mask.weight"] == "layer2.0.conv2.conv_offset.weight"
    assert report.outside == ["proto_net.0.weight"]
    close(ours.forward_features(x), original(x))


def test_yolacts_own_model_keeps_its_names():
    original = YolactBackbone(WIDTHS)
    ours = YolactBackbone(WIDTHS)
    for layer in ours.layers[1:]:
        conv = layer[0].conv2
        layer[0].conv2 = DCNv2(conv.weight.shape[1], conv.weight.shape[0], 3, conv.stride, 1, mask_activation="sigmoid")
    report = load_checkpoint(ours.eval(), filled(original).state_dict())
    assert report.renamed["layers.1.0.conv2.conv_offset_mask.bias"] == "layers.1.0.conv2.conv_offset.bias"
    x = drawn(1, 3, 32, 32)
    close(ours(x), original(x))


# -- DBNet of EasyOCR --------------------------------------------------------------------------------------------------


class DBBlock(YolactBlock):
    """`conv2_offset` has stride 1; where conv2 strides, the operator reads the first of its numbers."""

    def __init__(self, ins, planes, stride, deformable):
        super().__init__(ins, planes, stride, False)
        self.stride = stride
        self.conv2_offset = nn.Conv2d(planes, 27, 3, padding=1) if deformable else None

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        if self.conv2_offset is None:
            y = self.conv2(y)
        else:
            raw = self.conv2_offset(y)
            size = [(side - 1) // self.stride + 1 for side in y.shape[2:]]
            offset, mask = raw[:, :18].contiguous(), raw[:, -9:].contiguous().sigmoid()
            read = [
                torch.stack([image.reshape(-1)[: rows * size[0] * size[1]].view(rows, *size) for image in images])
                for rows, images in ((18, offset), (9, mask))
            ]
            y = deform_conv2d(y, read[0], self.conv2.weight, None, self.stride, 1, 1, read[1])
        y = self.bn3(self.conv3(self.bn2(y).relu()))
        return (y + self.downsample(x)).relu()


class DBBackbone(YolactBackbone):
    def __init__(self, widths):
        super().__init__(widths)
        ins = 4
        del self.layers
        for stage, planes in enumerate(widths):
            block = DBBlock(ins, planes, 2 if stage else 1, stage > 0)
            self.add_module(f"layer{stage + 1}", nn.Sequential(block))
            ins = 4 * planes
        self.smooth, self.fc = nn.Conv2d(ins, 5, 1), nn.Linear(ins, 7)

    @property
    def layers(self):
        return [self.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]


def test_dbnets_strided_layers_read_a_part_of_their_offsets(tmp_path):
    original, x = filled(DBBackbone(WIDTHS)), drawn(2, 3, 72, 64)
    state = {f"model.module.backbone.{k}": v for k, v in original.state_dict().items()}
    file = saved(tmp_path / "pretrained_ic15_res50.pt", state | {"model.module.decoder.in5.weight": torch.zeros(2)})
    extra = ["smooth.*", "fc.*"]

    ours = resnet(bias=False)
    report = load_checkpoint(ours, file, allow_unexpected=extra)
    (note,) = [note for note in report.notes if "DBNet" in note]
    assert note.endswith("in layer2.0.conv2, layer3.0.conv2, layer4.0.conv2")
    assert (ours.forward_features(x) - original(x)).abs().max() > 1e-3

    for layer in ours.modules():
        if isinstance(layer, DCNv2) and layer.stride != (1, 1):
            layer.conv_offset = PrefixPredictor(layer)
    report = load_checkpoint(ours, file, allow_unexpected=extra)
    assert not any("DBNet" in note for note in report.notes)
    assert report.renamed["layer2.0.conv2_offset.weight"] == "layer2.0.conv2.conv_offset.weight"
    close(ours.forward_features(x), original(x))
    assert set(ours.state_dict()) == set(resnet(bias=False).state_dict())


def test_a_prefix_of_dcnv1s_offsets():
    layer = DCNv1(4, 6, 3, stride=2, padding=1)
    layer.conv_offset = PrefixPredictor(layer)
    layer, x = filled(layer), drawn(2, 4, 7, 9)
    raw = F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, padding=1)
    offset = torch.stack([image.reshape(-1)[: 18 * 4 * 5].view(18, 4, 5) for image in raw])
    close(layer(x), deform_conv2d(x, offset, layer.weight, layer.bias, 2, 1))


# -- offsets as arguments: TDAN, RepPoints, STDF -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dconv_1", "reppoints_cls_conv"])
def test_layers_that_are_given_their_offsets_have_our_names(name):
    original = nn.ModuleDict({name: filled(Plain(8, 8, bias=False))})
    ours = nn.ModuleDict({name: DeformConv2d(8, 8, 3, padding=1, bias=False, offset_groups=4)})
    assert not load_checkpoint(ours, original.state_dict()).renamed
    x, offset = drawn(1, 8, 6, 6), drawn(1, 72, 6, 6, seed=2)
    close(ours[name](x, offset), original[name].sample(x, offset, None))
