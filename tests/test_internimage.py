"""InternImage and FlashInternImage: official names, formulas written again, weights in every published nesting.

What holds for every family is in test_model_families.py.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from families import MODELS, images, without_weights
from plain_aggregation import close, drawn, plain_internimage
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

import dcn_plugin
from dcn_plugin.layers import offset_parameters, sampling_layers

LAYOUTS = json.loads((Path(__file__).parent / "data" / "internimage.json").read_text())
NAMES = MODELS["dcn_internimage"]
SMALL = dict(channels=16, depths=(1, 2, 2, 1), groups=(1, 2, 4, 8), mlp_ratio=2.0)
HUGE = dict(
    use_clip_projector=True, res_post_norm=True, level2_post_norm_block_ids=(1,), center_feature_scale=True,
    dw_kernel_size=5,
)  # fmt: skip
# Some of each kind, with where their norms stand and which blocks have one behind them.
KINDS = {
    "internimage_tiny": (dict(), "pre", ()),
    "internimage_small": (dict(), "post", ()),
    "internimage_large": (dict(layer_scale=0.5), "post", ()),
    "internimage_huge": (HUGE, "res_post", (1,)),
    "flash_internimage_tiny": (dict(), "pre", ()),
    "flash_internimage_base": (dict(), "post", ()),
    "flash_internimage_large": (dict(layer_scale=0.5), "post", ()),
}
each_kind = pytest.mark.parametrize("name", KINDS)


def small(name="internimage_tiny", **options):
    torch.manual_seed(0)
    own = KINDS[name][0] if name in KINDS else {}
    return timm.create_model(name, **dict(dict(SMALL, num_classes=5), **own, **options)).eval()


# Names, shapes, numbers


def test_the_entries():
    sizes = "tiny small base large xlarge huge".split()
    assert set(NAMES) == {f"internimage_{s}" for s in sizes} | {f"flash_internimage_{s}" for s in sizes[:4]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dicts_are_the_official_ones(name):
    layout = LAYOUTS[name]
    wanted = {}
    for key, shape in layout["shapes"].items():
        level = key.split(".")[1]
        for i in range(layout["depths"][int(level)]) if "*" in key else [0]:
            wanted[key.replace("*", str(i))] = tuple(shape)
    model = without_weights(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == wanted
    assert len(wanted) == layout["entries"]
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("internimage_tiny", 30), ("internimage_small", 50), ("internimage_base", 97), ("internimage_large", 223),
        ("internimage_xlarge", 335), ("internimage_huge", 1080), ("flash_internimage_tiny", 30),
        ("flash_internimage_small", 50), ("flash_internimage_base", 97), ("flash_internimage_large", 223),
    ],
)  # fmt: skip
def test_numbers_of_parameters_are_those_of_the_papers(name, published):
    found = sum(p.numel() for p in without_weights(name).parameters()) / 1e6
    assert found == pytest.approx(published, rel=0.01)


def test_the_names_that_only_some_sizes_have():
    huge, base = (
        without_weights("internimage_huge").state_dict(),
        without_weights("flash_internimage_base").state_dict(),
    )
    shapes = {
        "levels.2.post_norms.4.0.weight": (1280,), "levels.0.blocks.0.dcn.dw_conv.0.weight": (320, 1, 5, 5),
        "levels.0.blocks.0.dcn.center_feature_scale_proj_weight": (10, 320), "levels.3.norm.0.bias": (2560,),
        "levels.3.blocks.5.res_post_norm2.0.weight": (2560,), "dcnv3_head_x4.0.weight": (4096, 2560, 1, 1),
        "dcnv3_head_x3.weight": (1024, 1280, 1, 1), "clip_projector.norm1_k.0.weight": (1024,),
        "clip_projector.cross_dcn.q_bias": (1024,), "clip_projector.cross_dcn.v.weight": (1024, 1024),
        "clip_projector.cross_dcn.proj.bias": (768,), "fc_norm.0.weight": (768,), "head.weight": (1000, 768),
    }  # fmt: skip
    assert {key: tuple(huge[key].shape) for key in shapes} == shapes
    assert not any(key.startswith(("conv_head", "levels.1.post_norms")) or "gamma" in key for key in huge)
    shapes = {
        "levels.0.blocks.0.gamma2": (112,), "levels.0.blocks.3.dcn.offset_mask_dw.weight": (112, 1, 3, 3),
        "levels.0.blocks.3.dcn.offset_mask.weight": (192, 112),  # 7 groups of 27, up to a multiple of 8
    }  # fmt: skip
    assert {key: tuple(base[key].shape) for key in shapes} == shapes
    missing = ("levels.0.norm.0.weight", "levels.0.blocks.0.mlp.fc2.bias", "levels.0.blocks.0.dcn.output_proj.bias")
    assert not any(key in base for key in missing)
    large = without_weights("flash_internimage_large").state_dict()
    assert missing[1] in large and missing[2] in large
    scales = {name: {layer.offset_scale for layer in sampling_layers(without_weights(name)).values()} for name in NAMES}
    twice = {"internimage_large", "internimage_xlarge", "flash_internimage_large"}
    for name, found in scales.items():
        assert found == {2.0 if name in twice else 0.5 if name == "flash_internimage_base" else 1.0}, name


# Numbers


@each_kind
def test_the_model_is_the_formula(name):
    """At a size whose halves are not whole, too, where the official head of the largest model does not run."""
    model = drawn(small(name))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
    _, order, blocks = KINDS[name]
    x = images(64).double()
    logits, maps = plain_internimage(model, x, order, blocks)
    close(model(x), logits)
    for found, wanted in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        close(found, wanted)
    odd = images(50).double()
    assert model(odd).isfinite().all() and model.forward_features(odd).shape[1] == model.num_features


@pytest.mark.parametrize("name", ["internimage_huge", "flash_internimage_tiny"])
def test_half_precision_is_near(name):
    model, x = small(name), images(64)
    with torch.no_grad():
        for key in offset_parameters(model):
            nn.init.normal_(model.get_parameter(key), std=0.03)
        wanted = model.forward_features(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.forward_features(x)
            assert model(x).dtype == torch.bfloat16
        for found in (cast, model.bfloat16().forward_features(x.bfloat16())):
            assert (found - wanted).norm() < 0.05 * wanted.norm()


# What timm does with it


@each_kind
def test_features_leave_the_head_out(name):
    model, x = small(name), images(64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    extractor = small(name, features_only=True, out_indices=(1, 2))
    keys = extractor.model.state_dict().keys()
    assert not any(key.startswith(("conv_head", "head", "clip", "dcnv3_head", "fc_norm", "levels.3")) for key in keys)
    extractor.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in keys})
    for found, wanted in zip(extractor(x), maps[1:3], strict=True):
        torch.testing.assert_close(found, wanted)
    last = model.forward_intermediates(x, indices=1, output_fmt="NHWC", stop_early=True, intermediates_only=True)
    torch.testing.assert_close(last[0].permute(0, 3, 1, 2), maps[3])
    nodes = small(name, features_only=True, feature_cls="fx", out_indices=(0, 3))
    graph = nodes.graph_module
    graph.load_state_dict({k: v for k, v in model.state_dict().items() if k in graph.state_dict()})
    for found, wanted in zip(nodes.eval()(x), (maps[0], maps[3]), strict=True):
        torch.testing.assert_close(found, wanted)


@each_kind
def test_heads_without_pooling(name):
    model = small(name)
    features = model(images()).shape
    assert features == (2, 5)
    model.reset_classifier(0, "")
    channels, side = (1024, 4) if "huge" in name else (model.head_hidden_size, 2)
    assert model(images()).shape == (2, channels, side, side)
    model.reset_classifier(3, "map" if "huge" in name else "avg")
    assert model(images()).shape == (2, 3)
    if "huge" not in name:
        model.reset_classifier(3, "catavgmax")
        assert model(images()).shape == (2, 3)


def test_drop_path_grows_and_dropout_trains():
    model = small(drop_path_rate=0.5, drop_rate=0.2, proj_drop_rate=0.2)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for level in model.levels for b in level.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    model.train()(images()).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_kind
def test_memory_that_is_given_later_is_initialised(name):
    model, fresh = small(name, device="meta").to_empty(device="cpu"), small(name)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 10**6)
    model.init_weights()
    for key, value in model.state_dict().items():
        wanted = fresh.state_dict()[key]
        drawn = (wanted != wanted.flatten()[0]).any()  # what is no constant
        assert value.isfinite().all() and (
            (value != value.flatten()[0]).any() if drawn else torch.equal(value, wanted)
        ), key
    assert model(images()).isfinite().all()


def official_decay(name, depths):
    """How many blocks from the end the official trainers count a parameter, from their description."""
    parts = name.split(".")
    block = {(i, j): sum(depths[:i]) + j for i in range(4) for j in range(depths[i])}
    if parts[0] == "patch_embed":
        return sum(depths) - 1
    if parts[0] != "levels" or parts[2] == "post_norms" or (parts[1] == "3" and parts[2] == "norm"):
        return 0
    place = (int(parts[1]), int(parts[3])) if parts[2] == "blocks" else (int(parts[1]) + 1, 0)
    return sum(depths) - 1 - block[place]


@pytest.mark.parametrize("name", ["internimage_tiny", "internimage_huge", "flash_internimage_small"])
def test_rates_decay_as_in_the_official_trainers(name):
    pytest.importorskip("pytorch_lightning")
    from dcn_plugin.finetune.module import param_groups

    model = without_weights(name)
    depths = [len(level.blocks) for level in model.levels]
    named = {id(p): n for n, p in model.named_parameters()}
    for group in param_groups(model, weight_decay=0.05, layer_decay=0.9):
        for parameter in group["params"]:
            key = named.pop(id(parameter))
            slow = "offset" in key or "center_feature_scale_proj" in key
            assert group["lr_scale"] == pytest.approx(0.9 ** official_decay(key, depths) * (0.1 if slow else 1)), key
            assert group["weight_decay"] == (0 if parameter.dim() == 1 else 0.05)
    assert not named
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == list(range(6)) and coarse["levels.2.blocks.1.norm2.0.weight"] == 3


# Weights

FILES = {
    "internimage_tiny.ogvl_in1k": "internimage_t_1k_224.pth",
    "internimage_small.ogvl_in1k": "internimage_s_1k_224.pth",
    "internimage_base.ogvl_in1k": "internimage_b_1k_224.pth",
    "internimage_large.ogvl_in22k_ft_in1k_384": "internimage_l_22kto1k_384.pth",
    "internimage_large.ogvl_in22k": "internimage_l_22k_192to384.pth",
    "internimage_xlarge.ogvl_in22k_ft_in1k_384": "internimage_xl_22kto1k_384.pth",
    "internimage_xlarge.ogvl_in22k": "internimage_xl_22k_192to384.pth",
    "internimage_huge.ogvl_in22k_ft_in1k_640": "internimage_h_22kto1k_640.pth",
    "internimage_huge.ogvl_in22k": "internimage_h_jointto22k_384.pth",
    "flash_internimage_tiny.ogvl_in1k": "flash_intern_image_t_1k_224.pth",
    "flash_internimage_small.ogvl_in1k": "flash_intern_image_s_1k_224.pth",
    "flash_internimage_base.ogvl_in1k": "flash_intern_image_b_1k_224.pth",
    "flash_internimage_large.ogvl_in22k_ft_in1k_384": "flash_internimage_l_22kto1k_384.pth",
}


def test_tags_name_the_published_files():
    found = {}
    for name in timm.list_pretrained("*internimage*"):
        cfg = timm.get_pretrained_cfg(name)
        found[name] = cfg.hf_hub_filename
        repository = "DCNv4" if name.startswith("flash") else "InternImage"
        assert cfg.hf_hub_id == f"OpenGVLab/{repository}" and cfg.license == "mit"
        assert cfg.crop_pct == 1.0 and cfg.interpolation == "bicubic"
        side = int(name.rpartition("_")[2]) if name[-3:].isdigit() else 384 if name.endswith("in22k") else 224
        assert cfg.input_size == (3, side, side)
        assert cfg.num_classes == (21841 if name.endswith(".ogvl_in22k") else 1000)
    assert found == FILES
    for name in NAMES:  # without a tag, the one of 1000 classes
        assert timm.get_pretrained_cfg(name).num_classes == 1000


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model of 1000 classes, and its weights as they are published, saved and trained."""
    folder = tmp_path_factory.mktemp("weights")
    model = small(num_classes=1000)
    for layer in sampling_layers(model).values():
        for parameter in layer.offset.parameters():
            nn.init.normal_(parameter, std=0.1)
    state = dict(model.state_dict())
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    optimizer = dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[dict(lr=0.1)])
    torch.save({"model": state}, folder / "published.pth")
    torch.save({"model": state, "optimizer": optimizer, "epoch": 300}, folder / "training.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, folder / "module.pth")
    torch.save({"model": other, "model_ema": state}, folder / "ema.pth")
    torch.save(state, folder / "bare.pth")
    save_file({f"model.{k}": v.contiguous() for k, v in state.items()}, folder / "transformers.safetensors")
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, folder / "lightning.pth")
    return model, folder


