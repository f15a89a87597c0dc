"""`prepare_for_inference`: weights stored in another order, so that nothing of them exists twice.

A prepared layer is held against a twin that is not, which everything that happens to weights happens to as well. Where
both multiply packed weights, bits are equal; weights in place are added up in another order.
"""

import copy
import ctypes

import pytest
import torch
from conftest import PORTABLE, TUNED, V3, cpu_kernels
from prepared import C, assert_same, image, is_prepared, twins
from torch import nn
from torch.nn.utils import parametrizations, prune

import dcn_plugin
from dcn_plugin import DCNv2, prepare_for_inference


@pytest.mark.parametrize("kernels", [PORTABLE, "tuned baseline", V3, TUNED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(out=48, kernel=5),
        dict(out=20, kernel=1),  # no whole vectors
        dict(c=130, out=64),  # blocks of channels that differ
        dict(c=64, out=64, groups=4),
        dict(offset_groups=4),
        dict(c=64, out=128, groups=2, offset_groups=4),
        dict(groups=C),  # depthwise
        dict(c=1, out=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [7, 18])  # few pixels, and more than are read in place
def test_the_same_bits(options, dtype, kernels, size):
    if options == dict(groups=C):
        plain = twins_of_depthwise(dtype)
        prepared = plain[1][0]
        assert not is_prepared(prepared)
        assert_same(plain[0][0], prepared, image(dtype, C, size))
        return
    plain, prepared = twins(dtype, **options)
    assert is_prepared(prepared) and not is_prepared(plain)
    assert prepared.weight.dtype == dtype and torch.equal(prepared.weight, plain.weight)
    with cpu_kernels(kernels):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = image(dtype, options.get("c", C), size, batch=2).contiguous(memory_format=layout)
            with torch.no_grad():
                expected, found = plain(x), prepared(x)
            assert found.stride() == expected.stride()
            in_place = size == 7 and dtype.itemsize > 2
            if in_place or kernels == PORTABLE:  # torch's products may add up in another order, too
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(found, expected)


def twins_of_depthwise(dtype):
    """In a model with a layer that can be prepared."""
    torch.manual_seed(0)
    plain = nn.Sequential(DCNv2(C, C, 3, padding=1, groups=C, dtype=dtype), DCNv2(C, C, 3, dtype=dtype))
    return plain, prepare_for_inference(copy.deepcopy(plain))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size, out", [(1, 256), (3, 512), (7, 80)])
def test_threads_that_share_outputs(size, out, threads):
    """Few pixels: then the plain layer uses its weights as they are stored, and adds up in another order."""
    plain, prepared = twins(c=64, out=out)
    x = image(c=64, size=size)
    expected = plain.double()(x.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(prepared(x), expected.float(), rtol=1e-5, atol=1e-5)
        alone = prepared(x)
        torch.set_num_threads(1)
        assert torch.equal(prepared(x), alone)
    finally:
        torch.set_num_threads(before)


# -- changes -----------------------------------------------------------------------------------------------------------


def element(weight, o, c, y, x):
    """The address of a weight."""
    place = sum(i * stride for i, stride in zip((o, c, y, x), weight.stride(), strict=True))
    return weight.data_ptr() + 4 * place


def through_numpy(layer):
    layer.weight.detach().numpy()[3, 5, 1] = 2.0


def through_dlpack(layer):
    torch.from_dlpack(layer.weight.detach()).mul_(3.0)


def through_an_address(layer):
    ctypes.c_float.from_address(element(layer.weight, 3, 5, 1, 2)).value = 7.0


def through_memmove(layer):
    two = (ctypes.c_float * 2)(4.0, -4.0)
    for i in (0, 1):
        address = element(layer.weight, 30, 31, i, i)
        ctypes.memmove(address, ctypes.addressof(two) + 4 * i, 4)


def through_a_view(layer):
    layer.weight.detach()[4].zero_()


def through_storage(layer):
    storage = layer.weight.untyped_storage()
    torch.tensor([], dtype=torch.float32).set_(storage, 0, (len(storage) // 4,), (1,)).neg_()


def through_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(0.5)


def step(optimizer):
    def change(layer):
        layer.requires_grad_(True)
        chosen = optimizer([layer.weight], lr=0.1)
        torch.manual_seed(2)
        layer.weight.grad = torch.randn(layer.weight.shape)
        chosen.step()
        layer.requires_grad_(False)

    return change


def load(assign):
    def change(layer):
        torch.manual_seed(3)
        layer.load_state_dict({k: torch.randn(v.shape) * 0.1 for k, v in layer.state_dict().items()}, assign=assign)

    return change


def assign_weight(layer):
    torch.manual_seed(3)
    layer.weight = nn.Parameter(torch.randn(layer.weight.shape), requires_grad=False)


def assign_data(layer):
    torch.manual_seed(3)
    layer.weight.data = torch.randn(layer.weight.shape)


def swap(layer):
    torch.manual_seed(3)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(layer.weight.shape), requires_grad=False))


def prune_and_remove(layer):
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    layer.weight_orig.data.mul_(2.0)
    layer(image())  # pruning computes the weight in a hook before each call
    prune.remove(layer, "weight")


CHANGES = {
    "data": lambda layer: layer.weight.data.mul_(2.0),
    "no_grad": lambda layer: torch.no_grad()(layer.weight.mul_)(2.0),
    "copy": lambda layer: layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view(layer.weight.shape)),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "index": lambda layer: layer.weight.index_fill_(0, torch.tensor([1, 2]), 0.5),
    "numpy": through_numpy,
    "dlpack": through_dlpack,
    "address": through_an_address,
    "memmove": through_memmove,
    "view": through_a_view,
    "storage": through_storage,
    "inference mode": through_inference_mode,
    "SGD": step(torch.optim.SGD),
    "Adam": step(torch.optim.Adam),
    "load_state_dict": load(assign=False),
    "load_state_dict, assign": load(assign=True),
    "assignment": assign_weight,
    "assignment of data": assign_data,
    "swap": swap,
    "pruning": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "pruning, removed": prune_and_remove,
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "channels_last": lambda layer: (layer.to(memory_format=torch.channels_last), layer.weight.data.mul_(2.0)),
}
REPEATED = ["data", "no_grad", "numpy", "dlpack", "address", "SGD", "load_state_dict", "assignment of data"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_what_the_next_call_computes_with(change):
    plain, prepared = twins()
    before = assert_same(plain, prepared, image())
    for layer in (plain, prepared):
        CHANGES[change](layer)
    after = assert_same(plain, prepared, image())
    if change != "weight norm":
        assert not torch.equal(after, before)
    # A layer that lost its order is prepared anew, and goes on.
    if "weight" in prepared._parameters:
        assert_same(plain, prepare_for_inference(prepared), image())
        assert is_prepared(prepared)


@pytest.mark.parametrize("change", REPEATED)
def test_changes_one_after_the_other(change):
    plain, prepared = twins()
    for other in [change, *REPEATED]:
        for layer in (plain, prepared):
            CHANGES[other](layer)
        assert_same(plain, prepared, image())


def test_values_change_between_calls_without_a_trace_in_the_version():
    """What a copy that is kept beside the weights could not notice."""
    _, prepared = twins()
    for change in ("data", "numpy", "dlpack", "address", "memmove"):
        version, address = prepared.weight._version, prepared.weight.data_ptr()
        CHANGES[change](prepared)
        assert (prepared.weight._version, prepared.weight.data_ptr()) == (version, address)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_type(dtype):
    plain, prepared = twins()
    plain.to(dtype), prepared.to(dtype)
    assert is_prepared(prepared)
    assert_same(plain, prepared, image(dtype))


def test_other_kernels_between_calls():
    plain, prepared = twins(c=64, out=96)
    for kernels in (TUNED, V3, "tuned baseline", TUNED, PORTABLE, V3):
        with cpu_kernels(kernels), torch.no_grad():
            torch.testing.assert_close(prepared(image(c=64)), plain(image(c=64)))


def test_an_array_of_before_is_no_longer_the_weight():
    plain, prepared = twins()
    array = plain.weight.detach().numpy()
    prepare_for_inference(plain)
    array[:] = 0.0
    assert_same(prepared, plain, image())


# -- what is left as it is ---------------------------------------------------------------------------------------------


def test_it_is_taken_back():
    plain, prepared = twins()
    for parameter in prepared.parameters():
        parameter.data = parameter.data.contiguous()
    assert prepared.weight.is_contiguous()
    assert_same(plain, prepared, image())
    prune.l1_unstructured(prepared, "weight", 0.5)  # torch's own asks for contiguous weights


def test_computed_weights_are_left_alone():
    normed, plain = parametrizations.weight_norm(DCNv2(C, C, 3)), DCNv2(C, C, 3)
    strides = [p.stride() for p in normed.parameters()]
    prepare_for_inference(nn.ModuleList([normed, plain]))
    assert [p.stride() for p in normed.parameters()] == strides and is_prepared(plain)


def test_other_devices_are_left_alone():
    meta = DCNv2(C, C, 3, device="meta")
    prepare_for_inference(nn.ModuleList([meta, DCNv2(C, C, 3)]))
    assert meta.weight.is_contiguous()


def test_it_is_public():
    assert dcn_plugin.prepare_for_inference is dcn_plugin.inference.prepare_for_inference
