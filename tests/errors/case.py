"""A call that must be refused, and what its message must say."""

import functools
import inspect
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from errors.sites import PACKAGE


class Case(NamedTuple):
    call: Callable[..., Any]  # may take `tmp_path` and `monkeypatch`
    error: type[BaseException]
    name: str  # of the argument, or of what is wrong
    expected: str
    got: str


class Outcome(NamedTuple):
    error: BaseException | None
    lines: frozenset[tuple[str, int]]  # of the package, on the way to the error


@functools.cache
def outcome(case: Case) -> Outcome:
    """Run a case once; a test of its own and the test of the whole share the result."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        given = {"tmp_path": Path(folder), "monkeypatch": patch}
        try:
            case.call(**{name: given[name] for name in inspect.signature(case.call).parameters if name in given})
        except (Exception, SystemExit) as error:
            frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
            inside = [(str(f.relative_to(PACKAGE)), line) for f, line in frames if f.is_relative_to(PACKAGE)]
            return Outcome(error.with_traceback(None), frozenset(inside))
    return Outcome(None, frozenset())
