"""No deformable layer goes where a module folds its convolutions away; outputs agree before and after any folding."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcn_plugin
from dcn_plugin import DCNv2
from dcn_plugin._folding import _folding_methods

V2 = dict(type="DCNv2")


def norm(channels):
    """A batch norm in evaluation whose factors and summands matter."""
    made = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        for tensor in (made.weight, made.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (made.bias, made.running_mean):
            tensor.normal_()
    return made


def move_offsets(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset" in name:
                parameter.normal_(std=0.3)
    return model


def folded(conv, bn):
    """A new plain convolution that computes what a convolution and the norm behind it compute."""
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    made.weight.data = conv.weight * factor[:, None, None, None]
    made.bias.data = bn.bias + (conv.bias - bn.running_mean) * factor
    return made


class Pair(nn.Module):
    """A convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Deploys(Pair):
    """A block that folds itself in place, as RepVGG's do in its authors' code."""

    def switch_to_deploy(self):
        self.conv, self.bn = folded(self.conv, self.bn), nn.Identity()


class Fuses(Pair):
    """A block that returns what is to take its place, as LeViT's do."""

    def fuse(self, verbose=False):
        return folded(self.conv, self.bn)


class TwoLevels(nn.Module):
    """A block whose part, not it, knows how to fold."""

    def __init__(self):
        super().__init__()
        self.inner = Deploys()
        self.other = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.other(self.inner(x))


class Rebuilds(nn.Sequential):
    """A whole model that makes plain convolutions of all its pairs."""

    def fuse(self):
        for pair in self:
            pair.conv, pair.bn = folded(pair.conv, pair.bn), nn.Identity()
        return self


class Scales(nn.Sequential):
    """A whole model that multiplies the norms into whatever layer is before them, and keeps the layer."""

    def fuse(self):
        for pair in self:
            factor = pair.bn.weight / (pair.bn.running_var + pair.bn.eps).sqrt()
            pair.conv.weight.data = pair.conv.weight * factor[:, None, None, None]
            pair.conv.bias.data = pair.bn.bias + (pair.conv.bias - pair.bn.running_mean) * factor
            pair.bn = nn.Identity()
        return self


