"""Run a program with the plug in: `python -m dcn_plugin [--accelerate NAMES] SCRIPT ARGS`, or `-m MODULE ARGS`.

`_startup/sitecustomize.py` is imported by the program's own interpreter, which this one becomes. So `sys.argv`,
`__main__`, tracebacks, signals and the exit status are Python's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from importlib.util import find_spec
from typing import NoReturn

from ._startup import sitecustomize
from .integrations import INTEGRATIONS, require

USAGE = "python [PYTHON'S OPTIONS] -m dcn_plugin [options] (SCRIPT | -m MODULE | -c CODE | -) [ARGUMENTS ...]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dcn_plugin: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "python -m dcn_plugin",
        usage=USAGE,
        description="Run a program as Python would, with dcn_plugin imported before it: its models and layers are "
        "known to timm and MMEngine by name. So they are in the Python processes that the program starts.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--accelerate", metavar="NAMES", action="append", default=[], help="integrations to put in place, with commas"
    )
    parser.add_argument("--quiet", action="store_true", help="do not say on stderr what they replaced")
    parser.add_argument("--list", action="store_true", help="list the integrations and end")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return our own options, and what Python is to run."""
    own, rest = [], list(arguments)
    while rest and (rest[0].startswith("--") or rest[0] == "-h"):
        own.append(rest.pop(0))
        if own[-1] == "--":
            return own[:-1], rest
        if own[-1] == "--accelerate" and rest:
            own.append(rest.pop(0))
    return own, rest


def _interpreter(parser: argparse.ArgumentParser) -> list[str]:
    """Return the interpreter and the options of it that stand before `-m dcn_plugin`."""
    *options, last = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if last == "dcn_plugin" and options:
        *options, last = options
    asked = re.fullmatch(r"(-[A-Za-z]*)m(dcn_plugin)?", last)
    if not asked:  # a debugger or profiler is in between
        parser.error(f"expected to be started by `python -m dcn_plugin`, got {last!r}; start that by -m dcn_plugin -m")
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error("expected a Python that reads PYTHONPATH and site, got one of the options -E, -I and -S")
    return [sys.executable, *options, *([asked[1]] if asked[1] != "-" else [])]


def _check_program(parser: argparse.ArgumentParser, program: list[str]) -> None:
    """Find out now what Python would find out only after the plug is in."""
    first = program[0] if program else None
    if first in (None, "-m", "-c") and len(program) < 2:
        parser.error(f"expected SCRIPT, -m MODULE, -c CODE or -, got {first or 'none of them'}; --help tells more")
    elif first == "-m":
        module = program[1].partition(".")[0]
        if module not in sys.modules and find_spec(module) is None:
            parser.exit(1, f"dcn_plugin: -m: expected a module, got {program[1]!r}, of which there is none\n")
    elif first not in ("-", "-c"):
        assert first is not None
        if first.startswith("-"):
            parser.error(f"expected SCRIPT, -m MODULE, -c CODE or -, got {first!r}; Python's options go before our -m")
        if not os.path.exists(first):
            parser.error(f"expected a script, folder or zip file, got {first!r}, which does not exist")


def _environment(names: list[str], quiet: bool) -> dict[str, str]:
    """Return the environment in which Python finds `sitecustomize`, and that what it has to do."""
    before = os.environ.get("PYTHONPATH")
    # An empty entry is the current folder, but an empty variable has none.
    others = [entry for entry in before.split(os.pathsep) if entry != sitecustomize.FOLDER] if before else []
    path = os.pathsep.join([sitecustomize.FOLDER, *others])
    # Of the processes of one run, one speaks.
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    run = dict(accelerate=names, quiet=quiet, prefix=sys.prefix, first=True)
    return {**os.environ, "PYTHONPATH": path, sitecustomize.VARIABLE: json.dumps(run)}


def main() -> None:
    parser = _parser()
    own, program = _split(sys.argv[1:])
    options = parser.parse_args(own)
    if options.list:
        for name, integration in INTEGRATIONS.items():
            missing = integration.missing()
            print(f"{name:12} {f'needs {missing}' if missing else 'available'}: {integration.does}")
        return
    names = list(dict.fromkeys(name for given in options.accelerate for name in given.split(",") if name))
    try:
        for name in names:
            require(name)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(f"--accelerate: {error}")
    _check_program(parser, program)
    command = [*_interpreter(parser), *program]
    sys.stdout.flush()
    os.execve(command[0], command, _environment(names, options.quiet))


if __name__ == "__main__":
    main()
