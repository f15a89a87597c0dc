"""Attention functions of ultralytics and rfdetr on ours, on packages that this file makes up: signatures are theirs.

The packages themselves are not installed where this runs; `test_ultralytics.py` and `test_rfdetr.py` have real models.
"""

from __future__ import annotations

import copy
import logging
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcn_plugin import reference
from dcn_plugin.integrations import enable, rfdetr, ultralytics

SHAPES = [[5, 7], [3, 4]]
PIXELS = 35 + 12
HOME = {
    ultralytics: "ultralytics.nn.modules.utils.multi_scale_deformable_attn_pytorch",
    rfdetr: "rfdetr.models.ops.functions.ms_deform_attn_core_pytorch",
}
USERS = {
    ultralytics: ["ultralytics.nn.modules.transformer"],
    rfdetr: ["rfdetr.models.ops.functions.ms_deform_attn_func", "rfdetr.models.ops.modules.ms_deform_attn"],
}
called: list[str] = []


def plain(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """By torch alone: value [N, S, M, D], locations and weights with or without an axis for the levels."""
    called.append("theirs")
    n, _, heads, channels = value.shape
    queries, sizes = locations.shape[1], [(int(h), int(w)) for h, w in shapes]
    locations, weights = locations.flatten(3, -2), weights.flatten(3)
    count, first, out = locations.shape[3] // len(sizes), 0, 0.0
    for level, (height, width) in enumerate(sizes):
        own = slice(level * count, (level + 1) * count)
        maps = value[:, first : first + height * width].permute(0, 2, 3, 1)
        grid = (2 * locations[:, :, :, own] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps.reshape(n * heads, channels, height, width), grid, align_corners=False)
        out = out + (sampled * weights[:, :, :, own].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        first += height * width
    return out.view(n, heads * channels, queries).transpose(1, 2).contiguous()


def of_ultralytics(value, value_spatial_shapes, sampling_locations, attention_weights):
    _, _, _, _, _ = sampling_locations.shape
    return plain(value, value_spatial_shapes, sampling_locations, attention_weights)


def of_older_ultralytics(value, value_spatial_shapes, sampling_locations, attention_weights):
    _, _, _, _, _, _ = sampling_locations.shape
    return plain(value, value_spatial_shapes, sampling_locations, attention_weights)


def of_rfdetr(value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw=None):
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    return plain(value.permute(0, 3, 1, 2), shapes, sampling_locations, attention_weights)


def of_older_rfdetr(value, value_spatial_shapes, sampling_locations, attention_weights):
    return of_rfdetr(value, value_spatial_shapes, sampling_locations, attention_weights)


THEIRS = {of_ultralytics: ultralytics, of_older_ultralytics: ultralytics, of_rfdetr: rfdetr, of_older_rfdetr: rfdetr}


@pytest.fixture(params=THEIRS, ids=lambda function: function.__name__)
def theirs(request, monkeypatch):
    """One of these functions, as a package in memory has it."""
    put_in_memory(request.param, monkeypatch)
    yield request.param
    THEIRS[request.param].uninstall()


def put_in_memory(function, monkeypatch):
    integration = THEIRS[function]
    module, _, name = HOME[integration].rpartition(".")
    for where in (module, *USERS[integration]):
        made = types.ModuleType(where)
        setattr(made, name, function)
        monkeypatch.setitem(sys.modules, where, made)
    called.clear()


def held(integration, where=None):
    module, _, name = HOME[integration].rpartition(".")
    return getattr(sys.modules[where or module], name)


def given(function, dtype=torch.float32, n=2, queries=6) -> list:
    torch.manual_seed(0)
    merged, places = function is of_ultralytics, torch.promote_types(dtype, torch.float32)
    value = torch.randn(n, PIXELS, 2, 4).to(dtype)
    locations = (torch.rand(n, queries, 2, *((6,) if merged else (2, 3)), 2) * 1.4 - 0.2).to(places)
    weights = torch.rand(n, queries, 2, *((2, 3) if function is of_older_ultralytics else (6,))).to(places)
    shapes = SHAPES
    if THEIRS[function] is rfdetr:
        value, shapes = value.permute(0, 2, 3, 1).contiguous(), torch.tensor(SHAPES)
    return [value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()]


def values_and_gradients(call, arguments) -> list[Tensor]:
    out = call(*arguments)
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


def test_results_and_gradients_are_theirs_and_the_definitions(theirs):
    integration, arguments = THEIRS[theirs], given(theirs)
    before = values_and_gradients(held(integration), arguments)
    with integration.accelerate():
        called.clear()
        after = values_and_gradients(held(integration), arguments)
        if theirs is of_rfdetr:  # whose callers give sizes in Python, too, by name
            again = held(integration)(*arguments, value_spatial_shapes_hw=[(5, 7), (3, 4)])
            assert torch.equal(again, after[0])
        assert not called
    for mine, other in zip(after, before, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    value, _, locations, weights = (t.detach().double() if isinstance(t, Tensor) else t for t in arguments)
    value = value.permute(0, 3, 1, 2) if integration is rfdetr else value
    exact = reference.ms_deform_attn(value, SHAPES, locations, weights)
    torch.testing.assert_close(after[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(held(integration)(*arguments), before[0]) and called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_beside_float32_positions(dtype, theirs):
    arguments = given(theirs, dtype)
    exact = held(THEIRS[theirs])(*(t.detach().float() if i != 1 else t for i, t in enumerate(arguments)))
    with THEIRS[theirs].accelerate():
        found = values_and_gradients(held(THEIRS[theirs]), arguments)
    assert found[0].dtype == dtype and all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0].float(), exact, rtol=0.02, atol=0.02)


def test_every_module_that_holds_it_has_ours_until_nobody_asks(theirs, monkeypatch, caplog):
    integration = THEIRS[theirs]
    everywhere = [HOME[integration].rpartition(".")[0], *USERS[integration]]
    program = types.ModuleType("a_program")
    program.alias = theirs
    monkeypatch.setitem(sys.modules, "a_program", program)
    with caplog.at_level(logging.INFO, "dcn_plugin"):
        first = integration.accelerate()
    assert caplog.messages == [str(first)] and "\n" not in str(first)
    assert HOME[integration].rpartition(".")[2] in str(first) and "ms_deform_attn of dcn_plugin" in str(first)
    assert {*everywhere, "a_program"} <= {*first.modules} and first.modules == integration.installed()
    served = program.alias
    assert served is not theirs and all(held(integration, where) is served for where in everywhere)
    assert served.__name__ == theirs.__name__ and served.__wrapped__ is theirs
    second = integration.accelerate()
    program.later = held(integration)  # imported meanwhile
    first.undo()
    first.undo()
    assert program.alias is served, "the second still asks"
    with second:
        pass
    assert program.alias is program.later is theirs and integration.installed() == ()
    assert all(held(integration, where) is theirs for where in everywhere)
    for _ in range(2):
        integration.accelerate()
    integration.uninstall()
    assert program.alias is theirs


def test_traces_go_on_holding_theirs(theirs):
    """Their files run without us; graphs that torch.export makes do not."""
    integration, arguments = THEIRS[theirs], [t.detach() if isinstance(t, Tensor) else t for t in given(theirs)]
    value, shapes, *others = arguments

    def call(value, locations, weights):
        return held(integration)(value, SHAPES, locations, weights)

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    with integration.accelerate():
        traced = torch.jit.trace(call, (value, *others))
        program = torch.export.export(Model(), (value, *others))
    assert "grid_sampler" in str(traced.graph) and "dcn_plugin" not in str(traced.graph)
    assert "dcn_plugin.ms_deform_attn" in str(program.graph)
    torch.testing.assert_close(traced(value, *others), program.module()(value, *others), rtol=1e-4, atol=1e-5)


def test_other_devices_and_copies(theirs):
    """A device without a kernel of ours keeps theirs; what refers to the function goes on doing so."""
    integration = THEIRS[theirs]
    with integration.accelerate():
        meta = [t.to("meta") if isinstance(t, Tensor) and i != 1 else t for i, t in enumerate(given(theirs))]
        assert held(integration)(*meta).shape == (2, 6, 8)
        assert copy.deepcopy(partial(held(integration))).func is held(integration)
        with pytest.raises(ValueError, match="value"):
            arguments = given(theirs)
            held(integration)(
                arguments[0][:, :, :, :-1] if integration is rfdetr else arguments[0][:, :-1], *arguments[1:]
            )


def test_by_name(monkeypatch):
    from dcn_plugin import integrations

    put_in_memory(of_ultralytics, monkeypatch)
    monkeypatch.setattr(integrations, "find_spec", lambda name: name)
    try:
        assert "multi_scale_deformable_attn_pytorch" in enable("ultralytics")
        assert ultralytics.installed()
    finally:
        ultralytics.uninstall()
