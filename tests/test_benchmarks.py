"""The benchmarks measure what they say: memory that is known, rounds that alternate, results that are compared.

Of what is for a GPU alone, the arithmetic and the tables are tested, and that the arguments rotate.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import dcn_plugin

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MIB = 2**20


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of the benchmarks, which find one another beside the script that is run."""
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def allocate(scratch: int, result: int):
    """A call that writes so many MiB and frees them, and returns so many others."""

    def call() -> list[Tensor]:
        freed = torch.ones(scratch * MIB, dtype=torch.uint8)
        return [freed[: result * MIB].clone()]

    return call


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize("scratch, result", [(48, 16), (3, 1), (40, 40)])
def test_peak_memory_is_what_a_call_takes_above_its_results(benchmark, scratch, result):
    peak = benchmark("memory").peak_mib(allocate, (1, 1), (scratch, result))
    assert abs(peak - scratch) < 0.75


def test_all_take_turns_and_slow_ones_have_fewer_rounds(benchmark, monkeypatch):
    harness = benchmark("harness")
    order: list[str] = []
    speed = {"dcn_plugin": 10, "fast": 1, "slow": 400}

    def clock(call) -> float:
        order.append(call())
        return speed[order[-1]]

    monkeypatch.setattr(harness, "clock", clock)
    calls = {(name, "NCHW"): lambda name=name: name for name in speed}
    setting = harness.Setting("cpu", torch.float32, 1.0, rounds=12, seconds=0.1)
    times = harness.measure(calls, setting)
    taken = {name: set(times[name, "NCHW"]) for name in speed}
    assert taken["fast"] == set(range(12)) and len(taken["dcn_plugin"]) == 10 and taken["slow"] == {3, 7, 11}
    # The first call of each only shows how long it takes.
    assert order == [*speed, *(name for number in range(12) for name in speed if number in taken[name])]
    found = harness.compared(times, "NCHW")
    assert found["slow"]["NCHW"] == {"ms": 400, "spread": 0, "rounds": 3, "ratio": 10 / 400}
    assert found["fast"]["NCHW"]["ratio"] == 10


def test_every_operator_is_timed_or_it_says_why_not(benchmark):
    run = benchmark("run")
    timed = {name for family in run.FAMILIES.values() for name in getattr(family, "OPERATORS", ())}
    assert timed.isdisjoint(run.NOT_TIMED)
    for name in BY_NAME:
        assert name in timed or name in run.NOT_TIMED, (
            f"benchmarks/: add {name} to OPERATORS of the family that times it (a new one to FAMILIES in run.py) or to "
            "NOT_TIMED in run.py with the reason why none does"
        )
    assert timed | run.NOT_TIMED.keys() == BY_NAME.keys()


def test_every_backbone_is_timed_and_the_tiny_ones_beside_others(benchmark):
    timm = pytest.importorskip("timm")
    backbones, harness = benchmark("backbones"), benchmark("harness")
    shapes = backbones.SHAPES["cpu"]
    wanted = [name for family in ("dcn_internimage", "dcn_dat") for name in timm.list_models(module=family)]
    assert sorted(shape.model for shape in shapes) == sorted(wanted)
    setting = harness.Setting("cpu", torch.float32, 1.0, 1, 1.0)
    for shape in shapes:
        assert shape.batch == 1 and shape.is_tiny == (shape.model.rpartition("_")[2] == "tiny")
        if not shape.is_tiny:
            assert not any(backbones.make(shape, setting, name, "channels_last") for name in backbones.PEERS)
    ours = {harness.OURS: {"channels_last": {"ms": 500.0, "spread": 0.1}}, "batch": 1}
    alone = backbones.figures(ours)
    assert alone["images/s"] == "2.00" and alone["/ resnet50_dcn"] == alone["convnext_tiny images/s"] == "-"
    beside = backbones.figures({**ours, **{name: {"NCHW": {"ms": 250.0, "ratio": 2.0}} for name in backbones.PEERS}})
    assert beside.keys() == alone.keys() and beside["/ resnet50_dcn"] == "2.00"
    assert beside["convnext_tiny images/s"] == "4.00"


