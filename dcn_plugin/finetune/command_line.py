"""What the scripts share: the values of `--cfg-options`, and errors of the user in one line."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

# Whose `raise` is meant for the user.
_PACKAGE, _LIGHTNING = Path(__file__).parents[1], Path(pl.__file__).parent
_SPEAKERS = (_PACKAGE, _LIGHTNING, _LIGHTNING.with_name("lightning_fabric"))
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# int() and float() also take '1_000' and '007', which are names of folders.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_FLOAT = re.compile(r"[+-]?((\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?|inf|infinity|nan)", re.IGNORECASE)
_WORDS = {"true": True, "false": False}
# Raised by anyone, and yet about what the user asked for or has.
_THEIRS = (OSError, ImportError, torch.OutOfMemoryError)


def add_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Give a parser `--cfg-options KEY=VALUE ...`, as strings for `parse_options`."""
    parser.add_argument("--cfg-options", nargs="+", action="extend", metavar="KEY=VALUE", help=what)


def parse_options(options: Sequence[str] | None) -> dict[str, Any]:
    """Return the overrides that `KEY=VALUE` strings stand for, as MMEngine's `--cfg-options` reads them.

    A value is a number, `True`, `False` or `None`; a list `[a, b]` or `a,b`; a tuple `(a, b)`; `dict(key=value)` or
    `{'key': value}`; or else a string, which is kept as it is, spaces and the braces of `{epoch}-{val_top1:.3f}`
    included. A string in quotes loses these and is nothing but a string (brackets in quotes are still a list, as in
    MMEngine); so may one with commas be given.

    Raises:
        ValueError: no `=`, no key, or brackets, quotes or a dict that do not parse, with the option.

    Example:
        >>> parse_options(['data.root=../my data', 'data.input_size=1,28,28', 'trainer.max_epochs=3', 'rules=None'])
        {'data.root': '../my data', 'data.input_size': [1, 28, 28], 'trainer.max_epochs': 3, 'rules': None}
    """
    result = {}
    for option in options or ():
        key, equals, text = option.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise ValueError(f"--cfg-options: expected KEY=VALUE, got {option!r}")
        try:
            result[key.strip()] = _value(text, outermost=True)
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"--cfg-options: expected a value that parses, got {option!r}: {error} (for a string, put it in quotes "
                f"inside those of the shell: {key}='\"...\"')"
            ) from error
    return result


def _value(text: str, outermost: bool = False) -> Any:
    inner = text.strip()
    if len(inner) > 1 and inner[0] in "'\"" and inner.find(inner[0], 1) == len(inner) - 1:
        bare = inner[1:-1]
        return _value(bare) if outermost and bare[:1] in ("[", "(") and _end(bare) == len(bare) else bare
    if inner.startswith("dict(") or (inner.startswith("{") and not _is_pattern(inner)):
        return _literal(ast.parse(inner, mode="eval").body)
    if inner[:1] in ("[", "("):
        end = _end(inner)
        if end == len(inner):
            values = [_value(part) for part in _split(inner[1:-1])]
            return values if inner[0] == "[" else tuple(values)
    if outermost and "," in inner:
        parts = _split(inner)
        if len(parts) > 1 or inner.endswith(","):
            return [_value(part) for part in parts]
    return _scalar(text if outermost else inner)


def _is_pattern(text: str) -> bool:
    """Whether braces are those of a name, `{epoch}-{val_loss:.2f}` or `{000..123}.tar`, rather than a dict's."""
    if _end(text) < len(text):
        return True
    try:
        return not isinstance(ast.parse(text, mode="eval").body, ast.Dict)
    except SyntaxError:
        return not re.search(r"['\"=]", text)  # as in {epoch:02d}; what is quoted was meant to be a dict


def _scalar(text: str) -> Any:
    word = text.strip()
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word) and not re.match(r"[+-]?0\d", word):
        return float(word)
    return None if word == "None" else _WORDS.get(word.lower(), text)


def _end(text: str) -> int:
    """Return where the bracket that opens a text closes."""
    return next(position + 1 for position, depth in _walk(text) if not depth)


