"""What the sanitizers say to loops that have the faults of fork_join.h (run by tests/test_sanitizers.py)."""

import os
import re
from pathlib import Path

import pytest

from sanitizers import Loop, Problem, loops, loops_of_sources, problems, spoil

OVERLAP, UNTOLD, BEYOND, OVERFLOW = 1, 2, 3, 4
PROBLEMS = problems()


def first_to_share() -> dict[str, tuple[Loop, Problem]]:
    """For each loop of the sources, one that several threads have shared, and the problem that did it."""
    found: dict[str, tuple[Loop, Problem]] = {}
    for problem in PROBLEMS.values():
        problem.run()
        for loop in loops():
            if loop.shared:
                found.setdefault(loop.place, (loop, problem))
    return found


def reports() -> str:
    log = re.search(r"log_path=([^:]+)", os.environ["TSAN_OPTIONS"])[1]
    return "".join(path.read_text() for path in Path(log).parent.glob(f"{Path(log).name}.*"))


def test_two_threads_at_one_element():
    """Run with TSAN_OPTIONS that go on after a report, and write it to a file."""
    found = first_to_share()
    assert found.keys() == loops_of_sources()
    assert reports() == ""
    # There elements are no tasks: those are taken by whoever is free. Its end untold, the next call packs weights that
    # the last still reads, as far as can be known. Comes last, since nothing that follows would be ordered.
    untold = "csrc/ops/deform_conv2d/cpu/forward.h"
    for place in sorted(found, key=lambda place: place.startswith(untold)):
        loop, problem = found[place]
        fault = UNTOLD if place.startswith(untold) else OVERLAP
        before = len(reports())
        spoil(loop, fault)
        problem.run(), problem.run()
        spoil(loop, 0)
        new = reports()[before:]
        assert "WARNING: ThreadSanitizer: data race" in new and "Location is heap block" in new, place


@pytest.mark.parametrize("fault", [BEYOND, OVERFLOW], ids=["beyond", "overflow"])
def test_memory_that_is_not_there(fault):
    """Does not come to its end."""
    problem = PROBLEMS["pixels-float32-contiguous_format-tuned"]
    problem.run(threads=1)
    place = "csrc/ops/roi_pool/cpu/rows.h"
    spoiled = [loop for loop in loops() if loop.place.startswith(place)]
    assert spoiled
    for loop in spoiled:
        spoil(loop, fault)
    problem.run(threads=1)
