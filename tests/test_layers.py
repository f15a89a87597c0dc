"""DeformConv2d, DCNv1 and DCNv2 against torch's own convolution, torchvision's operator and direct arithmetic."""

import copy
import io
import logging
import math
import pickle
from collections import UserList

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dcn_plugin.layers import LAYERS, DCNv1, DCNv2, DeformConv2d, OffsetConv, accept_sibling_offset_keys, drop_ins

OFFSET_LAYERS = [DCNv1, DCNv2]
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, groups=2),
    dict(kernel_size=1),
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 3), bias=False),
    dict(kernel_size=3, padding=2, dilation=2, groups=8),
    dict(kernel_size=(2, 3), dilation=(3, 1), padding=(2, 0)),
    dict(kernel_size=3, padding="same", dilation=(1, 2)),
    dict(kernel_size=(4, 3), padding="same"),
    dict(kernel_size=(2, 4), padding="same", dilation=(3, 2), groups=4),
    dict(kernel_size=3, padding="valid"),
]


def shaken(layer, scale=0.5):
    """Give conv_offset weights that move the samples."""
    with torch.no_grad():
        for parameter in layer.conv_offset.parameters():
            parameter.normal_(std=scale)
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_fresh_layer_computes_the_convolution(cls, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **geometry).double()
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    layer = cls.from_conv(conv, offset_groups=4)
    torch.testing.assert_close(layer(x), conv(x))
    built = cls(8, 16, **geometry, dtype=torch.float64, offset_groups=4)
    built.load_state_dict(layer.state_dict())
    torch.testing.assert_close(built(x), conv(x))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_four_sided_padding_is_that_of_a_padded_input(cls):
    torch.manual_seed(0)
    top, left, bottom, right = padding = (0, 1, 2, 3)
    layer = shaken(cls(4, 6, 3, stride=(1, 2), padding=padding, dtype=torch.float64))
    plain = cls(4, 6, 3, stride=(1, 2), dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    padded = F.pad(x, (left, right, top, bottom))
    torch.testing.assert_close(layer(x), plain(padded))
    offset, _ = layer.offsets(x)
    raw = F.conv2d(padded, layer.conv_offset.weight, layer.conv_offset.bias, stride=(1, 2))
    torch.testing.assert_close(offset, raw[:, :18])


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (2, 4), (4, 2)])
def test_layer_is_torchvisions_operator_fed_by_conv_offset(cls, groups, offset_groups):
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    layer = shaken(cls(8, 12, (3, 2), (2, 1), (1, 2), (1, 2), groups, offset_groups=offset_groups)).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    raw = F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, (2, 1), (1, 2), (1, 2))
    offset = raw[:, : 2 * 6 * offset_groups]
    mask = 2 / (1 + torch.exp(-raw[:, 2 * 6 * offset_groups :])) if cls is DCNv2 else None
    expected = ops.deform_conv2d(x, offset, layer.weight, layer.bias, (2, 1), (1, 2), (1, 2), mask)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_deform_conv2d_is_torchvisions_module(masked):
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    theirs = ops.DeformConv2d(4, 6, 3, 2, 1, bias=True).double()
    ours = DeformConv2d(4, 6, 3, 2, 1, bias=True, dtype=torch.float64, offset_groups=2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    offset = torch.randn(2, 36, 4, 3, dtype=torch.float64)
    mask = torch.rand(2, 18, 4, 3, dtype=torch.float64) if masked else None
    torch.testing.assert_close(ours(x, offset, mask), theirs(x, offset, mask))


def test_mask_activations():
    x = torch.randn(1, 4, 5, 5)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    half = DCNv2.from_conv(conv, mask_activation="sigmoid")
    torch.testing.assert_close(half(x), conv(x) / 2)
    full = DCNv2.from_conv(conv)
    full.conv_offset.bias.data[18:] = half.conv_offset.bias.data[18:] = 1.5
    expected = 1 / (1 + math.exp(-1.5))
    torch.testing.assert_close(half.offsets(x)[1], torch.full((1, 9, 5, 5), expected))
    torch.testing.assert_close(full.offsets(x)[1], torch.full((1, 9, 5, 5), 2 * expected))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_offset_bound(cls):
    layer = cls(2, 2, 3, offset_bound=1.5, dtype=torch.float64)
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    raw = torch.tensor([-1e6, -3.0, 0.0, 1e-3, 2.0, 1e6], dtype=torch.float64)
    layer.conv_offset.bias.data[:6] = raw
    offset = layer.offsets(x)[0]
    torch.testing.assert_close(
        offset[0, :6, 0, 0], torch.tensor([1.5 * math.tanh(r / 1.5) for r in raw.tolist()]).double()
    )
    assert offset.abs().max() <= 1.5
    # Slope 1 at zero: the bound does not change how a fresh layer starts to learn.
    layer.conv_offset.bias.data.zero_()
    layer.offsets(x)[0].sum().backward()
    torch.testing.assert_close(layer.conv_offset.bias.grad[:18], torch.ones(18, dtype=torch.float64))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_every_parameter_gets_a_gradient(cls):
    torch.manual_seed(0)
    layer = cls(4, 6, 3, padding=1, offset_groups=2)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    layer(x).square().sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_gradcheck(cls):
    torch.manual_seed(0)
    layer = shaken(cls(2, 2, 2, offset_bound=0.9, dtype=torch.float64), scale=0.3)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(cls, dtype):
    torch.manual_seed(0)
    layer = shaken(cls(4, 4, 3, padding=1), 0.05)
    x = torch.randn(1, 4, 6, 6)
    expected = layer(x)
    out = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.08, rtol=0.05)


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_cpu_autocast(cls):
    torch.manual_seed(0)
    layer = shaken(cls(4, 4, 3, padding=1), 0.05)
    x = torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), layer(x), atol=0.08, rtol=0.05)


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_initialisation_is_conv2ds(cls):
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 4, 3, groups=2)
    torch.manual_seed(3)
    layer = cls(6, 4, 3, groups=2)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)
    assert not any(p.any() for p in layer.conv_offset.parameters())


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_reset_after_meta_device_leaves_offsets_zero(cls):
    # What FSDP and torch's own recipe do: build without storage, allocate, call every module's reset_parameters.
    layer = cls(4, 4, 3, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    assert not any(p.any() for p in layer.conv_offset.parameters())
    assert layer.weight.any()


# from_conv


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_from_conv_shares_parameters_and_keeps_state(cls):
    conv = nn.Conv2d(4, 8, 3, 2, 1).double().eval()
    conv.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = cls.from_conv(conv, offset_groups=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert not layer.weight.requires_grad
    assert not layer.training and not layer.conv_offset.training
    assert layer.conv_offset.weight.dtype == torch.float64
    assert all(p.requires_grad and not p.any() for p in layer.conv_offset.parameters())
    assert layer.conv_offset.weight.shape == (cls.outputs_per_tap * 18, 4, 3, 3)
    assert isinstance(layer.conv_offset, nn.Conv2d)


def test_from_conv_keeps_memory_format_and_meta_device():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    assert DCNv2.from_conv(conv).conv_offset.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_meta for p in DCNv2.from_conv(nn.Conv2d(4, 8, 3, device="meta")).parameters())


def test_from_conv_accepts_a_subclass_that_computes_the_same():
    class Named(nn.Conv2d):
        """A plain Conv2d by another name."""

    assert DCNv1.from_conv(Named(2, 2, 3)).in_channels == 2


def test_deform_conv2d_from_conv():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(DeformConv2d.from_conv(conv)(x, torch.zeros(1, 18, 5, 5)), conv(x))


def test_from_conv_refuses_timm_convolutions_with_their_own_forward():
    layers = pytest.importorskip("timm.layers")
    for name in ("Conv2dSame", "StdConv2d", "ScaledStdConv2d"):
        with pytest.raises(TypeError, match=f"{name}.*forward of its own"):
            DCNv2.from_conv(getattr(layers, name)(4, 4, 3))


# Bad arguments (their messages: errors/table_layers.py)


def test_input_smaller_than_the_kernel_is_refused():
    for layer in (DCNv1(4, 6, 5), DCNv2(4, 6, 3, dilation=3)):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            layer(torch.zeros(1, 4, 4, 4))


def test_empty_batch():
    layer = DCNv2(4, 6, 3, padding=1)
    out = layer(torch.zeros(0, 4, 5, 5))
    assert out.shape == (0, 6, 5, 5)
    out.sum().backward()


def test_v1_offset_given_with_a_v2_mask_is_refused():
    layer = DeformConv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="mask"):
        layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.zeros(1, 18, 5, 5))
    with pytest.raises(ValueError, match="offset"):
        layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 27, 5, 5))


