"""Attention over levels, against transformers' layer in plain PyTorch and by hand; mmcv's is in `integrations/`."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn

import dcn_plugin
from dcn_plugin import ops
from dcn_plugin.layers import (
    MMCVMultiScaleDeformableAttention,
    MSDeformAttn,
    offset_parameters,
    offset_rates,
    reset_offsets,
    sampling_layers,
)
from dcn_plugin.visualize import record, record_bins

SHAPES = [(6, 8), (3, 4), (2, 2)]
PIXELS = 48 + 12 + 4


def drawn(layer, seed=0):
    """The layer, with weights that have moved."""
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return layer


def call(numbers=2, levels=3, n=2, queries=5, channels=16, dtype=torch.float32):
    """Query, reference points, some of them near or beyond a border, and pixels."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(n, queries, channels, generator=generator)
    reference = torch.rand(n, queries, levels, numbers, generator=generator) * 1.2 - 0.1
    pixels = torch.randn(n, PIXELS, channels, generator=generator)
    return tuple(t.to(dtype) for t in (query, reference, pixels))


@pytest.fixture
def theirs():
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = modeling.DeformableDetrConfig(d_model=16, num_feature_levels=3, disable_custom_kernels=True)
    return modeling.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3)


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("numbers", [2, 4], ids=["points", "boxes"])
def test_values_and_gradients_are_those_of_transformers_layer(theirs, numbers, masked):
    layer = MSDeformAttn(16, 3, 4, 3)
    layer.load_state_dict(drawn(theirs).state_dict())
    mask = torch.rand(2, PIXELS) < 0.3 if masked else None
    found, expected = ([t.requires_grad_() for t in call(numbers)] for _ in range(2))
    query, at, pixels = expected
    truth, _ = theirs(
        query, attention_mask=None if mask is None else ~mask, encoder_hidden_states=pixels, reference_points=at,
        spatial_shapes=torch.tensor(SHAPES), spatial_shapes_list=SHAPES, level_start_index=torch.tensor([0, 48, 60]),
    )  # fmt: skip
    out = layer(*found, SHAPES, [0, 48, 60], mask)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    along = torch.randn_like(truth)
    truth.backward(along)
    out.backward(along)
    for one, other in zip((*found, *layer.parameters()), (*expected, *theirs.parameters()), strict=True):
        assert other.grad.any()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.abs().max().clamp(1)))


def test_levels_come_as_pairs_or_as_tensors():
    layer, (query, at, pixels) = drawn(MSDeformAttn(16, 3, 4, 2)), call()
    expected = layer(query, at, pixels, SHAPES)
    for shapes in (torch.tensor(SHAPES), [list(pair) for pair in SHAPES], torch.tensor(SHAPES, dtype=torch.int32)):
        for starts in (None, [0, 48, 60], torch.tensor([0, 48, 60])):
            assert torch.equal(layer(query, at, pixels, shapes, starts), expected)
    alike = at[:, :, :1]
    expanded = layer(query, alike.expand(-1, -1, 3, -1), pixels, SHAPES)
    assert torch.equal(layer(query, alike, pixels, SHAPES), expanded)


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["arrays", "tensors"])
def test_levels_come_in_arrays_too_as_in_the_operator(kind):
    layer, (query, at, pixels) = drawn(MSDeformAttn(16, 3, 4, 2)), call()
    expected = layer(query, at, pixels, SHAPES)
    for shapes in (kind(SHAPES), [kind(pair) for pair in SHAPES], tuple(map(list, SHAPES))):
        assert torch.equal(layer(query, at, pixels, shapes, kind([0, 48, 60])), expected)
        value, locations = pixels.unflatten(2, (4, 4)), at[:, :, None, :, None].expand(-1, -1, 4, -1, 1, -1)
        assert torch.equal(ops.ms_deform_attn(value, shapes, locations), ops.ms_deform_attn(value, SHAPES, locations))


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_is_added_to_queries_may_be_one_for_all(batch_first):
    layer, (query, at, pixels) = (
        drawn(MMCVMultiScaleDeformableAttention(16, 4, 3, batch_first=batch_first)).eval(),
        call(),
    )
    turned = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    for own in (query[:1], query[:, :1], query[:1, :1]):
        found, expected = (
            layer(
                turned(query), value=turned(pixels), identity=turned(each), query_pos=turned(each),
                reference_points=at, spatial_shapes=SHAPES,
            )
            for each in (own, own.expand_as(query))
        )  # fmt: skip
        assert torch.equal(found, expected) and found.shape == turned(query).shape


