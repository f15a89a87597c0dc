"""Segmenters: torchvision's models name by name, the papers' DeepLab by hand, strides of backbones, export."""

import copy

import pytest
import torch

pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.resnet import Bottleneck, ResNet  # noqa: E402
from torchvision.models.segmentation import FCN, DeepLabV3  # noqa: E402
from torchvision.models.segmentation.deeplabv3 import DeepLabHead  # noqa: E402
from torchvision.models.segmentation.fcn import FCNHead  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.export import export_model, load_exported  # noqa: E402
from dcn_plugin.layers import sampling_layers  # noqa: E402
from dcn_plugin.segmentation import Segmenter, build_segmenter, deeplab, deeplabv3, fcn  # noqa: E402

TINY = dict(name="resnet18_dcn", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
AS_GIVEN = dict(image_mean=(0.0,) * 3, image_std=(1.0,) * 3)


def draw_offsets(model):
    """Give every deformable layer offsets, which are 0 in a fresh one."""
    for layer in sampling_layers(model).values():
        nn.init.normal_(layer.conv_offset.weight, std=0.05)
        nn.init.normal_(layer.conv_offset.bias, std=0.05)


BUILDERS = {
    deeplabv3: (torchvision.models.segmentation.deeplabv3_resnet50, DeepLabV3, DeepLabHead),
    fcn: (torchvision.models.segmentation.fcn_resnet50, FCN, FCNHead),
}


@pytest.mark.parametrize("ours", BUILDERS)
@pytest.mark.parametrize("aux", [False, True])
def test_keys_and_shapes_are_those_of_torchvisions_models(ours, aux):
    with torch.device("meta"):
        truth = BUILDERS[ours][0](weights=None, weights_backbone=None, num_classes=21, aux_loss=aux).state_dict()
        found = ours(21, "resnet50", aux_loss=aux).state_dict()
    assert [(key, value.shape) for key, value in found.items()] == [(key, value.shape) for key, value in truth.items()]


@pytest.mark.parametrize("ours", BUILDERS)
def test_values_are_those_of_torchvisions_models(ours):
    torch.manual_seed(0)
    _, kind, head = BUILDERS[ours]
    resnet = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    body = IntermediateLayerGetter(resnet, {"layer4": "out", "layer3": "aux"})
    truth = kind(body, head(2048, 4), FCNHead(1024, 4)).eval()
    short = dict(name="resnet50", layers=(1, 1, 1, 1))
    model = ours(4, short, aux_loss=True, **AS_GIVEN).eval()
    model.load_state_dict(truth.state_dict())
    images = torch.rand(1, 3, 33, 40)
    with torch.no_grad():
        found, wanted = model(images), truth(images)
        assert list(found) == ["out", "aux"] == list(wanted)
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key])
        # A deformable one goes on from torchvision's weights, and computes the same until it is trained.
        deformable = ours(4, dict(short, name="resnet50_dcn"), aux_loss=True, **AS_GIVEN).eval()
        dcn_plugin.load_checkpoint(deformable, truth.state_dict(), allow_missing="*.conv_offset.*")
        torch.testing.assert_close(deformable(images)["out"], wanted["out"], rtol=1e-3, atol=1e-3)


def bilinear_filter(stride):
    """The fixed filter of the original's deconvolution: a tent of twice the stride, along both axes."""
    centre = stride - 0.5
    tent = 1 - (torch.arange(2 * stride) - centre).abs() / stride
    return tent[:, None] * tent


