"""Tensors that are not dense are refused by the name of the argument: by operators, their definitions and layers."""

import inspect

import pytest
import torch
from cases import BY_NAME, CASES
from transforms.parts import AtLevels, MMCVAtLevels

from dcn_plugin import layers, ops, reference
from dcn_plugin.detection import MultiScaleDeformRoIPool

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")

IMAGE = torch.rand(2, 4, 6, 6)
ROIS = torch.tensor([[0.0, 1, 1, 4, 4], [1, 0, 0, 5, 5]])
SHIFT, FACTOR = torch.zeros(2, 2, 2, 2), torch.ones(2, 1, 2, 2)
KINDS = {
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "a nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor(list(torch.atleast_2d(t)), layout=torch.jagged), "a nested tensor"),
    "coo": (torch.Tensor.to_sparse, "layout torch.sparse_coo"),
    "hybrid": (lambda t: t.to_sparse(1), "layout torch.sparse_coo"),
    "csr": (lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(), "layout torch.sparse_csr"),
    "csc": (lambda t: t.reshape(t.shape[0], -1).to_sparse_csc(), "layout torch.sparse_csc"),
    "bsr": (lambda t: t.reshape(t.shape[0], -1)[:1].to_sparse_bsr((1, 1)), "layout torch.sparse_bsr"),
    "onednn": (torch.Tensor.to_mkldnn, "layout torch._mkldnn"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)

OFFSET, MASK = torch.zeros(2, 18, 6, 6), torch.ones(2, 9, 6, 6)
CALLS = {case.name: case.make(case.full, torch.float32) for case in CASES}
each_call = pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, call in CALLS.items() for a, v in call.items() if isinstance(v, torch.Tensor)]
)


def refused(kind, argument):
    make, got = KINDS[kind]
    return make, rf"{argument}: expected a dense tensor \(torch.strided\), got a .*{got.removeprefix('a ')}"


@each_call
@each_kind
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_operators_and_their_definitions(module, name, argument, kind):
    make, message = refused(kind, argument)
    call = CALLS[name]
    if kind == "onednn" and call[argument].dim() > 5:
        return  # there is none
    with pytest.raises(TypeError, match=message):
        getattr(module, name)(**call | {argument: make(call[argument])})
    parameters = list(inspect.signature(getattr(module, name)).parameters)
    if argument == parameters[0]:  # by position, too
        with pytest.raises(TypeError, match=message):
            getattr(module, name)(make(call[argument]), **{k: v for k, v in call.items() if k != argument})


@each_kind
@pytest.mark.parametrize("name", [case.name for case in CASES if case.of_regions])
def test_boxes_for_each_image(name, kind):
    make, message = refused(kind, r"rois\[1\]")
    boxes = torch.tensor([[1.0, 1, 4, 4], [0, 0, 5, 5]])
    with pytest.raises(TypeError, match=message):
        getattr(ops, name)(**CALLS[name] | dict(rois=[boxes, make(boxes)]))


@each_kind
@pytest.mark.parametrize("function", [reference.bilinear_sample, reference.axis_weights], ids=lambda f: f.__name__)
def test_the_sampler(function, kind):
    positions = torch.rand(2, 3)
    good = dict(value=IMAGE, y=positions, x=positions)
    if function is reference.axis_weights:
        good = dict(position=positions, read=torch.ones(2, 3, dtype=torch.bool))
    more = {} if "value" in good else dict(extent=4)
    function(**good, **more)
    for argument, value in good.items():
        if kind == "onednn" and value.dtype == torch.bool:
            continue  # there is none
        make, message = refused(kind, argument)
        with pytest.raises(TypeError, match=message):
            function(**good | {argument: make(value)}, **more)