class MergesNormBefore(nn.Module):
    """A block that multiplies the norm before a convolution into it: offsets are predicted from the norm's result."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = norm(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x))

    def reparameterize(self):
        factor = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        self.conv.bias.data += self.conv.weight[..., 0, 0] @ (self.norm.bias - self.norm.running_mean * factor)
        self.conv.weight.data = self.conv.weight * factor[None, :, None, None]
        self.norm = nn.Identity()


class MergesIntoLast(Pair):
    """A block that multiplies its norm into the last convolution it finds, which is then `conv_offset`."""

    def fuse_bn(self):
        last = [m for m in self.modules() if isinstance(m, nn.Conv2d)][-1]
        factor = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        last.weight.data[: len(factor)] *= factor[:, None, None, None]
        self.bn = nn.Identity()


class FusesMaps(Pair):
    """A block whose `fuse` is about feature maps."""

    def fuse(self, first, second):
        return first + second


class CannotFold(Pair):
    """A block whose folding does not work, with a deformable layer or without."""

    def fuse(self):
        raise NotImplementedError("not written yet")


class NeedsPlain(Pair):
    """A block that refuses by itself to fold what it does not know."""

    def reparam(self):
        assert type(self.conv) is nn.Conv2d


@pytest.mark.parametrize(
    "make, match, owner, method, what",
    [
        (lambda: nn.Sequential(Deploys()), "0.conv", r"'0' \(Deploys\)", "switch_to_deploy", "put a plain convolution"),
        (lambda: nn.Sequential(Fuses()), "0.conv", r"'0' \(Fuses\)", "fuse", "put a plain convolution"),
        (Deploys, "conv", r"the model itself \(Deploys\)", "switch_to_deploy", "put a plain convolution"),
        (TwoLevels, "inner.conv", r"'inner' \(Deploys\)", "switch_to_deploy", "put a plain convolution"),
        (lambda: Rebuilds(Pair(), Pair()), "1.*", r"the model itself \(Rebuilds\)", "fuse", "put a plain convolution"),
        (
            lambda: nn.ModuleDict(dict(net=Rebuilds(Pair()))),
            "net.0.conv", r"'net' \(Rebuilds\)", "fuse", "put a plain convolution",
        ),
        (MergesNormBefore, "conv", "the model itself", "reparameterize", "write other weights"),
        (MergesIntoLast, "conv", "the model itself", "fuse_bn", "write other weights"),
        (NeedsPlain, "conv", "the model itself", "reparam", r"fails with a deformable layer: AssertionError\("),
    ],
)  # fmt: skip
def test_a_convolution_that_is_folded_is_refused_by_name(make, match, owner, method, what):
    model = make()
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"rules\[0\].* which {owner}.* folds: {method}\(\) (would )?{what}"):
        dcn_plugin.convert(model, dict(match=match, kernel_size=[1, 1] if "Norm" in str(make) else [3, 3], layer=V2))
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random), "no random number is drawn"


@pytest.mark.parametrize("layer", ["DCNv1", "DCNv2"])
def test_folding_that_keeps_the_layer_is_allowed_and_right(layer):
    model = Scales(Pair(), Pair()).eval()
    dcn_plugin.convert(model, dict(match="*.conv", layer=dict(type=layer)))
    move_offsets(model)
    x = torch.randn(2, 4, 9, 9)
    before = model(x)
    torch.testing.assert_close(model.fuse()(x), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_what_a_block_does_not_fold_is_replaced():
    model = TwoLevels().eval()
    dcn_plugin.convert(model, dict(match="other", layer=V2))
    move_offsets(model)
    x = torch.randn(2, 4, 9, 9)
    before = model(x)
    model.inner.switch_to_deploy()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.other, DCNv2)


def test_names_that_fold_nothing_do_not_matter():
    for model in (FusesMaps(), CannotFold(), nn.Sequential(FusesMaps())):
        assert len(dcn_plugin.convert(model, dict(match="*conv", layer=V2))) == 1


def test_shared_blocks_are_refused_under_each_name():
    block = Deploys()
    model = nn.ModuleDict(dict(first=block, second=block))
    with pytest.raises(TypeError, match=r"'first.conv', which 'first' \(Deploys\) folds"):
        dcn_plugin.convert(model, dict(match="second.conv", layer=V2))


def test_folding_is_tried_without_values_too():
    with torch.device("meta"):
        model = nn.Sequential(Scales(Pair()), Deploys())
    with pytest.raises(TypeError, match=r"'1' \(Deploys\) folds"):
        dcn_plugin.convert(model, dict(match="*", kernel_size=3, layer=V2))
    assert len(dcn_plugin.convert(model, dict(match="0.0.conv", layer=V2))) == 1


# timm's families that fold themselves: module, model, image size, convolutions that are folded, one that is not

TIMM = [
    ("byobnet", "repvgg_a0", 64, ["stages.3.0.conv_kxk.conv", "stem.conv_1x1.conv"], None),
    ("byobnet", "mobileone_s0", 64, ["stages.2.0.conv_kxk.1.conv", "stem.conv_scale.conv"], None),
    ("efficientvim", "efficientvim_m1", 64, ["stages.0.blocks.0.dwconv1.conv"], "stages.0.blocks.0.mixer.dw.conv"),
    ("efficientvit_msra", "efficientvit_m0", 224, ["patch_embed.conv1.conv"], "stages.1.downsample.patchmerge.se.fc1"),
    (
        "fastvit", "fastvit_t8", 64,
        ["stem.0.conv_kxk.0.conv", "stages.2.blocks.0.token_mixer.mixer.conv_scale.conv"],
        "stages.2.blocks.0.mlp.conv.conv",
    ),
    (
        "ghostnet", "ghostnetv3_050", 64,
        ["blocks.3.0.ghost1.primary_rpr_conv.0.conv", "blocks.1.0.dw_rpr_scale.conv"], None,
    ),
    ("iformer", "iformer_t", 64, ["stages.0.blocks.0.mixer.module.0.c", "stages.2.blocks.6.cpe.module.c"], None),
    ("lcnetv2", "lcnetv2_small", 64, ["stages.2.0.dw_conv_list.0.conv"], "stages.2.0.pw_conv.0.conv"),
    ("levit", "levit_conv_128s", 224, ["stem.conv1.linear"], None),
    ("nextvit", "nextvit_small", 64, ["stages.0.blocks.0.mlp.fc1"], "stages.0.blocks.0.mhca.group_conv3x3"),
    ("repghost", "repghostnet_050", 64, ["blocks.3.0.ghost1.cheap_operation.0"], "blocks.3.0.conv_dw"),
    ("repvit", "repvit_m0_9", 64, ["stages.2.blocks.0.token_mixer.conv.c"], "stages.2.blocks.0.se.fc1"),
    ("shvit", "shvit_s1", 224, ["stages.0.blocks.0.conv.m.c"], "stages.1.downsample.2.se.fc1"),
    ("tiny_vit", "tiny_vit_5m_224", 224, ["stages.0.blocks.0.conv1.conv"], None),
]  # fmt: skip


def test_every_family_of_timm_that_folds_itself_is_in_the_table():
    models = pytest.importorskip("timm.models")
    found = set()
    for info in pkgutil.iter_modules(models.__path__):
        for kind in vars(importlib.import_module(f"timm.models.{info.name}")).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and _folding_methods(kind):
                found.add(kind.__module__.rpartition(".")[2])
    assert found == {module for module, *_ in TIMM}


@pytest.mark.parametrize("module, name, size, refused, kept", TIMM, ids=[row[1] for row in TIMM])
def test_timm_models_that_fold_themselves(module, name, size, refused, kept):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for match in refused:
        with pytest.raises(TypeError, match=rf"got '{match}', which '.*folds: (fuse|reparameterize|switch_to_deploy)"):
            dcn_plugin.convert(model, dict(match=match, layer=V2))
    if kept is not None:
        dcn_plugin.convert(model, dict(match=kept, layer=V2))
    move_offsets(model)
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        before = model(x)
        flat = timm.utils.model.reparameterize_model(model)
        after = flat(x)
    assert before.isfinite().all()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
    assert sum(isinstance(m, DCNv2) for m in flat.modules()) == (kept is not None)


@pytest.mark.parametrize(
    "name, match",
    [("repvgg_a0", "stages.3.*.reparam_conv"), ("repvit_m0_9", "stages.2.blocks.*.token_mixer"),
     ("fastvit_t8", "stages.2.blocks.*.token_mixer.reparam_conv")],
)  # fmt: skip
def test_a_model_that_is_folded_first_is_converted(name, match):
    timm = pytest.importorskip("timm")
    model = timm.utils.model.reparameterize_model(timm.create_model(name, num_classes=5).eval())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert len(dcn_plugin.convert(model, dict(match=match, kernel_size=3, layer=V2)))
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4 * before.abs().max().item())


def test_this_packages_models_fold_nothing():
    timm = pytest.importorskip("timm")
    models = [timm.create_model("resnet18_dcn", channels=(8, 8, 8, 8)), timm.create_model("resnet50d_dcn")]
    if importlib.util.find_spec("mmengine"):
        models.append(dcn_plugin.mm.DCNResNet(18, dcn=dict(type="DCNv2"), stage_with_dcn=(False, True, True, True)))
    for model in models:
        assert not [m for m in model.modules() if _folding_methods(type(m))]


def test_fine_tuning_is_refused_before_any_data_is_read():
    finetune = pytest.importorskip("dcn_plugin.finetune")
    with pytest.raises(
        TypeError, match=r"rules\[0\].*'stages.3.0.conv_kxk.conv', which 'stages.3.0' \(RepVggBlock\) folds"
    ):
        finetune.FinetuneModule(
            dict(name="repvgg_a0", num_classes=2), rules=[dict(match="stages.3.*", kernel_size=3, layer=V2)]
        )
