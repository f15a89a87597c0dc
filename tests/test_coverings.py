"""Thinned parameters still hold every pair."""

import itertools

from coverings import ON_CPU, pairwise


def test_any_two_values_meet_in_few_rows():
    lists = (range(5), "ab", [0.5, 1.5, 2.5], "xyz")
    rows = pairwise(*lists)
    for i, j in itertools.combinations(range(len(lists)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(lists[i], lists[j]))
    assert 15 <= len(rows) <= 18 and len(set(rows)) == len(rows)


def test_the_cpu_has_two_paths():
    assert [device.id for device in ON_CPU] == ["cpu", "cpu_portable"]
