"""pytest's part of scripts/gpu_check.sh: which tests run with which kernels, and failed ones named while others run.

The shell script gives it by `-p gpu_check_tests`, and says in the environment:
    GPU_CHECK_KERNELS   `portable`: all but what asks for the fused kernels; `fused`: what the choice changes
    GPU_CHECK_FAILED    file that gets the name of each failed test at once
    GPU_CHECK_RUNNING   file that has the names of the tests that run, one in a line
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Tests of half types, and of operators whose fused kernels serve float32.
MODULES = ("test_cuda", "test_contracts", "test_ms_deform_attn", "test_deform_aggregate2d")


def pooled() -> set[str]:
    """Names of the operators that pool regions, which have no fused kernels, and of their problems."""
    # Of the tests, whose folder is on the path once they are collected.
    from cases import CASES  # type: ignore[import-not-found]

    return {name for case in CASES if case.of_regions for name in (case.name, *case.real)}


def depends_on_kernels(item: pytest.Item, pooled: set[str]) -> bool:
    """Whether fused kernels may serve what a test calls."""
    values: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    names = {value if isinstance(value, str) else getattr(value, "name", None) for value in values.values()}
    return not names & pooled and item.path.stem in MODULES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernels = os.environ.get("GPU_CHECK_KERNELS")
    if not kernels:
        return
    without = pooled()

    def chosen(item: pytest.Item) -> bool:
        asked = item.callspec.params.get("kernels", kernels) if hasattr(item, "callspec") else kernels
        return asked == kernels and (kernels == "portable" or depends_on_kernels(item, without))

    left_out = [item for item in items if not chosen(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Processes side by side report to the one that started them; it alone writes.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ and (path := os.environ.get("GPU_CHECK_FAILED")):
        kernels = os.environ.get("DCN_PLUGIN_CUDA_KERNELS")
        with open(path, "a") as file:
            file.write(f"{report.nodeid}{f'  # {kernels} kernels' if kernels else ''}\n")


_running: list[str] = []


def write_running() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and (path := os.environ.get("GPU_CHECK_RUNNING")):
        Path(path).write_text("\n".join(_running))


def pytest_runtest_logstart(nodeid: str) -> None:
    _running.append(nodeid)
    write_running()


def pytest_runtest_logfinish(nodeid: str) -> None:
    if nodeid in _running:
        _running.remove(nodeid)
    write_running()


def pytest_sessionfinish() -> None:
    _running.clear()
    write_running()
