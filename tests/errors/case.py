"""A call that must be refused, and what its message must say."""

import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
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
    places: frozenset[tuple[str, int, int | None]]  # file, line and column, of the package, on the way to the error


def places(step: TracebackType | None) -> Iterator[tuple[str, int, int | None]]:
    while step is not None:
        code = step.tb_frame.f_code
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            column = None
            if hasattr(code, "co_positions"):  # from Python 3.11 on
                column = next(itertools.islice(code.co_positions(), step.tb_lasti // 2, None))[2]
            yield str(path.relative_to(PACKAGE)), step.tb_lineno, column
        step = step.tb_next


@functools.cache
def outcome(case: Case) -> Outcome:
    """Run a case once; a test of its own and the test of the whole share the result."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        given = {"tmp_path": Path(folder), "monkeypatch": patch}
        try:
            case.call(**{name: given[name] for name in inspect.signature(case.call).parameters if name in given})
        except Exception as error:
            found, cause = frozenset(places(error.__traceback__)), error.__cause__
            while cause is not None:  # raised by the package too, or by what it calls
                found, cause = found | frozenset(places(cause.__traceback__)), cause.__cause__
            return Outcome(error.with_traceback(None), found)
    return Outcome(None, frozenset())
