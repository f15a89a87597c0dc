"""Whatever has a list of operators has every operator, or a message names the file and the line to add.

Operators are those that the compiled library registers. Lists that are derived from tests/cases.py need no entry here;
benchmarks have their own test (test_benchmarks.py), as have checks without a case (errors/).
"""

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import BY_NAME
from torch.utils.flop_counter import flop_registry

from dcn_plugin import ops, reference

ROOT = Path(__file__).resolve().parents[1]


def compiled() -> list[str]:
    """Of all that is registered, what is no helper of ours and no backward."""
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name for space, _, name in names if space == "dcn_plugin"}
    return sorted(name for name in ours if not name.startswith("_") and not name.endswith("_backward"))


def text(file: str) -> str:
    return (ROOT / file).read_text()


def has_kernels(op: str, *keys: str) -> bool:
    if f"dcn_plugin::{op}" not in torch._C._dispatch_get_all_op_names():
        return False
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_plugin::{op}", key) for key in keys)


def has_cuda(op: str) -> bool:
    """Beside the schema's file is one that registers with CUDA."""
    folders = [path.parent for path in (ROOT / "csrc/ops").rglob("*.cpp") if f'"{op}(' in path.read_text()]
    return any("STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA" in cu.read_text() for f in folders for cu in f.glob("*.cu"))


def module_of(op: str) -> str:
    return getattr(ops, op).__module__.rpartition(".")[2] if hasattr(ops, op) else op


def in_row(op: str) -> bool:
    """Whether the table of all operators has the function's arguments in their order."""
    names = ", ".join(inspect.signature(getattr(ops, op)).parameters) if hasattr(ops, op) else ""
    return f"| `{op}({names})`" in text("docs/operators.md").partition("## All operators")[2]


def with_onnx(op: str) -> bool:
    return op in importlib.import_module("dcn_plugin.export._onnx_forms").FORMS


def fuzzed(op: str) -> bool:
    pytest.importorskip("hypothesis")
    return op in importlib.import_module("fuzz.strategies").CALLS


class Place(NamedTuple):
    file: str
    line: str
    has: Callable[[str], bool]


PLACES = [
    Place(
        "csrc/ops/<folder>/<file>.cpp",
        'm.def("{op}_backward(Tensor grad_output, ..., int wanted) -> (Tensor grad_input, ...)") and its m.impl',
        lambda op: (
            f"dcn_plugin::{op}_backward" in torch._C._dispatch_get_all_op_names()
            and has_kernels(op, "CPU")
            and has_kernels(f"{op}_backward", "CPU")
        ),
    ),
    Place("csrc/ops/<folder>/<file>.cu", "STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m), with {op} in it", has_cuda),
    Place("dcn_plugin/reference/__init__.py", "{op}, imported and in __all__", lambda op: op in reference.__all__),
    Place("dcn_plugin/ops/__init__.py", "{op}, imported and in __all__", lambda op: op in ops.__all__),
    Place(
        "dcn_plugin/ops/<module>.py",
        'register("{op}", ...): tracing, gradients, vmap, autocast',
        lambda op: has_kernels(op, "Meta", "Autograd", "FuncTorchBatched", "AutocastCPU", "AutocastCUDA"),
    ),
    Place(
        "dcn_plugin/ops/_flops.py",
        "a formula for {op} and one for {op}_backward",
        lambda op: all(getattr(torch.ops.dcn_plugin, n, None) in flop_registry for n in (op, f"{op}_backward")),
    ),
    Place(
        "dcn_plugin/export/_onnx_forms.py",
        '"{op}" in FORMS: what torch.onnx.export writes',
        with_onnx,
    ),
    Place("tests/cases.py", 'OpCase("{op}", ...) in CASES', lambda op: op in BY_NAME),
    Place("tests/fuzz/strategies.py", '"{op}": a strategy, in CALLS', fuzzed),
    Place(
        "tests/ops/test_<module>.py",
        "what is special to {op}",
        lambda op: (
            f"test_{module_of(op)}.py" in {path.name for path in (ROOT / "tests/ops").iterdir()}
            and re.search(rf"\b{op}\b", text(f"tests/ops/test_{module_of(op)}.py")) is not None
        ),
    ),
    Place(
        "tests/ops/test_huge_gradients.py",
        '"{op}" in CALLS',
        lambda op: f'"{op}":' in text("tests/ops/test_huge_gradients.py"),
    ),
    Place(
        "tests/ops/test_cuda.py",
        '"{op}" in LARGE: arguments for a map of more than 2^31 elements',
        lambda op: f'"{op}"' in text("tests/ops/test_cuda.py"),
    ),
    Place("tests/test_onnx_export.py", "{op}, exported or refused", lambda op: op in text("tests/test_onnx_export.py")),
    Place("docs/operators.md", "## {op}", lambda op: f"\n## {op}\n" in text("docs/operators.md")),
    Place("docs/operators.md", "a row `{op}(<its arguments>)` of the table All operators", in_row),
    Place(
        "docs/guarantees.md",
        "`{op}` where it says what every operator is",
        lambda op: f"`{op}`" in text("docs/guarantees.md").partition("\n\n##")[0],
    ),
    Place("CHANGELOG.md", "a line that names {op}", lambda op: f"`{op}`" in text("CHANGELOG.md")),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.file}: {place.line[:30]}")
def test_every_operator_has_its_place(place: Place):
    missing = [op for op in compiled() if not place.has(op)]
    assert not missing, "\n".join(f"{place.file}: add {place.line.format(op=op)}" for op in missing)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.file}: {place.line[:30]}")
def test_an_operator_without_anything_is_missed_everywhere(place: Place):
    assert not place.has("toy_without_anything")


def test_nothing_names_an_operator_that_is_not_compiled():
    functions = set(ops.__all__) - {"kernels_used"}
    assert functions == set(compiled()) == set(BY_NAME)