def test_what_differs_is_not_timed(benchmark):
    harness = benchmark("harness")
    truth, off = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.001])
    harness.require_equal("these", [truth], [truth.clone()], 0)
    for wrong in (off, truth * float("nan")):
        with pytest.raises(SystemExit, match="these: result 1"):
            harness.require_equal("these", [truth, wrong], [truth, truth], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, dict(outputs=6, stride=2), dict(groups=4, offset_groups=2), dict(kernel=5, groups=8)], ids=str
)
def test_the_work_of_a_convolution(benchmark, options, dtype):
    conv, harness = benchmark("conv"), benchmark("harness")
    shape = conv.Shape(2, 8, 9, 11, **options)
    setting = harness.Setting("cpu", dtype, 1.0, 1, 1.0)
    tensors = conv.problem(shape, setting, "NCHW", dtype)
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    arguments = sum(size[name] for name in ("input", "offset", "weight", "mask"))
    with FlopCounterMode(display=False) as counter:
        conv.make(shape, setting, "conv2d", "NCHW")["forward"]()
    flops = counter.get_total_flops()
    for task, operations, traffic in (
        ("forward", flops, arguments + size["grad"]),
        # The forward, then the backward: arguments and gradient of the result in, gradients of all arguments out.
        ("forward+backward", 3 * flops, arguments + size["grad"] + arguments + size["grad"] + arguments),
    ):
        assert conv.work(shape, task, dtype.itemsize) == ("deform_conv2d", operations, traffic, 0)


@pytest.mark.parametrize("position_sensitive", [False, True])
def test_the_work_of_pooling(benchmark, position_sensitive):
    roi, harness = benchmark("roi"), benchmark("harness")
    shape = roi.Shape(2, 4, 30, 40, 9, position_sensitive=position_sensitive)
    setting = harness.Setting("cpu", torch.bfloat16, 1.0, 1, 1.0)
    tensors = roi.problem(shape, setting, "NCHW", torch.bfloat16)
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    operator = "deform_ps_roi_pool" if position_sensitive else "deform_roi_pool"
    once = sum(size.values())
    assert roi.work(shape, "forward", 2) == (operator, 0, once, 0)
    assert roi.work(shape, "forward+backward", 2) == (operator, 0, 2 * once + size["input"] + size["offset"], 0)


def test_the_work_of_attention(benchmark):
    attention, harness = benchmark("attention"), benchmark("harness")
    shape = attention.Shape(2, 12, 15, 9)
    assert shape.levels() == [(12, 15), (6, 8), (3, 4), (2, 2)]
    setting = harness.Setting("cpu", torch.bfloat16, 1.0, 1, 1.0)
    tensors = attention.problem(shape, setting, torch.bfloat16)
    assert tensors["locations"].dtype == torch.float32 and tensors["value"].dtype == torch.bfloat16
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    once, gradients = sum(size.values()), size["value"] + size["locations"] + size["weights"]
    assert attention.work(shape, "forward", 2) == ("ms_deform_attn", 0, once, 0)
    assert attention.work(shape, "forward+backward", 2) == ("ms_deform_attn", 0, 2 * once + gradients, 0)


def test_aggregation_is_compared_with_all_its_peers(benchmark):
    """What `verify` compares is the same sum by other ways; the work is the bytes of arguments and result."""
    aggregation, harness = benchmark("aggregation"), benchmark("harness")
    setting = harness.Setting("cpu", torch.float32, 1.0, 1, 1.0)
    shape = aggregation.Shape(2, 32, 5)
    made = {key: aggregation.make(shape, setting, *key) for key in aggregation.CONTESTANTS["cpu"]}
    aggregation.verify(shape, setting, made)
    wrong = {**made, (aggregation.FALLBACK, aggregation.LAYOUT): made[aggregation.CONV, "NCHW"]}
    with pytest.raises((SystemExit, RuntimeError)):
        aggregation.verify(shape, setting, wrong)
    pixels = 2 * 5 * 5
    taps = 4 * pixels * 2 * 9 * 3  # float32 whatever the values are
    assert aggregation.work(shape, "forward", 2) == ("deform_aggregate2d", 0, 2 * pixels * 2 * 32 + taps, 0)


def test_no_sample_of_attention_lies_at_a_whole_pixel(benchmark):
    """There rounding, in which the contestants differ, would choose the side of a derivative."""
    attention, harness = benchmark("attention"), benchmark("harness")
    shape = attention.Shape(1, 24, 31)
    found = attention.problem(shape, harness.Setting("cpu", torch.float32, 2.0, 1, 1.0), torch.float32)
    size = torch.tensor(shape.levels()).flip(1)[:, None]
    parts = (found["locations"] * size - 0.5).remainder(1)
    assert 0.04 < parts.min() < 0.06 and 0.94 < parts.max() < 0.96