def _split(text: str) -> list[str]:
    """Return the parts between the commas that are in no brackets and no quotes; a last comma is no part."""
    parts, start = [], 0
    for position, depth in _walk(text):
        if not depth and text[position] == ",":
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def _walk(text: str) -> Iterator[tuple[int, int]]:
    """Yield each position outside quotes with the number of brackets that are open after it."""
    waiting: list[str] = []
    quote = ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
            continue
        before = text[:position].rstrip()[-1:]
        if character in "'\"" and before in ("", ",", "=", ":", *_CLOSING):  # not the apostrophe of a word
            quote = character
            continue
        if character in _CLOSING:
            waiting.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not waiting or waiting.pop() != character:
                raise ValueError(f"brackets: expected an open one before {character!r}, got none")
        yield position, len(waiting)
    if quote or waiting:
        raise ValueError(f"brackets and quotes: expected {quote or waiting[-1]!r} before the end, got none")


def _literal(node: ast.expr) -> Any:
    """Return what a literal of Python stands for; `dict(...)` is one, and a bare name is a string, as in a list."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if all(keyword.arg is not None for keyword in node.keywords):
            return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_literal(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(item) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"dict: expected plain values in it, got {ast.unparse(node)}") from error


@contextmanager
def errors_in_one_line(before: str = "", also: Path | None = None) -> Iterator[None]:
    """End the program with exit status 1 and one line for an error of the user, and leave a bug its traceback.

    An error of the user is one that a `raise` of this package ends with, whatever its type: each of those names the
    argument or file, what was expected and what came. So is one that Lightning raises, whose arguments stand in the
    config, one of the system (a missing file, a full disk, no memory on the device), and a missing package. What timm,
    MMEngine and torch say of arguments while a config is read and built, `run` raises again with the config's key.
    Anything else is a bug: an `IndexError` of this package, a `ValueError` out of the middle of torch.

    Args:
        before: words to put before the error.
        also: a folder of scripts whose errors are meant for the user like this package's.
    """
    try:
        yield
    except Exception as error:
        said = said_to_user(error, also)
        if said is None:
            raise
        sys.exit(before + said)


def said_to_user(error: BaseException, also: Path | None = None) -> str | None:
    """Return the one line that an error of the user comes to, or None for a bug (see `errors_in_one_line`)."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # handed on by a worker of a loader
        return _said_by_worker(text)
    meant = bool(frames) and _is_meant(frames[-1].filename, frames[-1].line, also)
    return _line(type(error).__name__, text) if meant or isinstance(error, _THEIRS) else None


def _is_meant(filename: str, line: str | None, also: Path | None = None) -> bool:
    speakers = _SPEAKERS if also is None else (*_SPEAKERS, also)
    by_whom = any(Path(filename).is_relative_to(folder) for folder in speakers)
    return by_whom and (line or "").strip().startswith("raise")


def _said_by_worker(text: str) -> str | None:
    """Find in the printed traceback of another process what `said_to_user` finds in one of this process."""
    frames = list(re.finditer(r'^  File "(.+?)", line \d+.*\n(.*)', text, re.MULTILINE))
    after = text[frames[-1].end() :] if frames else ""
    said = re.search(r"^(?!\s)([\w.]+)(?:: (.*))?", after, re.MULTILINE)
    if said is None:
        return None
    name = said.group(1).rpartition(".")[-1]
    known = {cls.__name__ for parent in _THEIRS for cls in (parent, *parent.__subclasses__())}
    if name in known or _is_meant(frames[-1].group(1), frames[-1].group(2)):
        return _line(name, said.group(2) or "")
    return None


def _line(name: str, text: str) -> str:
    return f"{name}: {' '.join(text.split()) or 'no reason given'}"


@contextmanager
def at(section: str) -> Iterator[None]:
    """Raise what another library says of the arguments in a section of a config again, with the section's name."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if Path(last.filename).is_relative_to(_PACKAGE) and _is_meant(last.filename, last.line):
            raise
        raise ValueError(f"{section}: these values do not fit: {type(error).__name__}: {error}") from error