@pytest.mark.parametrize("stride", [8, 16])
def test_deeplab_is_the_papers(stride):
    """1x1 to 1024, ReLU, 1x1 to classes, then the original's deconvolution, cropped by half a stride."""
    torch.manual_seed(0)
    model = deeplab(5, TINY, output_stride=stride, head_channels=32).eval()
    draw_offsets(model)
    images = torch.rand(2, 3, 96, 80)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        (c5,) = model.backbone((images - mean) / std)
        assert c5.shape == (2, 16, 96 // stride, 80 // stride)
        (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (model.classifier[0], model.classifier[2]))
        hidden = torch.einsum("oc,nchw->nohw", w1[:, :, 0, 0], c5) + b1.view(-1, 1, 1)
        scores = torch.einsum("oc,nchw->nohw", w2[:, :, 0, 0], hidden.clamp(min=0)) + b2.view(-1, 1, 1)
        weight = bilinear_filter(stride).expand(5, 1, -1, -1)
        large = F.conv_transpose2d(scores, weight, stride=stride, groups=5)
        truth = large[..., stride // 2 :, stride // 2 :][..., :96, :80]
        found = model(images)["out"]
    inner = (..., slice(stride // 2, -stride // 2), slice(stride // 2, -stride // 2))  # the original fades out to 0
    assert found.shape == (2, 5, 96, 80)
    torch.testing.assert_close(found[inner], truth[inner], rtol=1e-4, atol=1e-5)


def test_deeplabs_default_backbone_deforms_and_dilates_the_last_stage_alone(monkeypatch):
    asked = {}

    def note(arguments, *others):
        asked.update(arguments)
        return real(TINY | {key: value for key, value in arguments.items() if key != "name"}, *others)

    from dcn_plugin.segmentation import segmenters

    real = segmenters.timm_maps
    monkeypatch.setattr(segmenters, "timm_maps", note)
    model = deeplab(3)
    assert asked["name"] == "resnet101_dcnv1" and model.classifier[0].out_channels == 1024
    layers = sampling_layers(model.backbone)
    assert layers and all(name.startswith("layer4.") for name in layers)
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.classifier[2].bias.any()


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_strides_of_a_resnet(stride):
    model = fcn(3, TINY, output_stride=stride, aux_loss=True).eval()
    aux, out = model.backbone(torch.rand(1, 3, 64, 96))
    assert out.shape[-2:] == (64 // stride, 96 // stride) and model.output_stride == stride
    assert aux.shape[-2:] == (64 // min(stride, 16), 96 // min(stride, 16))


@pytest.mark.parametrize(
    ("name", "options"), [("internimage_tiny", dict(depths=(1, 1, 1, 1))), ("dat_tiny", dict(img_size=64))]
)
def test_backbones_without_a_choice_of_stride_say_so(name, options):
    with pytest.raises(ValueError, match=rf"output_stride: expected 32 or None, .*{name} cannot be chosen.*got 16"):
        deeplab(3, dict(name=name, **options))
    model = deeplab(3, dict(name=name, **options), output_stride=None, head_channels=8).eval()
    assert model.output_stride == 32 and model(torch.rand(1, 3, 64, 64))["out"].shape == (1, 3, 64, 64)
    # A finer one of its maps has the stride that was asked for.
    model = deeplab(3, dict(name=name, out_indices=(1, 2), **options), aux_loss=True, head_channels=8).eval()
    assert model.output_stride == 16
    found = model(torch.rand(1, 3, 64, 64))
    assert found["out"].shape == found["aux"].shape == (1, 3, 64, 64)


def test_channels_last_backbones_of_timm():
    model = fcn(3, dict(name="swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1)), output_stride=None)
    assert model.eval()(torch.rand(1, 3, 64, 64))["out"].shape == (1, 3, 64, 64)


def test_images_are_normalised_by_the_model():
    torch.manual_seed(0)
    model = fcn(3, TINY, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.4, 0.2)).eval()
    plain = copy.deepcopy(model)
    plain.image_mean.zero_()
    plain.image_std.fill_(1.0)
    images = torch.rand(1, 3, 64, 64)
    by_hand = torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate(((0.1, 0.5), (0.2, 0.4), (0.3, 0.2)))], 1)
    torch.testing.assert_close(model(images)["out"], plain(by_hand)["out"])
    assert not any("image_" in key for key in model.state_dict())


def test_frozen_stages_and_norms_hold_still_while_training():
    model = fcn(3, TINY, trainable_backbone_layers=2, norm_eval=True).train()
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    before = copy.deepcopy(model.state_dict())
    model(torch.rand(2, 3, 64, 64))["out"].mean().backward()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("classifier.1.") for key in changed)  # the head's norm, which trains
    assert model.backbone.layer4[0].conv1.weight.grad is not None and model.classifier[1].training


@pytest.mark.parametrize("name", ["deeplab", "deeplabv3", "fcn"])
def test_an_exported_folder_gives_the_same_model(tmp_path, name):
    torch.manual_seed(0)
    spec = dict(name=name, num_classes=3, backbone=dict(TINY, in_chans=1), output_stride=16, aux_loss=True)
    model = build_segmenter(spec).eval()
    draw_offsets(model)
    export_model(model, tmp_path, spec=spec, class_names=["ground", "cat", "dog"])
    loaded = load_exported(tmp_path)
    images = torch.rand(2, 1, 48, 64)
    for key, value in model(images).items():
        assert torch.equal(loaded(images)[key], value)
    assert isinstance(loaded, Segmenter) and loaded.class_names == ["ground", "cat", "dog"] and not loaded.training


def test_onnx_graphs_take_other_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from dcn_plugin.export.agreement import require_agreement
    from dcn_plugin.export.onnx import export_onnx, run_onnx

    torch.manual_seed(0)
    model = deeplab(3, dict(TINY, in_chans=1, dcn_stages=(5,)), output_stride=8, head_channels=8).eval()
    draw_offsets(model)
    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    path = export_onnx(model, (torch.rand(2, 1, 64, 72),), tmp_path / "model.onnx", dynamic_shapes=sizes)
    assert [one.name for one in onnxruntime.InferenceSession(str(path)).get_outputs()] == ["out"]
    for shape in ((1, 1, 64, 72), (3, 1, 80, 56)):
        images = torch.rand(shape)
        with torch.no_grad():
            require_agreement(run_onnx(path, (images,)), [model(images)["out"]], 1e-4)