def pretrained(file, name="internimage_tiny", **options):
    overlay = dict(file=str(file))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **options}).eval()


@pytest.mark.parametrize(
    "file",
    ["published.pth", "training.pth", "module.pth", "ema.pth", "bare.pth", "transformers.safetensors", "lightning.pth"],
)
def test_pretrained_takes_every_nesting(published, file):
    model, folder = published
    with torch.no_grad():
        wanted = model(images())
        torch.testing.assert_close(pretrained(folder / file)(images()), wanted, rtol=0, atol=0)
        other = pretrained(folder / file, num_classes=7, in_chans=1)
        assert other(images(channels=1)).shape == (2, 7)
        loaded = small(num_classes=1000, layer_scale=None)
        dcn_plugin.load_checkpoint(loaded, folder / file)
        torch.testing.assert_close(loaded(images()), wanted, rtol=0, atol=0)


def test_the_hub_is_asked_for_the_published_file(published, monkeypatch):
    """What the hub gives has the nesting of the file, which timm takes off local files only."""
    model, folder = published
    asked = []

    def download(repository, filename, **options):
        asked.append((repository, filename))
        return torch.load(folder / "published.pth")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    found = timm.create_model("internimage_tiny.ogvl_in1k", pretrained=True, **SMALL).eval()
    assert asked == [("OpenGVLab/InternImage", "internimage_t_1k_224.pth")]
    torch.testing.assert_close(found(images()), model(images()), rtol=0, atol=0)


