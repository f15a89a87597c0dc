"""segmentation-models-pytorch, transformers, captum and accelerate take the models: values and gradients are right."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import dcn_plugin

SMALL = dict(num_classes=3, channels=(8, 16, 16, 16))


def awake(model):
    """Let every block count: timm begins with a factor of 0 behind the last norm of each."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model.eval()


def moved(model):
    """Give the layers offsets that are not zero."""
    generator = torch.Generator().manual_seed(0)
    names = dcn_plugin.layers.offset_parameters(model)
    assert names
    for name, parameter in model.named_parameters():
        if name in names:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return awake(model)


@pytest.fixture(autouse=True)
def seeded(one_thread, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def test_segmentation_models(one_thread):
    smp = pytest.importorskip("segmentation_models_pytorch")
    x = torch.rand(2, 3, 64, 64)
    for arch, options, dilation in (
        ("Unet", {}, 1),
        ("FPN", dict(encoder_depth=5), 1),
        ("DeepLabV3Plus", dict(encoder_output_stride=16), 2),
        ("DeepLabV3", dict(encoder_output_stride=8), 4),
    ):
        build = getattr(smp, arch)
        model = awake(build("tu-resnet18_dcn", encoder_weights=None, classes=2, **options))
        plain = build("tu-resnet18", encoder_weights=None, classes=2, **options).eval()
        missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
        assert missing == [] and all("conv_offset" in name for name in unexpected)
        torch.testing.assert_close(model(x), plain(x))  # fresh offsets: what the plain model computes
        last = model.encoder.model.layer4[1].conv2
        assert isinstance(last, dcn_plugin.DCNv2) and last.dilation == (dilation, dilation)

    # With offsets, the model in smp computes what its parts do: the last map comes from timm's own model.
    model = moved(
        smp.Unet("tu-resnet18_dcn", encoder_weights=None, classes=2, encoder_depth=4, decoder_channels=(32, 16, 16, 8))
    )
    maps = model.encoder(x)
    alone = timm.create_model("resnet18_dcn", features_only=True, out_indices=(3,)).eval()
    alone.load_state_dict(model.encoder.model.state_dict(), strict=False)
    torch.testing.assert_close(maps[-1], alone(x)[0])
    mask = (torch.rand(2, 1, 64, 64) > 0.5).long()
    smp.losses.DiceLoss("multiclass")(model(x), mask[:, 0]).backward()
    grads = [p.grad for n, p in model.named_parameters() if "conv_offset" in n]
    assert grads and all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)


def test_backbones_of_transformers_survive_their_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(
        backbone="resnet18_dcn", use_pretrained_backbone=False, out_indices=(1, 2, 3, 4)
    )
    backbone = moved(transformers.AutoBackbone.from_config(config))
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    alone = timm.create_model("resnet18_dcn", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    alone.load_state_dict({name.removeprefix("_backbone."): value for name, value in backbone.state_dict().items()})
    found, expected = backbone(x).feature_maps, alone(x)
    assert backbone.channels == [value.shape[1] for value in expected]
    torch.testing.assert_close(list(found), list(expected))
    gradients = [torch.autograd.grad(sum(m.square().mean() for m in maps), x)[0] for maps in (found, expected)]
    torch.testing.assert_close(*gradients)

    sizes = dict(num_labels=3, hidden_size=16, auxiliary_in_channels=256, auxiliary_channels=8)
    model = moved(
        transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **sizes))
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


def test_timm_wrapper_of_transformers_survives_its_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="resnet18_dcn", num_labels=3)
    model = moved(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)
        torch.testing.assert_close(model.timm_model(x), model(x).logits, rtol=0, atol=0)


def test_attributions_of_captum():
    attr = pytest.importorskip("captum.attr")
    model = moved(timm.create_model("resnet18_dcn", **SMALL)).double()
    layer = model.layer4[-1].conv2
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        gained = (model(x) - model(torch.zeros_like(x)))[:, 1]
    # Attributions add up to what the input changes, which gradients of the sampling points must be right for.
    for method in (attr.IntegratedGradients(model), attr.LayerIntegratedGradients(model, model.conv1)):
        found = method.attribute(x, target=1, n_steps=200)
        torch.testing.assert_close(found.flatten(1).sum(1), gained, rtol=1e-4, atol=1e-5)

    kept = []
    handle = layer.register_forward_hook(lambda module, given, output: kept.append(output))
    score = model(x)[:, 1].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True)
    torch.testing.assert_close(attr.LayerGradCam(model, layer).attribute(x, target=1), expected)
    # The layer that predicts offsets is a layer like any other.
    assert attr.LayerGradientXActivation(model, layer.conv_offset).attribute(x, target=1).any()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator_trains_as_a_plain_loop_does(precision):
    accelerate = pytest.importorskip("accelerate")
    model = moved(timm.create_model("resnet18_dcn", **SMALL)).train()
    plain = copy.deepcopy(model)
    x, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 4)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for images, targets in loader:
            accelerator.backward(F.cross_entropy(prepared(images), targets))
            optimizer.step()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = plain(x)
    F.cross_entropy(output.float(), labels).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_accelerate_loads_and_offloads(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = moved(timm.create_model("resnet18_dcn", **SMALL))
    x = torch.rand(2, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    with accelerate.init_empty_weights():
        empty = timm.create_model("resnet18_dcn", **SMALL).eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "weights.bin"), device_map={"": "cpu"})
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    # A device map may even go through a layer.
    inside = "layer4.1.conv2"
    own = [name for name, module in model.named_modules() if module._parameters and not inside.startswith(f"{name}.")]
    places = {name: "cpu" for name in own if not name.startswith(inside)}
    places |= {f"{inside}.weight": "cpu", f"{inside}.conv_offset": "disk"}
    folder = str(tmp_path / "offloaded")
    split = accelerate.dispatch_model(copy.deepcopy(model), places, offload_dir=folder, force_hooks=True)
    assert split.layer4[1].conv2.conv_offset.weight.device.type == "meta"
    with torch.no_grad():
        for other in (loaded, offloaded, split):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