# repr, copies, state dicts


def test_extra_repr_shows_what_differs_from_the_default():
    text = repr(DCNv2(4, 8, 3, 2, 1, 2, 2, bias=False, offset_groups=4, offset_bound=2.5, mask_activation="sigmoid"))
    assert text.startswith("DCNv2(")
    for part in (
        "4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), groups=2, bias=False",
        "offset_groups=4, offset_bound=2.5, mask_activation='sigmoid'",
        "(conv_offset): OffsetPredictor(4, 108, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2))",
    ):
        assert part in text
    assert repr(DeformConv2d(4, 8, 1)) == "DeformConv2d(4, 8, kernel_size=(1, 1), stride=(1, 1))"
    assert "padding='same'" in repr(DCNv1(4, 8, 3, padding="same"))
    assert "padding='same'" in repr(DCNv1(4, 8, 2, padding="same"))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(cls, copier):
    layer = shaken(cls(4, 4, (2, 3), padding="same", offset_groups=2, offset_bound=3.0))
    x = torch.randn(1, 4, 5, 5)
    twin = copier(layer)
    assert repr(twin) == repr(layer) and twin.weight is not layer.weight
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_state_dict_round_trip(cls):
    layer = shaken(cls(4, 4, 3, padding=1))
    assert list(layer.state_dict()) == ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    assert layer.state_dict()._metadata[""]["version"] == 2
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = cls(4, 4, 3, padding=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def block(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ModuleDict({"conv2": DCNv2(4, 4, 3, **options)}))


def test_plain_load_takes_conv_offset_mask_keys(caplog):
    source, target = block(mask_activation="sigmoid"), block(mask_activation="sigmoid")
    shaken(source[1]["conv2"])
    old = {name.replace("conv_offset.", "conv_offset_mask."): value for name, value in source.state_dict().items()}
    target.load_state_dict(old)
    assert torch.equal(target[1]["conv2"].conv_offset.weight, source[1]["conv2"].conv_offset.weight)
    assert "1.conv2.conv_offset_mask.weight -> 1.conv2.conv_offset.weight" in caplog.text
    assert "trained with mask_activation" not in caplog.text


def test_plain_load_takes_sibling_keys_once_the_model_accepts_them(caplog):
    source, target = block(), block()
    shaken(source[1]["conv2"])
    old = {name.replace("conv2.conv_offset.", "conv2_offset."): value for name, value in source.state_dict().items()}
    with pytest.raises(RuntimeError, match="1.conv2_offset.weight"):
        target.load_state_dict(old)
    accept_sibling_offset_keys(target)
    for model in (target, copy.deepcopy(target), pickle.loads(pickle.dumps(target)), nn.Sequential(target)):
        prefix = "0." if model[0] is target else ""
        model.load_state_dict({prefix + name: value for name, value in old.items()})
        inner = model[0] if prefix else model
        assert torch.equal(inner[1]["conv2"].conv_offset.weight, source[1]["conv2"].conv_offset.weight)
    assert "1.conv2_offset.bias -> 1.conv2.conv_offset.bias" in caplog.text
    # The layouts that need renaming come from projects that used the plain sigmoid.
    assert "build it with mask_activation='sigmoid'" in caplog.text


def test_old_keys_beside_new_ones_are_not_swallowed():
    layer = DCNv2(4, 4, 3)
    state = layer.state_dict()
    state["conv_offset_mask.weight"] = state["conv_offset.weight"]
    with pytest.raises(RuntimeError, match="Unexpected.*conv_offset_mask.weight"):
        layer.load_state_dict(state)


def test_native_keys_load_without_a_word(caplog):
    with caplog.at_level(logging.DEBUG):
        block().load_state_dict(block().state_dict())
    assert not caplog.records


def test_plain_convolution_weights_lack_conv_offset():
    with pytest.raises(RuntimeError, match='Missing.*"conv_offset.weight", "conv_offset.bias"'):
        DCNv2(4, 4, 3).load_state_dict(nn.Conv2d(4, 4, 3).state_dict())
    result = DCNv2(4, 4, 3).load_state_dict(nn.Conv2d(4, 4, 3).state_dict(), strict=False)
    assert result.missing_keys == ["conv_offset.weight", "conv_offset.bias"]


@pytest.mark.parametrize("cls, other", [(DCNv1, DCNv2), (DCNv2, DCNv1)])
def test_weights_of_the_other_version_are_refused_with_a_reason(cls, other):
    given, wanted = other.outputs_per_tap * 9, cls.outputs_per_tap * 9
    words = rf"conv_offset.weight has shape \[{given}, 4, 3, 3\], but {cls.__name__} expects \[{wanted}, 4, 3, 3\]"
    with pytest.raises(RuntimeError, match=f"{words}.*would fit {other.__name__} with offset_groups=1"):
        cls(4, 4, 3).load_state_dict(other(4, 4, 3).state_dict())


def test_wrong_number_of_offset_groups_is_explained():
    with pytest.raises(RuntimeError, match="would fit DCNv2 with offset_groups=4"):
        DCNv2(4, 4, 3).load_state_dict(DCNv2(4, 4, 3, offset_groups=4).state_dict())


def test_layers_table():
    convolutions = {"DeformConv2d": DeformConv2d, "DCNv1": DCNv1, "DCNv2": DCNv2}
    assert convolutions.items() <= LAYERS.items()
    assert [name for name in convolutions if name in drop_ins()] == ["DCNv1", "DCNv2"]
    assert all(issubclass(cls, OffsetConv) for cls in OFFSET_LAYERS)


def test_compiles_without_graph_break():
    layer = shaken(DCNv2(4, 4, 3, padding=1))
    x = torch.randn(1, 4, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_exports_with_dynamic_sizes(cls):
    layer = shaken(cls(4, 4, 2, padding="same", offset_bound=2.0)).eval()
    dim = torch.export.Dim
    sizes = {"input": {0: dim("n"), 2: dim("h", min=4, max=64), 3: dim("w", min=4, max=64)}}
    exported = torch.export.export(layer, (torch.randn(2, 4, 6, 6),), dynamic_shapes=sizes)
    assert any("dcn_plugin.deform_conv2d" in str(node.target) for node in exported.graph.nodes)
    x = torch.randn(3, 4, 9, 7)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_a_parametrised_weight_is_computed_once_a_call():
    class Count(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    layer = DCNv2(4, 4, 3, padding=1)
    x = torch.rand(1, 4, 6, 6)
    expected = 2 * (layer(x) - layer.bias[:, None, None]) + layer.bias[:, None, None]
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Count())
    count = layer.parametrizations.weight[0]
    count.calls = 0
    torch.testing.assert_close(layer(x), expected)
    assert count.calls == 1


@pytest.mark.parametrize("cls", OFFSET_LAYERS)
def test_symbolic_trace(cls):
    layer = shaken(cls(4, 4, (2, 3), padding=(0, 1, 1, 1), offset_groups=2))
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for shape in [(1, 4, 6, 6), (2, 4, 9, 7)]:
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), layer(x))
    with pytest.raises(ValueError, match="input: expected"):
        traced(torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize("make", [UserList, np.array, torch.tensor], ids=["sequence", "array", "tensor"])
def test_sizes_come_as_any_sequence(make):
    """As nn.Conv2d takes them: configs of other systems hold lists that are not Python's."""
    given = dict(kernel_size=make([3, 2]), stride=make([2, 1]), dilation=make([1, 2]))
    layer = shaken(DCNv2(4, 4, padding=make([1, 0, 2, 1]), **given))
    plain = DCNv2(4, 4, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2))
    assert layer.padding4 == plain.padding4
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 9, 8)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_is_refused_before_anything_is_compiled():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), DCNv2(4, 4, 3))
    with pytest.raises(NotImplementedError, match="got DCNv2: use torch.export, torch.compile or torch.jit.trace"):
        torch.jit.script(model)
    assert type(model[1]) is DCNv2 and model(torch.zeros(1, 4, 5, 5)).shape == (1, 4, 3, 3)


def test_batch_norm_folds_into_the_layer():
    layer, norm = shaken(DCNv2(4, 4, 3, bias=False)).eval(), nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(nn.utils.fusion.fuse_conv_bn_eval(layer, norm)(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