@pytest.mark.parametrize("layer", [False, True])
def test_attention_is_timed_beside_the_peers_that_are_there(benchmark, monkeypatch, layer):
    peers, harness = benchmark("attention_peers"), benchmark("harness")
    attention = benchmark("attention")
    monkeypatch.setattr(attention, "extras", lambda *_: {"memory": {"dcn_plugin": 0.5}})
    setting = harness.Setting("cpu", torch.float32, 1.0, rounds=3, seconds=0.01)
    rows = harness.rows_for(attention, attention.Shape(1, 9, 12, 5, layer), setting)
    assert [row["task"] for row in rows] == ["forward", "forward+backward"]
    for name, package in peers.PACKAGES.items():
        takes_part = find_spec(package) is not None and (name == peers.FALLBACK or not layer)
        assert all((name in row) == takes_part for row in rows)
        assert (package in attention.about(setting)) == (find_spec(package) is None)
    for row in rows:
        shown = attention.figures(row)
        assert (shown["bfloat16 /"] == "-") == layer and (shown["/ parts"] == "-") == (not layer)
        assert shown["MiB"] == "0.5" and shown["fallback MiB"] == "-"


def test_a_contestant_on_one_thread_gives_the_threads_back(benchmark):
    attention = benchmark("attention")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert attention.alone(lambda: [torch.get_num_threads()])() == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_detector_is_timed_before_and_after(benchmark):
    pytest.importorskip("transformers")
    detectors, harness = benchmark("detectors"), benchmark("harness")
    setting = harness.Setting("cpu", torch.float32, 1.0, rounds=3, seconds=0.01)
    backbone = dict(
        model_type="timm_backbone", backbone="resnet18", features_only=True, use_pretrained_backbone=False,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    small = (*detectors._SMALL, ("backbone_config", backbone), ("d_model", 32), ("num_queries", 10))
    shape = detectors.QUICK["cpu"][1]._replace(height=64, width=96, options=small)
    made = {key: detectors.make(shape, setting, *key) for key in detectors.CONTESTANTS["cpu"]}
    detectors.verify(shape, setting, made)
    for (name, _), calls in made.items():
        assert calls.keys() == {"training step"}
        with torch.profiler.profile() as profile:
            calls["training step"]()
        seen = {event.key for event in profile.key_averages()}
        ours, theirs = {"dcn_plugin::ms_deform_attn", "dcn_plugin::ms_deform_attn_backward"}, "aten::grid_sampler_2d"
        assert (ours <= seen, theirs in seen) == (name == "dcn_plugin", name != "dcn_plugin")
    times = {"dcn_plugin": {"NCHW": {"ms": 20, "spread": 0.01}}, "transformers": {"NCHW": {"ms": 50, "ratio": 0.4}}}
    assert detectors.figures({"layout": "NCHW", **times}) == {
        "before ms": "50", "ms": "20", "before / after": "2.5x", "spread": "1%",
    }  # fmt: skip


def test_a_table_of_a_gpu(benchmark):
    gpu, run, conv = benchmark("gpu"), benchmark("run"), benchmark("conv")
    tops = {"tflop_s": 800.0, "gb_s": 4000.0}
    facts = gpu.facts(gpu.Work("deform_conv2d", operations=10**12, traffic=2 * 10**9), 2.5, tops, 0.125)
    assert facts == {"host_ms": 0.125, "tflop_s": 400.0, "of_product": 0.5, "gb_s": 800.0, "of_copy": 0.2}
    assert gpu.facts(gpu.Work("x", images=64), 50.0, tops, 1.0) == {"host_ms": 1.0, "images_s": 1280.0}

    def took(ms: float, layout: str = "channels_last") -> dict:
        return {layout: {"ms": ms, "spread": 0.01, "rounds": 15, "ratio": 2.5 / ms}}

    row = {
        "shape": "64x256x14x14", "layout": "channels_last", "task": "forward", "gpu": facts,
        "kernels": {"deform_conv2d": "fused 64x256"}, "memory": {"dcn_plugin": 0.5, "torchvision": 1000.0},
        "dcn_plugin": took(2.5), "portable": took(10.0), "conv2d": took(2.0),
        "torchvision": took(20.0, "NCHW"), "torchvision float16": took(15.0, "NCHW"),
    }  # fmt: skip
    about = {"device": "a GPU", "multiprocessors": "132", "memory": "140 GiB", "date": "2026-01-01", "torch": "2.11.0"}
    table = run.markdown(
        {"about": about, "ceilings": tops, "command": "run", "dtype": "bfloat16", "what": "x", "rows": {"GPU": [row]}},
        conv,
    )
    *_, head, _, last = table.splitlines()
    cells = dict(zip(head.split(" | "), last.split(" | "), strict=True))
    assert cells == {
        "| shape": "| 64x256x14x14", "layout": "channels_last", "task": "forward", "ms": "2.500", "/ conv2d": "1.25",
        "torchvision /": "8.0x", "torchvision float16 /": "6.0x", "portable /": "4.0x", "spread": "1%", "MiB": "0.5",
        "torchvision MiB": "1000.0", "TFLOP/s": "400.0", "of product": "50%", "GB/s": "800", "of copy": "20%",
        "host ms": "0.125", "kernels |": "fused 64x256 |",
    }  # fmt: skip
    assert "moves 4000 GB/s" in table and "does 800 TFLOP/s" in table and "132 multiprocessors, 140 GiB" in table


def test_calls_on_a_gpu_take_turns_through_copies_of_their_arguments(benchmark, monkeypatch):
    gpu = benchmark("gpu")
    monkeypatch.setenv("DCN_PLUGIN_CUDA_KERNELS", "portable")
    held, called = [0], []

    def make(size: int):
        def made() -> dict:
            held[0] += size
            number = held[0] // size
            return {"forward": lambda: called.append((number, os.environ["DCN_PLUGIN_CUDA_KERNELS"])) or []}

        return made

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    for size, copies in ((gpu.COLD // 6, 7), (gpu.COLD, 4), (1, gpu.MOST_COPIES)):
        held[0] = 0
        task = gpu.rotating(make(size), 4, gpu.FUSED)["forward"]
        called.clear()
        for _ in range(copies + 2):
            task()
        assert called == [(1 + i % copies, "fused") for i in range(copies + 2)]


def test_a_shape_that_fails_is_left_out(benchmark, monkeypatch, tmp_path, capsys):
    run, conv, harness = benchmark("run"), benchmark("conv"), benchmark("harness")
    setting = harness.Setting("cpu", torch.float32, 1.0, rounds=3, seconds=0.01)
    good, bad = conv.Shape(1, 4, 6, 6), conv.Shape(1, 4, 7, 7)
    monkeypatch.setattr(conv, "extras", lambda *_: {"memory": {"dcn_plugin": None, "torchvision": None}})
    really = harness.rows_for

    def rows_for(family, shape, setting):
        if shape == bad:
            raise RuntimeError("out of something")
        return really(family, shape, setting)

    monkeypatch.setattr(run, "rows_for", rows_for)
    threads = torch.get_num_threads()
    try:
        status = run.run(conv, [bad, good], Namespace(device="cpu"), setting, "run", [1], tmp_path / "table")
        assert status == 1 and "left out: 1x4x7x7: out of something" in capsys.readouterr().out
        rows = json.loads((tmp_path / "table.json").read_text())["rows"]["1 thread"]
        assert {row["shape"] for row in rows} == {"1x4x6x6"} and "1x4x6x6" in (tmp_path / "table.md").read_text()
        assert run.run(conv, [good], Namespace(device="cpu"), setting, "run", [1], tmp_path / "table") == 0
    finally:
        torch.set_num_threads(threads)


def test_the_share_of_our_operators_on_a_gpu(benchmark):
    """Time of the kernels below our operators, also where one of ours calls itself, over all time."""
    pytest.importorskip("timm")
    models = benchmark("models")

    def event(name: str, parent=None, own: float = 0, total: float = 0, device=DeviceType.CPU):
        times = dict(self_device_time_total=own, device_time_total=total)
        return SimpleNamespace(name=name, cpu_parent=parent, device_type=device, **times)

    outer = event("dcn_plugin::deform_conv2d", total=30)
    inner = event("dcn_plugin::deform_conv2d", outer, own=10, total=30)
    node = event("autograd::engine::evaluate_function", total=45)
    events = [
        outer, inner, event("aten::mm", inner, own=20, total=20),
        node, event("dcn_plugin::deform_conv2d_backward", node, own=45, total=45),
        event("aten::cudnn_convolution", own=25, total=25),
        event("a kernel of a stream", own=100, total=100, device=DeviceType.CUDA),
    ]  # fmt: skip
    assert models.share(SimpleNamespace(events=lambda: events), "cuda") == 0.75
    assert models.share(SimpleNamespace(events=lambda: []), "cuda") is None


def test_a_run_writes_a_table_and_its_figures(tmp_path):
    pytest.importorskip("torchvision")
    options = "--quick --family deform_conv2d --shape 2x256x14x14 --rounds 1 --out"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *options.split(), str(tmp_path)],
        env=dict(os.environ, PYTHONPATH=str(Path(dcn_plugin.__file__).parents[1])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (table,), (figures,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    result = json.loads(figures.read_text())
    assert str(tmp_path) not in table.read_text() + figures.read_text()
    rows = result["rows"]["1 thread"]
    assert {(row["layout"], row["task"]) for row in rows} == {
        (layout, task) for layout in ("NCHW", "channels_last") for task in ("forward", "forward+backward")
    }
    for row in rows:
        assert ("onnxruntime" in row) == (row["task"] == "forward" and find_spec("onnxruntime") is not None)
        for name in ("dcn_plugin", "conv2d"):
            assert row[name].keys() == {"NCHW", "channels_last"}
        assert row["dcn_plugin"][row["layout"]]["ratio"] == 1
        assert f"{row['dcn_plugin'][row['layout']]['ms']:.2f}" in table.read_text()