BOXES = [ROIS[:, 1:]] * 2
SHIFTED = torch.zeros(2, 2, 6, 6)
QUERY, POINTS, PIXELS = torch.zeros(2, 5, 8), torch.zeros(2, 5, 2, 2), torch.zeros(2, 30, 8)
LAYERS = {
    "DeformConv2d": (lambda: layers.DeformConv2d(4, 6, 3, padding=1), dict(
        input=IMAGE, offset=OFFSET, mask=MASK)),
    "DeformConv1d": (lambda: layers.DeformConv1d(4, 6, 3), dict(
        input=torch.rand(2, 4, 8), offset=torch.zeros(2, 3, 6), mask=torch.zeros(2, 3, 6))),
    "DeformMaxPool2d": (lambda: layers.DeformMaxPool2d(4, 3, 1, 1), dict(input=IMAGE, offset=OFFSET)),
    "DeformMaxPool2dPack": (lambda: layers.DeformMaxPool2dPack(4, 2), dict(input=IMAGE)),
    "DCNv1": (lambda: layers.DCNv1(4, 6, 3), dict(input=IMAGE)),
    "DCNv2": (lambda: layers.DCNv2(4, 6, 3, padding=(0, 0, 1, 1)), dict(input=IMAGE)),
    "DeformRoIPool": (lambda: layers.DeformRoIPool(2), dict(input=IMAGE, rois=ROIS, offset=SHIFT)),
    "DeformRoIPoolPack": (lambda: layers.DeformRoIPoolPack(2, 4, 4), dict(input=IMAGE, rois=ROIS)),
    "ModulatedDeformRoIPoolPack": (lambda: layers.ModulatedDeformRoIPoolPack(2, 4, 4), dict(input=IMAGE, rois=ROIS)),
    "PSRoIPool": (lambda: layers.PSRoIPool(1, 2, 2), dict(input=IMAGE, rois=ROIS)),
    "DeformPSRoIPool": (lambda: layers.DeformPSRoIPool(1, 2, 2), dict(
        input=IMAGE, rois=ROIS, offset=SHIFT, mask=FACTOR)),
    "DeformPSRoIPoolPack": (lambda: layers.DeformPSRoIPoolPack(1, 2, 2, deform_fc_channels=4), dict(
        input=IMAGE, rois=ROIS)),
    "MSDeformAttn": (lambda: AtLevels(8, 2, 2, 3), dict(
        query=QUERY, reference_points=POINTS, input_flatten=PIXELS)),
    "MMCVMultiScaleDeformableAttention": (lambda: MMCVAtLevels(8, 2, 2, 3, batch_first=True), dict(
        query=QUERY, reference_points=POINTS, value=PIXELS)),
    "DCNv3": (lambda: layers.DCNv3(6, group=2), dict(input=IMAGE)),
    "DCNv4": (lambda: layers.DCNv4(6, group=2, channels_first=True), dict(input=IMAGE.permute(0, 3, 1, 2))),
    "DAttention": (lambda: layers.DAttention(4, 2, 1, 6), dict(input=IMAGE)),
    "ActiveConv2d": (lambda: layers.ActiveConv2d(4, 6, 3), dict(input=IMAGE)),
    "Dilated": (lambda: layers.Dilated(4, 6, 3), dict(input=IMAGE)),
    "DCNv2Pack": (lambda: layers.DCNv2Pack(4, 6, 3), dict(input=IMAGE, feat=torch.rand(2, 4, 6, 6))),
    "SecondOrderDeformableAlignment": (lambda: layers.SecondOrderDeformableAlignment(4, 2, 3, offset_groups=2), dict(
        input=IMAGE, extra_feat=torch.rand(2, 6, 6, 6), flow_1=SHIFTED, flow_2=SHIFTED)),
    "SpatialTransformer": (lambda: layers.SpatialTransformer(4), dict(input=IMAGE)),
}  # fmt: skip
MISSING = layers.LAYERS.keys() - LAYERS.keys()
assert not MISSING, f"add rows to LAYERS of {__file__}: {', '.join(MISSING)}"


@each_kind
@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, (_, call) in LAYERS.items() for a in call])
def test_layers(name, argument, kind):
    make, message = refused(kind, argument)
    layer, call = LAYERS[name][0](), LAYERS[name][1]
    with pytest.raises(TypeError, match=message):
        layer(**call | {argument: make(call[argument])})
    if argument == "input" and getattr(layer, "offset_branches", {}):
        with pytest.raises(TypeError, match=message):
            layer.offsets(*(make(v) if k == "input" else v for k, v in call.items()))


@each_kind
def test_pooling_from_a_pyramid(kind):
    pool = MultiScaleDeformRoIPool(["0", "1"], 2, 2, in_channels=4, deform_fc_channels=4)
    make, message = refused(kind, r"x\['1'\]")
    with pytest.raises(TypeError, match=message):
        pool({"0": IMAGE, "1": make(IMAGE)}, BOXES, [(6, 6)] * 2)
    make, message = refused(kind, r"boxes\[1\]")
    with pytest.raises(TypeError, match=message):
        pool({"0": IMAGE, "1": IMAGE[:, :, ::2, ::2]}, [BOXES[0], make(BOXES[1])], [(6, 6)] * 2)


def test_dense_tensors_that_are_stored_unusually_are_served():
    """Strides of 0, negated views, zeros without memory, views of a larger one."""
    for name, call in CALLS.items():
        first = BY_NAME[name].image
        n, c, h, w = shape = call[first].shape
        negated = torch.complex(torch.zeros(shape), torch.rand(shape)).conj().imag
        assert negated.is_neg()
        expanded, zeros = torch.rand(1, c, 1, 1).expand(shape), torch._efficientzerotensor(shape)
        for image in (expanded, negated, zeros, torch.rand(n, 2 * c, 2 * h, w)[:, ::2, ::2]):
            dense = torch.empty(shape).copy_(image)
            call = call | {first: image}
            torch.testing.assert_close(getattr(ops, name)(**call), getattr(ops, name)(**call | {first: dense}))


def test_arguments_on_another_device_are_named():
    for name, call in CALLS.items():
        for argument, value in call.items():
            first = BY_NAME[name].image
            if isinstance(value, torch.Tensor) and argument != first:
                with pytest.raises(ValueError, match=rf"{argument}: expected to be on cpu like {first}, got meta"):
                    getattr(ops, name)(**call | {argument: value.to("meta")})
    meta = IMAGE.to("meta")
    for layer, rest in (
        (layers.DCNv1(4, 6, 3), ()),
        (layers.DCNv2(4, 6, 3), ()),
        (layers.DeformRoIPoolPack(2, 4, 4), (ROIS,)),
        (layers.ModulatedDeformRoIPoolPack(2, 4, 4), (ROIS,)),
    ):
        with pytest.raises(ValueError, match="input: expected to be on cpu like the layer's parameters, got meta"):
            layer(meta, *rest)
        with pytest.raises(ValueError, match="input: expected to be on meta like the layer's parameters, got cpu"):
            layer.to("meta")(IMAGE, *rest)
    with pytest.raises(ValueError, match="weight: expected to be on cpu like input, got meta"):
        layers.DeformConv2d(4, 6, 3, padding=1, device="meta")(IMAGE, OFFSET)