def test_a_backbone_of_a_detector_loads(published, tmp_path):
    """mmdetection's and mmsegmentation's: the levels under `backbone.`, other things beside them, and no head."""
    model, _ = published
    head = ("head.", "conv_head.")
    state = {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith(head)}
    state |= {"neck.lateral_convs.0.conv.weight": torch.zeros(4, 4, 1, 1), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    torch.save({"meta": dict(epoch=12), "state_dict": state}, tmp_path / "mask_rcnn.pth")
    wanted = model.forward_intermediates(images(), intermediates_only=True)
    classifier = small()
    report = dcn_plugin.load_checkpoint(
        classifier, tmp_path / "mask_rcnn.pth", prefix="backbone.", allow_missing=[f"{name}*" for name in head]
    )
    assert len(report.outside) == 2 and not report.unexpected
    features = small(features_only=True)
    dcn_plugin.load_checkpoint(features.model, tmp_path / "mask_rcnn.pth", prefix="backbone.")
    by_timm = pretrained(tmp_path / "mask_rcnn.pth", features_only=True)
    for found in (
        classifier.forward_intermediates(images(), intermediates_only=True),
        features(images()),
        by_timm(images()),
    ):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_segmentations_tiny_has_layer_scales(tmp_path):
    source = small(layer_scale=1.0)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items() if "head." not in k}
    with pytest.raises(RuntimeError, match=r"unexpected.*gamma1"):
        dcn_plugin.load_checkpoint(small(), state, prefix="backbone.", allow_missing=["head.*", "conv_head.*"])
    report = dcn_plugin.load_checkpoint(
        small(layer_scale=1.0), state, prefix="backbone.", allow_missing=["head.*", "conv_head.*"]
    )
    assert "levels.2.blocks.1.gamma2" in report.loaded