def test_points_may_differ_by_level():
    """As a layer with three points everywhere, of which some have no weight."""
    full, ragged = drawn(MSDeformAttn(16, 3, 4, 3)), MSDeformAttn(16, 3, 4, [1, 3, 2])
    kept = torch.tensor([[True, False, False], [True] * 3, [True, True, False]]).flatten().repeat(4)
    with torch.no_grad():
        full.attention_weights.bias[~kept] = -1e9
        for name, rows in (("attention_weights", kept), ("sampling_offsets", kept.repeat_interleave(2))):
            for kind in ("weight", "bias"):
                source = full.get_parameter(f"{name}.{kind}")
                ragged.get_parameter(f"{name}.{kind}").copy_(source[rows])
    rest = {k: v for k, v in full.state_dict().items() if "proj" in k}
    ragged.load_state_dict(rest, strict=False)
    query, at, pixels = call()
    torch.testing.assert_close(ragged(query, at, pixels, SHAPES), full(query, at, pixels, SHAPES))


def test_nothing_is_allowed():
    layer = MSDeformAttn(16, 3, 4, 2)
    for n, queries in ((0, 5), (2, 0)):
        query, at, pixels = (t.requires_grad_() for t in call(n=n, queries=queries))
        out = layer(query, at, pixels, SHAPES, input_padding_mask=torch.zeros(n, PIXELS, dtype=torch.bool))
        assert out.shape == (n, queries, 16)
        out.sum().backward()
        assert not pixels.grad.any() and query.grad.shape == query.shape


# -- positions in float32 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocast", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_positions_are_float32_whatever_the_values_are(how, dtype):
    """On a large map, where positions rounded to the layer's type lie whole pixels away."""
    torch.manual_seed(0)
    shapes, queries = [(96, 250)], 200
    layer = MSDeformAttn(32, 1, 4, 4)
    query, at, pixels = torch.randn(1, queries, 32), torch.rand(1, queries, 1, 2), torch.randn(1, 96 * 250, 32)
    # What both start from: numbers that the type holds.
    layer.load_state_dict({k: v.to(dtype).float() for k, v in layer.state_dict().items()})
    query, pixels = (t.to(dtype).float() for t in (query, pixels))
    with torch.no_grad():
        truth = layer(query, at, pixels, shapes)
        rounded = layer(query, at.to(dtype).float(), pixels, shapes)
        if how == "half":
            found = copy.deepcopy(layer).to(dtype)(query.to(dtype), at, pixels.to(dtype), shapes)
        else:
            with torch.autocast("cpu", dtype):
                found = layer(query, at, pixels, shapes)
    assert found.dtype == dtype
    scale = truth.std()
    error, of_rounding = ((t.float() - truth).abs().mean() / scale for t in (found, rounded))
    assert error < 0.01 and of_rounding > 3 * error, (error, of_rounding)


# -- how it starts -----------------------------------------------------------------------------------------------------


