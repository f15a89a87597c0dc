"""DAT and DAT++ against their formulas written again, and their state dicts (see also test_model_families.py)."""

import dat_formulas
import pytest
import timm
import torch
import torch.nn.functional as F
from families import MODELS, images, without_weights
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

import dcn_plugin
from dcn_plugin.layers import DAttention, offset_parameters, sampling_layers
from dcn_plugin.models._windows import LocalAttention, NeighborhoodAttention, ShiftWindowAttention

# What is published: stages, depths, channels of the first, heads, groups; parameters and tensors of the state dict.
PUBLISHED = {
    "dat_tiny": (("LS", "LS", "LD" * 3, "LD"), 96, (3, 6, 12, 24), (0, 0, 3, 6), 28_319_138, 219),
    "dat_small": (("LS", "LS", "LD" * 9, "LD"), 96, (3, 6, 12, 24), (0, 0, 3, 6), 49_700_402, 435),
    "dat_base": (("LS", "LS", "LD" * 9, "LD"), 128, (4, 8, 16, 32), (0, 0, 4, 8), 87_881_632, 435),
    "dat_plus_tiny": (("ND", "NDND", "ND" * 9, "DD"), 64, (2, 4, 8, 16), (1, 2, 4, 8), 23_962_876, 589),
    "dat_plus_small": (("ND", "NDND", "ND" * 9, "DD"), 96, (3, 6, 12, 24), (1, 2, 3, 6), 53_127_366, 589),
    "dat_plus_base": (("ND", "NDND", "ND" * 9, "DD"), 128, (4, 8, 16, 32), (2, 4, 8, 16), 93_690_640, 589),
}
each_entry = pytest.mark.parametrize("name", PUBLISHED)
each_generation = pytest.mark.parametrize("plus", [False, True], ids=["dat", "dat_plus"])

# A model of few channels, with every kind of attention that the published ones have.
SMALL = {
    False: dict(spec=("LS", "LS", "LD", "LD"), heads=(1, 2, 4, 4), groups=(0, 0, 2, 4)),
    True: dict(spec=("ND", "ND", "ND", "DD"), heads=(2, 2, 4, 4), groups=(1, 2, 2, 4)),
}


def small(plus, dtype=torch.float64, **options):
    """Its weights have moved, all of them so far that each can be seen in the outputs."""
    torch.manual_seed(0)
    given = dict(SMALL[plus], depths=(2, 2, 2, 2), dim=8, num_classes=5, img_size=96, dtype=dtype) | options
    model = timm.create_model("dat_plus_tiny" if plus else "dat_tiny", **given).eval()
    for name, parameter in model.named_parameters():
        table = name.endswith(("table", "rpb"))
        nn.init.normal_(parameter, float("norm.weight" in name), 0.5 if table else 0.3)
    return model


# -- state dicts -------------------------------------------------------------------------------------------------------


