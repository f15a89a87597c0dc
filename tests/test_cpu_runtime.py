"""The CPU operators as guests in somebody's process: of its threads, its OpenMP runtime, its forks and its memory."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, OpCase, assert_close, leaves, run, tensors
from run_python import run_python
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Job = tuple[OpCase, dict[str, Any]]
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells in /proc/self")
# Long enough for a slow machine; what takes longer hangs.
PATIENCE = 60


def every_job(case: OpCase | None = None) -> list[Job]:
    """Each operator (or one) with each of its configurations, in both layouts of the image."""
    jobs = []
    for one in CASES if case is None else [case]:
        for config in one.configs:
            for layout in (torch.contiguous_format, torch.channels_last):
                arguments = one.make(config, torch.float32)
                jobs.append((one, {**arguments, one.image: arguments[one.image].contiguous(memory_format=layout)}))
    return jobs


def results(jobs: list[Job]) -> list[dict[str, Tensor]]:
    return [run(case.function, arguments) for case, arguments in jobs]


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name} differs {what}"


def in_fresh_process(body: Callable[[], None]) -> str:
    """Run a function of this file in a process of its own, in which nothing has run yet; return what it prints."""
    # Python 3.12 and newer warn of a fork in a process with threads, which is what is tested here.
    options = ("-W", "ignore::DeprecationWarning")
    return run_python(f"import {__name__}; {__name__}.{body.__name__}()", *options, path=Path(__file__).parent)


def use_torch() -> None:
    """Make torch start whatever it starts for work on the present number of threads, forward and backward."""
    image = torch.rand(2, 16, 256, 256, requires_grad=True)
    torch.nn.functional.conv2d(image, torch.rand(16, 16, 3, 3)).sum().backward()
    torch.rand(512, 512) @ torch.rand(512, 512)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_results_do_not_depend_on_the_number_of_threads(case: OpCase, restore_threads):
    jobs = every_job(case)
    torch.set_num_threads(1)
    expected = results(jobs)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for one, other, first in zip(results(jobs), results(jobs), expected, strict=True):
            assert_equal_bits(one, other, f"between two runs on {count} threads")
            for name, value in one.items():
                assert_close(value, first[name], torch.float32, f"{name} on {count} threads")
            # Documented of the pooling operators; a convolution may add up its parts in another order.
            if case.of_regions:
                assert_equal_bits(one, first, f"between {count} threads and one")


@needs_proc
def test_no_thread_is_started_beside_those_of_torch():
    in_fresh_process(compare_os_threads)


def compare_os_threads() -> None:
    for count in (1, 3):
        torch.set_num_threads(count)
        use_torch()
        before = set(os.listdir("/proc/self/task"))
        results(every_job())
        assert set(os.listdir("/proc/self/task")) == before, f"{count} threads"


@needs_proc
def test_no_openmp_runtime_is_loaded_beside_torchs():
    """Two of them in a process keep two pools of threads, or abort."""
    use = "import torch; torch.rand(512, 512) @ torch.rand(512, 512); "
    show = "import re; print(sorted(set(re.findall(r'/.*/lib[a-z]*omp[-.0-9].*', open('/proc/self/maps').read()))))"
    with_operators = use + f"import {__name__} as t; t.results(t.every_job()); "
    assert run_python(use + show) == run_python(with_operators + show, path=Path(__file__).parent)


def test_calls_from_several_python_threads_do_not_disturb_one_another(threads):
    jobs = every_job()
    expected = results(jobs)
    callers = 4
    together = threading.Barrier(callers)

    def call(first: int) -> list[tuple[int, dict[str, Tensor]]]:
        together.wait(PATIENCE)
        # Each starts elsewhere in the list, so that different operators and sizes meet.
        order = [(first * len(jobs) // callers + i) % len(jobs) for i in range(len(jobs))]
        return [(i, run(jobs[i][0].function, jobs[i][1])) for i in order]

    with ThreadPoolExecutor(callers) as pool:
        for seen in pool.map(call, range(callers)):
            for i, result in seen:
                assert_equal_bits(result, expected[i], f"beside other calls ({jobs[i][0].name})")


def test_backward_from_several_python_threads(threads):
    """Each thread takes gradients through graphs that others made, some of one graph at the same time."""
    jobs = every_job()
    expected = results(jobs)
    callers = 3
    together = threading.Barrier(callers)
    graphs = []
    for case, arguments in jobs:
        wanted = leaves(arguments)
        graphs.append((case.function(**wanted), tensors(wanted)))

    def differentiate(_: int) -> list[dict[str, Tensor]]:
        together.wait(PATIENCE)
        return [
            dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out), True), strict=True))
            for out, wanted in graphs
        ]

    with ThreadPoolExecutor(callers) as pool:
        for seen in pool.map(differentiate, range(callers)):
            for (case, _), found, alone in zip(jobs, seen, expected, strict=True):
                for name, grad in found.items():
                    assert torch.equal(grad, alone[f"grad_{name}"]), f"{case.name}: {name}"


class Results(Dataset):
    """What a data set does that calls an operator for each of its items."""

    def __init__(self, jobs: list[Job]) -> None:
        # By number, for a case does not go to a process that is spawned.
        self.jobs = [(CASES.index(case), arguments) for case, arguments in jobs]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        case, arguments = self.jobs[index]
        return run(CASES[case].function, arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_forked_after_use_compute_the_same():
    in_fresh_process(compare_forked)


def compare_forked() -> None:
    jobs = every_job()
    # A fork keeps what threads have left in memory, and none of the threads.
    torch.set_num_threads(3)
    results(jobs)
    torch.set_num_threads(1)
    expected = results(jobs)
    torch.set_num_threads(3)

    def compare() -> None:
        torch.set_num_threads(1)
        for actual, wanted in zip(results(jobs), expected, strict=True):
            assert_equal_bits(actual, wanted, "in a forked process")

    context = multiprocessing.get_context("fork")
    child = context.Process(target=compare, daemon=True)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode is not None, "the forked process hangs"
    assert child.exitcode == 0

    compare_workers(context, jobs, expected)
    results(jobs)


def compare_workers(context: Any, jobs: list[Job], expected: list[dict[str, Tensor]]) -> None:
    """Two epochs of a DataLoader whose workers call the operators."""
    loader = DataLoader(
        Results(jobs),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=context,
        timeout=PATIENCE,
        persistent_workers=True,
    )
    for _ in range(2):
        for actual, wanted in zip(loader, expected, strict=True):
            assert_equal_bits(actual, wanted, "in a worker of a DataLoader")


def test_spawned_workers_of_a_loader_compute_the_same(restore_threads):
    jobs = every_job()
    # Workers have one thread.
    torch.set_num_threads(1)
    compare_workers(multiprocessing.get_context("spawn"), jobs, results(jobs))