def starts(layer, heads, points):
    """As published: eight directions around the reference, point p at p + 1 pixels; equal weights."""
    bias = layer.sampling_offsets.bias.detach().view(heads, -1, points, 2)
    assert not layer.sampling_offsets.weight.any()
    assert not any(p.any() for p in layer.attention_weights.parameters())
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions[:: 8 // heads]):
        for p in range(points):
            wanted = (p + 1) * torch.tensor(direction).float()
            torch.testing.assert_close(bias[head, :, p], wanted.expand_as(bias[head, :, p]), rtol=0, atol=1e-5)


def test_it_starts_as_published():
    layer = MSDeformAttn()
    assert (layer.d_model, layer.n_levels, layer.n_heads, layer.n_points) == (256, 4, 8, 4)
    starts(layer, 8, 4)
    for projection in (layer.value_proj, layer.output_proj):
        bound = (6 / (256 + 256)) ** 0.5
        assert 0.99 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()
    for again in ("_reset_parameters", "reset_parameters"):  # the first is what Deformable DETR's models call
        drawn(layer)
        getattr(layer, again)()
        starts(layer, 8, 4)
    for parameter in layer.sampling_offsets.parameters():
        nn.init.normal_(parameter)
    weights = nn.init.normal_(layer.attention_weights.weight).clone()
    reset_offsets(nn.Sequential(layer))
    assert torch.equal(layer.attention_weights.weight, weights)
    nn.init.zeros_(layer.attention_weights.weight)
    starts(layer, 8, 4)


@pytest.mark.parametrize("make", [MSDeformAttn, MMCVMultiScaleDeformableAttention])
def test_it_starts_so_from_the_meta_device(make):
    layer = make(device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    starts(layer.float(), 8, 4)


def test_it_starts_so_whoever_initialises():
    pytest.importorskip("mmengine")
    from mmengine.model import initialize

    model = nn.Sequential(MSDeformAttn(), MMCVMultiScaleDeformableAttention(), nn.Linear(4, 4))
    before = model[2].weight.clone()
    initialize(model, [dict(type="Normal", layer=["Linear"], std=0.5)])
    assert not torch.equal(model[2].weight, before)
    for layer in model[:2]:
        starts(layer, 8, 4)
        layer.sampling_offsets._is_hf_initialized  # what transformers asks before it draws, and says afterwards  # noqa: B018
        nn.init.normal_(layer.sampling_offsets.weight)
        nn.init.normal_(layer.sampling_offsets.bias)
        layer.sampling_offsets._is_hf_initialized = True
        starts(layer, 8, 4)


def test_it_starts_so_where_transformers_gave_it_memory():
    layer = MSDeformAttn(device="meta").to_empty(device="cpu")
    for module in (layer.sampling_offsets, layer.attention_weights):
        nn.init.constant_(module.weight, 7.0)
        nn.init.constant_(module.bias, 7.0)
        module._is_hf_initialized  # noqa: B018
        module._is_hf_initialized = True
    starts(layer, 8, 4)


def told(layer):
    """What a call of the layer warns of."""
    query, centres, pixels = call(dtype=layer.output_proj.weight.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(layer, MSDeformAttn):
            layer(query, centres, pixels, SHAPES)
        else:
            layer(query, value=pixels, reference_points=centres, spatial_shapes=SHAPES)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda: MSDeformAttn(16, 3, 4, 2),
        lambda: MSDeformAttn(16, 3, 6 + 2, (1, 2, 3)),
        lambda: MMCVMultiScaleDeformableAttention(16, 4, 3, 2, batch_first=True),
    ],
    ids=["one", "uneven", "mmcv"],
)
def test_a_drawn_start_is_warned_of(make, dtype):
    """Deformable DETR's own transformer draws whatever has more than one dimension, others put biases at zero, too."""
    for zero_biases in (False, True):
        layer = make().to(dtype)
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif zero_biases:
                nn.init.zeros_(parameter)
        copied = copy.deepcopy(layer)
        offsets, weights = told(layer)
        assert offsets.startswith(
            f"{type(layer).__name__}: the weight of sampling_offsets is expected to start at zero"
        )
        assert "call sampling_offsets.reset_parameters() after" in offsets
        assert "dcn_plugin.layers.reset_offsets(model)" in offsets and "replaces" not in offsets
        assert ": the weight of attention_weights is" in weights and "reset_offsets" not in weights
        assert not told(layer), "once for each layer"
        reset_offsets(nn.Sequential(copied))
        assert [message.split(" is ")[0] for message in told(copied)] == [weights.split(" is ")[0]]
    assert not told(make().to(dtype)), "a fresh one starts where it should"


def test_a_trained_start_is_not_warned_of():
    layer = MSDeformAttn(16, 3, 4, 2)
    layer(*call(), SHAPES).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 1e-3).step()
    fresh = MSDeformAttn(16, 3, 4, 2)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.sampling_offsets.weight.any() and not told(fresh)


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_weights_load_key_for_key(theirs, tmp_path):
    """From transformers' layer, from a file as Deformable DETR's authors publish them, from mmdetection's names."""
    state = drawn(theirs).state_dict()

    class Stack(nn.Module):
        def __init__(self, layer, *names):
            super().__init__()
            inside = nn.ModuleDict({names[-1]: layer})
            for name in reversed(names[:-1]):
                inside = nn.ModuleDict({name: inside})
            self.inside = inside

    for make in (MSDeformAttn, MMCVMultiScaleDeformableAttention):
        arguments = (16, 3, 4, 3) if make is MSDeformAttn else (16, 4, 3, 3)
        for prefix in ("transformer.encoder.layers.0.self_attn", "encoder.layers.0.self_attn"):
            file = tmp_path / "weights.pth"
            torch.save({"model": {f"{prefix}.{k}": v for k, v in state.items()}}, file)
            layer = make(*arguments)
            model = Stack(layer, *prefix.split("."))
            report = dcn_plugin.load_checkpoint(model.inside, file)
            assert len(report.loaded) == 8 and not report.problems
            assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
        theirs.load_state_dict(layer.state_dict())