def layout(name):
    """Names and shapes of the official state dict for images of 224 pixels, from the table above."""
    spec, width, heads, groups, _, _ = PUBLISHED[name]
    plus, shapes = "plus" in name, {}

    def put(key, *weight, bias=True):
        shapes[f"{key}.weight"] = weight
        if bias:
            shapes[f"{key}.bias"] = weight[:1]

    def norm(key, channels):
        put(f"{key}.norm", channels)

    if plus:
        put("patch_proj.0", width // 2, 3, 3, 3)
        norm("patch_proj.1", width // 2)
        put("patch_proj.3", width, width // 2, 3, 3)
        norm("patch_proj.4", width)
    else:
        put("patch_proj.0", width, 3, 4, 4)
        norm("patch_proj.1", width)
    for i, kinds in enumerate(spec):
        c, size, stage = width * 2**i, 56 // 2**i, f"stages.{i}"
        if i:
            side = 3 if plus else 2
            put(f"down_projs.{i - 1}.0", c, c // 2, side, side, bias=False)
            norm(f"down_projs.{i - 1}.1", c)
        for d, kind in enumerate(kinds):
            attention, mlp = f"{stage}.attns.{d}", f"{stage}.mlps.{d}"
            norm(f"{stage}.layer_norms.{2 * d}", c)
            norm(f"{stage}.layer_norms.{2 * d + 1}", c)
            if plus:
                put(f"{stage}.local_perception_units.{d}", c, 1, 3, 3)
                put(f"{mlp}.linear1.0", 4 * c, c, 1, 1)
                put(f"{mlp}.dwc", 4 * c, 1, 3, 3)
                put(f"{mlp}.linear2.0", c, 4 * c, 1, 1)
            else:
                put(f"{mlp}.chunk.linear1", 4 * c, c)
                put(f"{mlp}.chunk.linear2", c, 4 * c)
            if kind == "D":
                inner, kernel = c // groups[i], (9, 7, 5, 3)[i]
                shapes[f"{attention}.rpe_table"] = (heads[i], 2 * size - 1, 2 * size - 1)
                put(f"{attention}.conv_offset.0", inner, 1, kernel, kernel)
                norm(f"{attention}.conv_offset.1", inner)
                put(f"{attention}.conv_offset.3", 2, inner, 1, 1, bias=False)
                for projection in ("proj_q", "proj_k", "proj_v", "proj_out"):
                    put(f"{attention}.{projection}", c, c, 1, 1)
            elif kind == "N":
                shapes[f"{attention}.rpb"] = (heads[i], 13, 13)
                put(f"{attention}.qkv", 3 * c, c)
                put(f"{attention}.proj", c, c)
            else:
                shapes[f"{attention}.relative_position_bias_table"] = (13 * 13, heads[i])
                shapes[f"{attention}.relative_position_index"] = (49, 49)
                put(f"{attention}.proj_qkv", 3 * c, c)
                put(f"{attention}.proj_out", c, c)
            if kind == "S":
                shapes[f"{attention}.attn_mask"] = ((size // 7) ** 2, 49, 49)
    norm("cls_norm", c)
    put("cls_head", 1000, c)
    return shapes


@each_entry
def test_the_state_dict_is_the_official_one(name):
    model = without_weights(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == layout(name)
    *_, parameters, tensors = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    assert set(PUBLISHED) == set(MODELS["dcn_dat"])


def test_what_is_computed_and_stored():
    """The numbers of ways within a window, and which pixels of a rolled map do not meet."""
    layer = ShiftWindowAttention(4, 1, 3, (6, 6))
    index = layer.relative_position_index.reshape(3, 3, 3, 3)
    for y, x, v, u in ((0, 0, 0, 0), (0, 0, 2, 2), (2, 2, 0, 0), (1, 0, 0, 2)):
        assert index[y, x, v, u] == (y - v + 2) * 5 + x - u + 2
    mask = layer.attn_mask.reshape(2, 2, 3, 3, 3, 3)
    assert not mask[0, 0].any()  # whole before and after
    # Windows are rolled by 2 of 3: of the last one a row and a column are of the end, the rest of the beginning.
    end = torch.tensor([True, False, False])
    part = end[:, None] * 2 + end
    assert torch.equal(mask[1, 1], torch.where(part[:, :, None, None] != part, -100.0, 0.0))


# -- values ------------------------------------------------------------------------------------------------------------

WINDOWS = {
    "local": (LocalAttention, dat_formulas.windowed, {}),
    "shifted": (ShiftWindowAttention, dat_formulas.windowed, dict(shift=1)),
    "neighbours": (NeighborhoodAttention, dat_formulas.neighbours, {}),
}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize(
    ("size", "window"), [((6, 9), 3), ((7, 11), 3), ((2, 4), 3), ((1, 1), 3), ((15, 11), 5), ((21, 30), 7)], ids=str
)
def test_windows_are_those_of_the_formulas(kind, size, window):
    """Whole windows, some that do not fit, and maps smaller than one."""
    torch.manual_seed(0)
    make, formula, options = WINDOWS[kind]
    shifts = {"shift": (window + 1) // 2} if options else {}
    layer = make(8, 2, window, **(dict(size=(6, 9)) if options else {}))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer, x = layer.double(), torch.randn(2, 8, *size).double()
    found, right = (x.clone().requires_grad_() for _ in range(2))
    state = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters()}
    out, truth = layer(found), formula(state, right, 2, window, **shifts)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    along = torch.randn_like(truth)
    out.backward(along)
    truth.backward(along)
    for one, other in zip((found, *layer.parameters()), (right, *state.values()), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8)


@each_generation
@pytest.mark.parametrize("size", [(96, 96), (72, 104)], ids=str)
def test_models_compute_what_the_formulas_say(plus, size):
    model, x = small(plus, window_size=3), torch.randn(2, 3, *size, dtype=torch.float64)
    spec, heads, groups = (SMALL[plus][key] for key in ("spec", "heads", "groups"))
    with torch.no_grad():
        maps, logits = dat_formulas.model(model.state_dict(), x, spec, heads, groups, 3, plus)
        torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-9)
        final, found = model.forward_intermediates(x)
        for one, other in zip(found, maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(final, dat_formulas.norm(model.state_dict(), "cls_norm", maps[-1]))


def test_drops_are_in_training_alone():
    model = small(False, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3, window_size=3)
    x = images(96).double()
    torch.testing.assert_close(model(x), small(False, window_size=3)(x))
    assert not torch.equal(model.train()(x), model(x))
    rates = [getattr(path, "drop_prob", 0.0) for stage in model.stages for path in stage.drop_path]
    assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])


# -- weights -----------------------------------------------------------------------------------------------------------

NESTINGS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "max_accuracy": 82.0},
    "of several devices": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    "ema": lambda state: {"state_dict": {}, "state_dict_ema": state},
}


def loaded(path, plus, **options):
    overlay = dict(file=str(path), num_classes=5)
    return small_entry(plus, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def small_entry(plus, **options):
    given = dict(SMALL[plus], depths=(2, 2, 2, 2), dim=8, num_classes=5, img_size=96) | options
    return timm.create_model("dat_plus_tiny" if plus else "dat_tiny", **given).eval()


@each_generation
@pytest.mark.parametrize("nesting", NESTINGS)
def test_files_load_in_the_official_nestings(plus, nesting, tmp_path):
    source = small(plus, torch.float32)
    torch.save(NESTINGS[nesting](source.state_dict()), tmp_path / "weights.pth")
    assert torch.equal(loaded(tmp_path / "weights.pth", plus)(images(96)), source(images(96)))
    # Another head, and other channels, as timm has it.
    model = loaded(tmp_path / "weights.pth", plus, num_classes=3, in_chans=1)
    assert model(images(96, channels=1)).shape == (2, 3)
    assert torch.equal(
        model.stages[0].mlps[0].state_dict().popitem()[1], source.stages[0].mlps[0].state_dict().popitem()[1]
    )


@each_generation
def test_weights_that_do_not_fit_are_refused_by_name(plus, tmp_path):
    """timm itself drops its check as soon as the number of classes differs."""
    source = small(plus, torch.float32).state_dict()
    source["elsewhere"] = source.pop("stages.2.attns.1.proj_q.bias")
    torch.save({"model": source}, tmp_path / "weights.pth")
    for options in ({}, dict(num_classes=3), dict(features_only=True)):
        with pytest.raises(
            RuntimeError, match=r"pretrained: .*keys \['stages.2.attns.1.proj_q.bias'\].*\['elsewhere'\]"
        ):
            loaded(tmp_path / "weights.pth", plus, **options)


@each_generation
def test_tables_are_resized_for_other_sizes(plus, tmp_path):
    source = small(plus, torch.float32)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = loaded(tmp_path / "weights.safetensors", plus, img_size=(128, 192), window_size=9)
    resized = 0
    for key, value in model.state_dict().items():
        given = source.state_dict()[key]
        if key.endswith("relative_position_bias_table"):
            square = given.reshape(1, 13, 13, -1).permute(0, 3, 1, 2)
            given = F.interpolate(square, (17, 17), mode="bicubic").permute(0, 2, 3, 1).reshape(289, -1)
        elif key.endswith(("rpe_table", "rpb")):
            given = F.interpolate(given[None], value.shape[-2:], mode="bicubic")[0]
        elif key.endswith(("relative_position_index", "attn_mask")):
            assert torch.equal(value, small_entry(plus, img_size=(128, 192), window_size=9).state_dict()[key])
            continue
        resized += given.shape != source.state_dict()[key].shape
        torch.testing.assert_close(value, given, msg=key)
    assert resized == 8 and model(images(128)).isfinite().all()
    table = model.stages[3].attns[1].rpe_table
    assert table.shape == (4, 2 * 4 - 1, 2 * 6 - 1)


@each_generation
def test_every_way_to_load_fits_tables_to_other_sizes(plus, tmp_path):
    """timm's three, and ours, which tells; `load_state_dict` inside of another module."""
    source = small(plus, torch.float32).state_dict()
    torch.save({"model": source}, tmp_path / "weights.pth")
    given = dict(img_size=(128, 192), window_size=9)
    wanted = loaded(tmp_path / "weights.pth", plus, **given).state_dict()
    found = {
        "checkpoint_path": small_entry(plus, checkpoint_path=tmp_path / "weights.pth", **given),
        "load_checkpoint": small_entry(plus, **given),
        "load_state_dict": small_entry(plus, **given),
        "on meta": small_entry(plus, **given).to("meta"),
    }
    report = dcn_plugin.load_checkpoint(found["load_checkpoint"], tmp_path / "weights.pth")
    assert report.notes == ["8 tables of position biases resized for this model's sizes"]
    nn.ModuleDict({"inner": found["load_state_dict"]}).load_state_dict({f"inner.{k}": v for k, v in source.items()})
    found["on meta"].load_state_dict(source, assign=True)
    for way, model in found.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, wanted[key]), (way, key)
    assert all(source[key].equal(value) for key, value in small(plus, torch.float32).state_dict().items())
    # A head of attention more is no other size.
    heads = [*SMALL[plus]["heads"]]
    heads[2] *= 2
    with pytest.raises(RuntimeError, match="size mismatch for stages.2"):
        small_entry(plus, heads=heads, **given).load_state_dict(source)


@each_generation
def test_a_detectors_checkpoint_loads(plus):
    """It has norms of its own for each map, neither the last norm nor a head, and computes masks as it goes."""
    source, model = small(plus, torch.float32), small_entry(plus)
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    state = {key: value for key, value in state.items() if "cls_" not in key and "attn_mask" not in key}
    state |= {"backbone.norms.0.norm.weight": torch.ones(8), "neck.conv.weight": torch.ones(1)}
    report = dcn_plugin.load_checkpoint(
        model,
        {"state_dict": state},
        prefix="backbone.",
        allow_missing="cls_*",
        allow_unexpected="norms.*",
    )
    assert report.outside == ["neck.conv.weight"]
    assert set(report.loaded) == {key for key in model.state_dict() if "cls_" not in key}
    for found, expected in zip(*(m.forward_intermediates(images(96))[1] for m in (model, source)), strict=True):
        assert torch.equal(found, expected)


@each_entry
def test_weights_come_from_a_file_alone(name):
    cfg = timm.get_pretrained_cfg(name)
    assert not cfg.url and not cfg.hf_hub_id and cfg.tag == "in1k" and not timm.is_model_pretrained(name)
    assert (cfg.first_conv, cfg.classifier, cfg.crop_mode) == ("patch_proj.0", "cls_head", "squash")
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True, device="meta")


# -- timm's expectations, of both generations --------------------------------------------------------------------------


@each_generation
def test_feature_extraction(plus):
    model, x = small(plus), images(96).double()
    maps = small(plus, features_only=True, out_indices=(1, 2))
    assert maps.feature_info.channels() == [16, 32] and maps.feature_info.reduction() == [8, 16]
    assert not any(
        "stages.3" in name or "cls_" in name or "down_projs.2" in name for name, _ in maps.named_parameters()
    )
    maps.model.load_state_dict(model.state_dict(), strict=False)
    _, every = model.forward_intermediates(x)
    for found, expected in zip(maps(x), every[1:3], strict=True):
        assert torch.equal(found, expected)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last, model.forward_features(x))
    early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(early, first) and torch.equal(first, every[0])
    whole = small(plus, num_classes=0, global_pool="")
    assert whole(x).shape == (2, 64, 3, 3)
    assert model.prune_intermediate_layers([2], prune_norm=True) == [2] and model.num_features == 32
    assert torch.equal(model(x), every[2])  # timm prunes a head with its pooling


@each_generation
def test_other_pooling(plus):
    model, x = small(plus), images(96).double()
    features = model.forward_features(x)
    both = torch.cat((features.mean((2, 3)), features.amax((2, 3))), 1)
    model.reset_classifier(7, "catavgmax")
    torch.testing.assert_close(model(x), both @ model.cls_head.weight.T + model.cls_head.bias)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), both)
    assert small(plus, global_pool="catavgmax")(x).shape == (2, 5)
    model.reset_classifier(3)
    assert model.global_pool.pool_type == "catavgmax" and model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match="global_pool: expected some pooling in front of 3 classes, got ''"):
        model.reset_classifier(3)
    assert torch.equal(model(x), features)


