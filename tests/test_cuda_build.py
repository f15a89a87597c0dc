"""The CUDA kernels compile for every architecture of the default list, and take no more there than they may."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toolchain import ROOT, Compiler, Nvcc, Torch


def check(budget: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/cuda_compile_check.py", str(budget)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.xdist_group("cuda_build")  # what it compiles, test_cuda_counts counts
def test_kernels_keep_within_their_budgets(tmp_path):
    nvcc = Nvcc.find(Torch.find(), Compiler.find())
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    done = check(ROOT / "csrc/cuda_budget.json")
    if "cuobjdump cannot be found" in done.stderr:
        pytest.skip("cuobjdump is neither on PATH nor beside nvcc or torch")
    assert done.returncode == 0, done.stderr[-4000:]
    head, _, *rows = done.stdout.splitlines()
    columns = head.strip("| ").split(" | ")
    assert columns[0] == "kernel" and columns[-2:] == ["stack", "shared"] and len(columns) > 3
    kernels = {row.strip("| ").split(" | ")[0]: row.strip("| ").split(" | ")[1:] for row in rows}
    name = "FillColumns<float, float, float, float, int, 4>"
    filling = kernels[f"run_body<{name}>"]
    assert len(filling) == len(columns) - 1 and all(16 < int(registers) < 256 for registers in filling[:-2])

    # What is too much, what has no budget and what is not there any more is named.
    strict = tmp_path / "budget.json"
    most = {"^run_body<FillColumns<float, float": 10, "^run_body<SharedSums<": 255, "no such kernel": 255}
    budgets = [{"kernel": kernel, "registers": registers, "stack": 0} for kernel, registers in most.items()]
    strict.write_text(json.dumps({"budgets": budgets}))
    done = check(strict)
    assert done.returncode == 1
    said = done.stderr
    assert f"{name}> takes {filling[0]} (registers) on {columns[1]}, over its" in said
    assert "SharedSums<" not in said
    assert "run_body<FillColumns<float, Half, Half, Half, int, 8>> has no entry" in said
    assert "the entry 'no such kernel' is for no kernel" in said