def test_it_says_why_a_tensor_does_not_fit():
    state, why = MSDeformAttn(16, 3, 4, 2).state_dict(), r"predicts 48 numbers.* 4 heads with \[2, 2\] points .* so 32"
    for load in (nn.Module.load_state_dict, dcn_plugin.load_checkpoint):
        with pytest.raises(RuntimeError, match=why):
            load(MSDeformAttn(16, 2, 4, 2), dict(state))


def test_copies_and_pickles():
    layer, inputs = drawn(MSDeformAttn(16, 3, 4, [1, 3, 2])), call()
    expected = layer(*inputs, SHAPES)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*inputs, SHAPES), expected) and repr(twin) == repr(layer)
        twin.reset_parameters()
        assert not torch.equal(twin(*inputs, SHAPES), expected)
    assert "d_model=16, n_levels=3, n_heads=4, n_points=(1, 3, 2)" in repr(layer)


# -- graphs and transforms ---------------------------------------------------------------------------------------------


def test_graphs():
    layer, inputs = drawn(MSDeformAttn(16, 3, 4, 2)), call()
    expected = layer(*inputs, SHAPES)
    torch._dynamo.reset()
    one_graph = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(one_graph(*inputs, SHAPES), expected)
    in_pieces = torch.compile(layer, backend="eager")
    torch.testing.assert_close(in_pieces(*inputs, torch.tensor(SHAPES), torch.tensor([0, 48, 60])), expected)
    batch, queries = torch.export.Dim("n", min=1), torch.export.Dim("q", min=1)
    sizes = ({0: batch, 1: queries}, {0: batch, 1: queries}, {0: batch}, [(None, None)] * 3)
    program = torch.export.export(layer, (*inputs, SHAPES), dynamic_shapes=sizes)
    others = call(n=3, queries=7)
    torch.testing.assert_close(program.module()(*others, SHAPES), layer(*others, SHAPES))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = layer
            self.other = drawn(MMCVMultiScaleDeformableAttention(16, 4, 3, 2, dropout=0.0))

        def forward(self, query, at, pixels, mask):
            found = self.attention(query, at, pixels, SHAPES, None, mask)
            return self.other(
                found.transpose(0, 1), value=pixels.transpose(0, 1), reference_points=at, spatial_shapes=SHAPES,
                key_padding_mask=mask,
            )  # fmt: skip

    model, mask = Model(), torch.rand(2, PIXELS) < 0.3
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*inputs, mask), model(*inputs, mask))


def test_vmap_is_a_call_for_each():
    layer = drawn(MSDeformAttn(16, 3, 4, 2))
    calls = [call(numbers) for numbers in (4, 4)]
    stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    stacked[0][1] += 0.1
    mask = torch.rand(2, 2, PIXELS) < 0.3
    found = torch.func.vmap(lambda q, at, x, m: layer(q, at, x, SHAPES, None, m))(*stacked, mask)
    for i in range(2):
        expected = layer(*(t[i] for t in stacked), SHAPES, None, mask[i])
        torch.testing.assert_close(found[i], expected)


# -- what others ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [2, 4], ids=["points", "boxes"])
def test_hooks_see_what_was_sampled(numbers):
    """Pixels of each level and weights, which give the layer's result again."""
    layer, (query, at, pixels) = drawn(MSDeformAttn(16, 3, 4, [1, 3, 2])), call(numbers)
    seen = []
    with layer.register_sampling_hook(lambda _, samples: seen.append(samples)):
        out = layer(query, at, pixels, SHAPES)
    (samples,) = seen
    assert list(samples.input) == ["0", "1", "2"]
    assert torch.equal(samples.input["1"], pixels[:, 48:60].transpose(1, 2).reshape(2, 16, 3, 4))
    moves = samples.offset.reshape(2, 4, 6, 2, 5).permute(0, 4, 1, 2, 3).flip(4)  # [N, Q, M, K, (x, y)]
    size = torch.tensor(SHAPES).flip(1).repeat_interleave(torch.tensor([1, 3, 2]), 0)
    level = torch.tensor([0, 1, 1, 1, 2, 2])
    locations = at[:, :, None, level, :2] + moves / size
    weights = samples.mask.reshape(2, 4, 6, 5).permute(0, 3, 1, 2)
    value = layer.value_proj(pixels).unflatten(2, (4, 4))
    again = layer.output_proj(ops.ms_deform_attn(value, SHAPES, locations, weights, points=[1, 3, 2]))
    torch.testing.assert_close(again, out)
    offset, mask = layer.offsets(query, at, pixels, SHAPES)
    assert torch.equal(offset, samples.offset) and torch.equal(mask, samples.mask)


