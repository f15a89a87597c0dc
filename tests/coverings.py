"""Which combinations of parameters a test runs over where all of them would say little more than some."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from conftest import DEVICES

ON_CPU, ON_GPU = ([device for device in DEVICES if ("cpu" in device.id) == cpu] for cpu in (True, False))


def pairwise(*lists: Sequence) -> list[tuple]:
    """Rows of one value of each list, so that any two values of two lists meet in some row.

    Faults come of one value or of two that meet, hardly ever of three; and there are about as many rows as the two
    longest lists have pairs, whatever the others add.
    """
    pairs = {
        row: frozenset(itertools.combinations(enumerate(row), 2))
        for row in itertools.product(*(range(len(values)) for values in lists))
    }
    apart = frozenset().union(*pairs.values())
    rows = []
    while apart:
        best = max(pairs, key=lambda row: len(pairs[row] & apart))
        apart -= pairs[best]
        rows.append(tuple(values[i] for values, i in zip(lists, best, strict=True)))
    return rows


def _parametrize(
    names: str, on_cpu: Iterable[tuple], on_gpu: Iterable[tuple], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        [*(name.strip() for name in names.split(",")), "device"],
        [
            pytest.param(*values, *device.values, id="-".join([device.id, *map(word, values)]), marks=device.marks)
            for *values, device in [*on_cpu, *on_gpu]
        ],
        indirect=[*indirect, "device"],
    )


def cover(names: str, *lists: Iterable, indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize `names` and the fixture `device`: on the CPU every pair, on a GPU every combination.

    A GPU's calls take no time, and its kernels differ by type and layout at once. `indirect` names fixtures among
    `names`.
    """
    lists = tuple(list(values) for values in lists)
    return _parametrize(names, pairwise(*lists, ON_CPU), itertools.product(*lists, ON_GPU), indirect)


def by_turns(names: str, rows: Sequence[tuple]) -> pytest.MarkDecorator:
    """Parametrize `names` and the fixture `device`: each row on one of the CPU's paths, the next on the next.

    For what Python does around an operator, which is the same on both; on a GPU every row.
    """
    on_cpu = ((*row, ON_CPU[i % len(ON_CPU)]) for i, row in enumerate(rows))
    return _parametrize(names, on_cpu, ((*row, device) for row in rows for device in ON_GPU))


def word(value: Any) -> str:
    """What stands for a value in the name of a test."""
    if isinstance(value, tuple):
        return "-".join(map(word, value))
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or value).removeprefix("torch.")
