"""What the enumeration finds, on a package made for it."""

from errors import sites

CHECK = """
def integer(name, value):
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer") from None


def pair(name, value):
    return integer(name, value), integer(name, value)


def of_nobody(value):
    raise ValueError("value")
"""
USE = """
from . import _check
from ._check import integer as whole, of_nobody


class Layer:
    def __init__(self, size):
        alias = _check.pair
        self.size = alias("size", size)
        self.more = whole("more", 1)
        of_nobody(2)

    def forward(self):
        raise NotImplementedError

    def late(self):
        try:
            raise KeyError("own")
        except LookupError:
            raise
        except ValueError as error:
            raise RuntimeError("not its own") from error

    def escapes(self):
        try:
            raise RuntimeError("not caught here")
        except ValueError:
            pass
"""


def test_statements_and_calls_of_helpers_are_found_and_control_flow_is_not(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "_check.py").write_text(CHECK)
    (tmp_path / "part" / "use.py").write_text(USE)
    monkeypatch.setattr(sites, "PACKAGE", tmp_path)
    assert [(site.file, site.first, site.text) for site in sites.sites.__wrapped__()] == [
        ("part/_check.py", 8, "raise TypeError(f'{name} must be an integer') from None"),
        ("part/_check.py", 12, "integer(name, value)"),
        ("part/_check.py", 12, "integer(name, value)"),
        ("part/_check.py", 16, "raise ValueError('value')"),
        ("part/use.py", 9, "alias('size', size)"),
        ("part/use.py", 10, "whole('more', 1)"),
        ("part/use.py", 22, "raise RuntimeError('not its own') from error"),
        ("part/use.py", 26, "raise RuntimeError('not caught here')"),
    ]