def test_mmcvs_layer_tells_the_same():
    arguments = dict(query_pos=torch.randn(5, 2, 16), reference_points=call()[1], spatial_shapes=torch.tensor(SHAPES))
    layer = drawn(MMCVMultiScaleDeformableAttention(16, 4, 3, 2))
    query, _, pixels = (t.transpose(0, 1) for t in call())
    seen = []
    layer.register_sampling_hook(lambda _, samples: seen.append(samples))
    layer(query, value=pixels, **arguments)
    twin = MSDeformAttn(16, 3, 4, 2)
    twin.load_state_dict(layer.state_dict())
    for offset, mask in (seen[0][1:3], layer.offsets(query, value=pixels, **arguments)):
        wanted = twin.offsets((query + arguments["query_pos"]).transpose(0, 1), *call()[1:], SHAPES)
        assert torch.equal(offset, wanted[0]) and torch.equal(mask, wanted[1])


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|isinstance.treespec)")
def test_the_monitor_watches_it_and_it_has_its_rate(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    pytest.importorskip("torchmetrics")
    import tiny

    from dcn_plugin.finetune import OffsetMonitor
    from dcn_plugin.finetune.module import param_groups

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict(dict(attention=MSDeformAttn(16, 3, 4, 2), reference_points=nn.Linear(16, 2)))

        def training_step(self, batch, index):
            query, _, pixels = call()
            at = self.model.reference_points(query).sigmoid()[:, :, None].expand(-1, -1, 3, -1)
            return self.model.attention(query, at, pixels, SHAPES).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = tiny.trainer(tmp_path, callbacks=[OffsetMonitor(every_n_steps=1)], limit_train_batches=1)
    trainer.fit(module, torch.utils.data.DataLoader([0]))
    seen = {key: float(value) for key, value in trainer.callback_metrics.items()}
    # Points 1 and 2 pixels to the right, below, to the left and above.
    assert seen["offset/attention/mean"] == pytest.approx(1.5) and seen["offset/attention/max"] == pytest.approx(2.0)
    assert seen["offset/attention/mask_mean"] == pytest.approx(1 / 6)
    assert "offset/attention/dilation" not in seen
    scales = {
        name: group["lr_scale"]
        for group in param_groups(module.model, offset_lr_mult=0.5)
        for name, parameter in module.model.named_parameters()
        if any(parameter is own for own in group["params"])
    }
    slow = {name for name, scale in scales.items() if scale == pytest.approx(0.05)}
    assert slow == {f"{n}.{k}" for n in ("attention.sampling_offsets", "reference_points") for k in ("weight", "bias")}
    assert {scale for name, scale in scales.items() if name not in slow} == {1.0}


def test_rates_of_models_of_others(theirs):
    """What declares nothing is known by the names of the field: offsets and reference points at a tenth."""
    model = nn.ModuleDict(dict(attention=theirs, reference_points=nn.Linear(16, 2), ours=MSDeformAttn(16, 3, 4, 3)))
    found = offset_parameters(model)
    names = ("attention.sampling_offsets", "reference_points", "ours.sampling_offsets")
    assert found == {f"{name}.{kind}": 0.1 for name in names for kind in ("weight", "bias")}
    assert {rate.option for rate in offset_rates(model).values()} == {"offset_lr_mult"}
    assert list(sampling_layers(model)) == ["ours"]


def test_mmengines_constructor_gives_it_its_rate():
    pytest.importorskip("mmengine")
    from mmengine.optim import build_optim_wrapper

    model = nn.ModuleDict(dict(attention=MMCVMultiScaleDeformableAttention(16, 4, 3, 3), rest=nn.Linear(2, 2)))
    config = dict(
        constructor="dcn_plugin.OptimWrapperConstructor", optimizer=dict(type="SGD", lr=2.0),
        paramwise_cfg=dict(dcn_offset_lr_mult=1.0),
    )  # fmt: skip
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.2 if "sampling_offsets" in name else 2.0), name


def test_pictures_of_convolutions_and_regions_say_that_it_is_none():
    model, image = nn.ModuleDict(dict(attention=MSDeformAttn(16, 3, 4, 2))), torch.zeros(1, 3, 8, 8)
    for draw in (record, record_bins):
        with pytest.raises(ValueError, match="model: expected .* inside, got ModuleDict without any"):
            draw(model, image)
    model["conv"] = dcn_plugin.DCNv2(3, 3, 3)
    with pytest.raises(ValueError, match="layers: expected deformable layers out of conv, got 'attention'"):
        record(model, image, layers=["attention"])
