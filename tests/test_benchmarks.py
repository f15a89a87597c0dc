"""The benchmarks measure what they say: memory that is known, rounds that alternate, results that are compared."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

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

    def clock(call, device: str) -> float:
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


def test_what_differs_is_not_timed(benchmark):
    harness = benchmark("harness")
    truth, off = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.001])
    harness.require_equal("these", [truth], [truth.clone()], 0)
    for wrong in (off, truth * float("nan")):
        with pytest.raises(SystemExit, match="these: result 1"):
            harness.require_equal("these", [truth, wrong], [truth, truth], 1e-4)


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
