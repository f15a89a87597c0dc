"""Every error of the package is raised by a case, and names the argument, what was expected and what came.

The statements that raise are found in the source, so a new one without a case fails here.
"""

import importlib

import pytest

from errors.case import outcome
from errors.sites import sites

# Table of cases -> the files whose errors it raises.
PARTS = {
    "ops": ("ops/", "reference/"),
    "layers": ("layers/",),
    "models": ("models/",),
    "visualize": ("visualize.py", "visualize_detection.py"),
    "core": ("convert.py", "checkpoint.py", "onnx_export.py", "_extension.py", "registry.py", "mmengine_hooks.py"),
}
TABLES = {part: importlib.import_module(f"errors.table_{part}") for part in PARTS}
CASES = [
    pytest.param(case, id=f"{part}-{i}-{case.name[:30]}")
    for part, table in TABLES.items()
    for i, case in enumerate(table.CASES)
]


def part_of(file: str) -> str | None:
    return next((part for part, prefixes in PARTS.items() if file.startswith(prefixes)), None)


@pytest.mark.parametrize("case", CASES)
def test_message_names_argument_expected_and_got(case):
    error = outcome(case).error
    assert type(error) is case.error, repr(error)
    # The words of a KeyError are shown in quotes.
    message = str(error.args[0] if isinstance(error, KeyError) else error)
    for words in (case.name, case.expected, case.got):
        assert words and words in message, f"{words!r} is not in {message!r}"


@pytest.mark.parametrize("part", PARTS)
def test_every_statement_that_raises_is_reached(part):
    reached = frozenset().union(*(outcome(case).lines for case in TABLES[part].CASES))
    exempt = getattr(TABLES[part], "EXEMPT", {})
    missed = [
        str(site)
        for site in sites()
        if part_of(site.file) == part
        and not any((site.file, line) in reached for line in range(site.first, site.last + 1))
        and not any(site.file == file and words in site.text for file, words in exempt)
    ]
    assert not missed, "no case raises\n" + "\n".join(missed)
