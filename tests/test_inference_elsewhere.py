"""Prepared weights in copies, files, other processes and threads, graphs, transforms and training."""

import copy
import io
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
from cases import assert_close
from prepared import C, assert_same, image, is_prepared, twins
from run_python import run_python
from torch import nn

from dcn_plugin import DCNv2, DeformConv2d, prepare_for_inference
from dcn_plugin.ops import deform_conv2d

# -- copies, files, processes ------------------------------------------------------------------------------------------


def test_copies_and_files():
    plain, prepared = twins()
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    for copied in (copy.deepcopy(prepared), torch.load(file, weights_only=False)):
        assert is_prepared(copied)
        assert_same(plain, copied, image())
        copied.weight.data.zero_()
        assert_same(plain, prepared, image())


def test_the_state_dict_is_the_same():
    plain, prepared = twins()
    expected, found = plain.state_dict(), prepared.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())
    sizes = []
    for state in (expected, found):
        file = io.BytesIO()
        torch.save(state, file)
        sizes.append(len(file.getvalue()))
    assert abs(sizes[0] - sizes[1]) < 256
    fresh = DCNv2(C, C, 3, padding=1)
    fresh.load_state_dict(found)
    assert not is_prepared(fresh)
    assert_same(plain, fresh, image())


def test_parameters_stay_what_they_were():
    layer = DCNv2(C, C, 3)
    weight, names = layer.weight, [name for name, _ in layer.named_parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    prepare_for_inference(layer)
    assert layer.weight is weight and weight.requires_grad and optimizer.param_groups[0]["params"][0] is weight
    assert [name for name, _ in layer.named_parameters()] == names and not list(layer.buffers())
    address = weight.data_ptr()
    assert prepare_for_inference(layer).weight.data_ptr() == address, "nothing is copied a second time"


def test_tied_weights_stay_tied():
    first, second = DeformConv2d(C, C, 3, padding=1), DeformConv2d(C, C, 3, padding=1)
    second.weight = first.weight
    prepare_for_inference(nn.ModuleList([first, second]))
    assert second.weight is first.weight and is_prepared(first)


def _write(weight, value):
    weight.data.fill_(value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_another_process_writes_into_shared_weights():
    plain, prepared = twins()
    prepared.share_memory()
    assert is_prepared(prepared)
    assert_same(plain, prepared, image())
    process = multiprocessing.get_context("fork").Process(target=_write, args=(prepared.weight, 0.25))
    process.start()
    process.join()
    assert process.exitcode == 0
    plain.weight.data.fill_(0.25)
    assert_same(plain, prepared, image())


FORKED = """
import os, torch
from dcn_plugin import DCNv2, prepare_for_inference
torch.set_num_threads(1)
layer, x = prepare_for_inference(DCNv2(32, 32, 3, padding=1).requires_grad_(False)), torch.randn(1, 32, 7, 7)
before = layer(x)
child = os.fork()
if child == 0:
    layer.weight.data.zero_()
    os._exit(0 if torch.equal(layer(x), layer.bias[None, :, None, None].expand(1, 32, 7, 7)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(layer(x), before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_weights_of_its_own():
    run_python(FORKED)


def test_many_threads_call_one_layer():
    _, prepared = twins()
    inputs = [image(batch=1 + i % 3) for i in range(12)]
    expected = [prepared(x) for x in inputs]
    wrong = []

    def call(i):
        for _ in range(20):
            if not torch.equal(prepared(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


MEMORY = """
import torch
from pathlib import Path
from dcn_plugin import DeformConv2d, prepare_for_inference
torch.set_num_threads(1)
layer, x, offset = DeformConv2d(512, 512, 3, padding=1), torch.randn(1, 512, 7, 7), torch.zeros(1, 18, 7, 7)
small = DeformConv2d(64, 64, 3, padding=1)
def peak(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) // 1024
with torch.no_grad():
    layer.to(memory_format=torch.channels_last)
    {prepare}
    prepare_for_inference(small)(x[:, :64], offset)
    before = peak("VmRSS")
    layer(x, offset)
print(peak("VmRSS") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_weights_of_few_pixels_are_not_packed():
    """9 MB of them, which a call that packs keeps for the next."""
    grown = [int(run_python(MEMORY.format(prepare=line))) for line in ("", "prepare_for_inference(layer)")]
    assert grown[0] >= 8 and grown[1] <= 3


# -- gradients, graphs, transforms -------------------------------------------------------------------------------------


def test_gradients():
    plain, prepared = twins()
    found = []
    for layer in (plain, prepared):
        layer.requires_grad_(True)
        x = image().requires_grad_()
        layer(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for expected, gradient in zip(*found, strict=True):
        assert_close(gradient, expected, torch.float32)


def test_training_goes_on():
    plain, prepared = twins()
    for layer in (plain, prepared):
        layer.requires_grad_(True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            layer(image()).square().mean().backward()
            optimizer.step()
    assert is_prepared(prepared)
    assert_same(plain, prepared, image())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    plain, prepared = twins()
    compiled = torch.compile(prepared, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), plain(image()))
        for layer in (plain, prepared):
            layer.weight.data.mul_(2.0)
        torch.testing.assert_close(compiled(image()), plain(image()))


def test_exported():
    plain, prepared = twins()
    program = torch.export.export(prepared, (image(),))
    torch.testing.assert_close(program.module()(image()), plain(image()))


def test_traced_and_frozen():
    plain, prepared = twins()
    traced = torch.jit.freeze(torch.jit.trace(prepared.eval(), image()))
    torch.testing.assert_close(traced(image()), plain(image()))


def test_autocast():
    plain, prepared = twins()
    with torch.autocast("cpu", torch.bfloat16):
        found = assert_same(plain, prepared, image())
    assert found.dtype == torch.bfloat16


def test_samples_with_weights_of_their_own():
    plain, prepared = twins()
    x = image()
    offset, mask = plain.offsets(x)

    def apply(weight, offset):
        return deform_conv2d(x, offset, weight, padding=1, mask=mask)

    stacked = torch.stack([prepared.weight, 2 * prepared.weight])
    found = torch.vmap(apply, (0, None))(stacked, offset)
    torch.testing.assert_close(found, torch.stack([apply(plain.weight, offset), apply(2 * plain.weight, offset)]))


def test_a_model():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18_dcn", num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert prepare_for_inference(model) is model
        torch.testing.assert_close(model(x), expected)
    prepared = [layer for layer in model.modules() if isinstance(layer, DCNv2)]
    assert prepared and all(is_prepared(layer) for layer in prepared)
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous() for m in others)