# In detectors, MMEngine, pictures


def test_torchvisions_detectors_take_it():
    pytest.importorskip("torchvision")
    from dcn_plugin.detection import faster_rcnn
    from dcn_plugin.detection.spec import layer_order

    detector = faster_rcnn(
        91, dict(name="internimage_tiny", **SMALL), min_size=64, max_size=64, trainable_backbone_layers=2
    )
    body = detector.backbone.body
    first = [p for n, p in body.named_parameters() if ".levels.1." in n and ".downsample." not in n]
    assert first and not any(p.requires_grad for p in first)
    assert all(p.requires_grad for n, p in body.named_parameters() if ".levels.2." in n)
    targets = [dict(boxes=torch.tensor([[4.0, 4, 40, 50]]), labels=torch.tensor([3]))]
    losses = detector.train()([torch.rand(3, 64, 64)], targets)
    sum(losses.values()).backward()
    offsets = [n for n in offset_parameters(body) if ".levels.3." in n]
    assert offsets and all(body.get_parameter(n).grad is not None for n in offsets)
    place = layer_order(body)(coarse=False)
    names = [n for n, _ in detector.named_parameters()]
    order = [place(next(n for n in names if f"levels.{i}.blocks.0.norm1" in n)) for i in range(4)]
    assert order == [1, 2, 3, 4] and place("roi_heads.box_predictor.cls_score.weight") == 5