@each_generation
@pytest.mark.parametrize("kind", ["hook", "fx"])
def test_feature_extractors_that_go_by_names(plus, kind):
    model, x = small(plus), images(96).double()
    found = small(plus, features_only=True, out_indices=(0, 2), feature_cls=kind)
    getattr(found, "graph_module", found).load_state_dict(model.state_dict(), strict=False)
    for a, b in zip(found(x), model.forward_intermediates(x, indices=[0, 2], intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b)


def block_of(name):
    """Stage and block that a parameter belongs to; what makes a map smaller belongs to the block behind it."""
    first, number, *rest = name.split(".")
    if first == "stages":
        return int(number), int(rest[1]) // (2 if rest[0] == "layer_norms" else 1)
    return {"patch_proj": (-1, 0), "down_projs": (int(number) + 1 if number.isdigit() else 0, 0)}.get(first, (9, first))


@each_generation
def test_layer_decay_follows_the_blocks(plus):
    model = small(plus)
    names = [name for name, _ in model.named_parameters()]
    place = group_parameters(model, model.group_matcher(), reverse=True)
    order = sorted({block_of(name) for name in names if "cls_" not in name})
    assert {name: place[name] for name in names if "cls_" not in name} == {
        name: order.index(block_of(name)) for name in names if "cls_" not in name
    }
    assert place["cls_norm.norm.weight"] == len(order) - 1 and place["cls_head.weight"] == len(order)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for name in names:
        if "cls_" not in name:
            assert coarse[name] == block_of(name)[0] + 1
    tables = ("rpe_table", "rpb", "relative_position_bias_table")
    assert model.no_weight_decay() == {name for name in names if name.endswith(tables)}


@each_generation
def test_a_grid_in_every_block_that_should_have_one(plus):
    grids = sampling_layers(small(plus))
    assert all(type(layer) is DAttention for layer in grids.values())
    spec = SMALL[plus]["spec"]
    assert list(grids) == [
        f"stages.{i}.attns.{d}" for i, kinds in enumerate(spec) for d, k in enumerate(kinds) if k == "D"
    ]
    assert {rate for rate in offset_parameters(small(plus)).values()} == {1.0}


def test_memory_that_is_given_later_is_initialised():
    for plus in (False, True):
        with torch.device("meta"):
            model = small_entry(plus)
        model.to_empty(device="cpu")
        model.init_weights()
        own = small_entry(plus)
        for key, value in model.state_dict().items():
            assert value.isfinite().all(), key
            if "index" in key or "mask" in key:
                assert torch.equal(value, own.state_dict()[key])
        assert model(images(96)).isfinite().all()


def test_registered_with_mmengine_and_torchvisions_detectors():
    pytest.importorskip("mmengine")
    pytest.importorskip("torchvision")
    from dcn_plugin import registry
    from dcn_plugin.detection.faster_rcnn import build_detector

    given = dict(SMALL[False], depths=(2, 2, 2, 2), dim=8, img_size=64, window_size=4)
    backbone = registry.MODELS.build(dict(type="dcn_plugin.TimmBackbone", model_name="dat_tiny", **given))
    assert [m.shape[1] for m in backbone(images(64))] == backbone.channels == [8, 16, 32, 64]
    spec = dict(name="faster_rcnn", num_classes=3, backbone=dict(name="dat_tiny", **given), fpn_channels=8)
    detector = build_detector(spec | dict(min_size=64, max_size=64)).eval()
    assert len(detector(list(images(64)))) == 2
