"""Every parallel loop of the operators on several threads, for ThreadSanitizer (scripts/sanitize.py thread)."""

import pytest
import torch
from cases import assert_close

from sanitizers import bodies_of_sources, loops, loops_of_sources, problems

PROBLEMS = problems()


@pytest.mark.parametrize("name", PROBLEMS)
def test_threads_give_what_one_gives(name):
    problem = PROBLEMS[name]
    several, one = problem.run(), problem.run(threads=1)
    for k, v in several.items():
        assert_close(v, one[k], torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32, k)


def test_threads_have_shared_every_loop():
    """What one thread does alone says nothing: a loop that is new, or that no problem above divides, fails here."""
    shared = [loop for loop in loops() if loop.shared]
    assert {loop.place for loop in shared} == loops_of_sources()
    assert {loop.body for loop in shared} - {None} == bodies_of_sources()