@pytest.mark.parametrize("name", ["internimage_tiny", "flash_internimage_tiny"])
def test_mmengine_builds_it(name):
    pytest.importorskip("mmengine")
    from dcn_plugin.registry import MODELS

    config = dict(type="dcn_plugin.TimmBackbone", model_name=name, out_indices=(1, 3), **SMALL)
    backbone = MODELS.build(config)
    assert backbone.channels == [32, 128] and backbone.reductions == [8, 32]
    assert [tuple(m.shape) for m in backbone(images())] == [(2, 32, 8, 8), (2, 128, 2, 2)]


@pytest.mark.parametrize("name", ["internimage_large", "flash_internimage_tiny"])
def test_pictures_show_where_it_samples(name):
    pytest.importorskip("matplotlib")
    from dcn_plugin.visualize import record, sampling_points

    model = small(name)
    records = record(model, images(64)[:1])
    assert [item.name for item in records] == list(sampling_layers(model))
    last = records[-1]
    assert last.offset.shape == (1, 8, 9, 2, 2, 2) and last.input_size == (2, 2)
    # A pixel of the last map is 32 wide: the centre of the first lies in the middle of the first 32 of the image.
    (scale, shift), _ = last.grid
    assert scale == 32 and abs(shift) < 16
    step = (last.positions(1, 1)[4] - last.positions(1, 1)[0]).tolist()
    assert step == [model.levels[3].blocks[0].dcn.offset_scale] * 2
    figure = sampling_points(model, images(64)[0], layers=2)
    assert figure.axes[0].collections
