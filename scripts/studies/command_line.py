"""What the scripts of the studies share: arguments, errors of the user in one line, what is printed at the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dcn_plugin.finetune.command_line import add_options, errors_in_one_line, parse_options

STUDIES = Path(__file__).resolve().parent
CONFIGS = STUDIES.parents[1] / "configs"


def study_parser(
    description: str | None, work_dir: str, arms: Iterable[str] = (), quick: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    """Return a parser with `--seeds`, `--work-dir`, `--cfg-options`, and `--arms` and `--quick` where there are such.

    Args:
        description: of the program.
        work_dir: default of `--work-dir`, below `work_dirs`.
        arms: what `--arms` may name; all of them by default.
        quick: overrides of the configs that `--quick` stands for.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="three or more give mean and spread")
    arms = list(arms)
    if arms:
        parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="default: all")
    parser.set_defaults(quick={})
    if quick is not None:
        said = "few images and one epoch: shows that all runs, and says nothing"
        parser.add_argument("--quick", action="store_const", const=dict(quick), default={}, help=said)
    parser.add_argument("--work-dir", default=f"work_dirs/{work_dir}")
    add_options(parser, "overrides for what every stage is configured with")
    return parser


def run_and_report(args: argparse.Namespace, run: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Call `run` with the overrides that `args` say, and print the table and the paths that it returns."""
    with errors_in_one_line(also=STUDIES):
        study = run({**args.quick, **parse_options(args.cfg_options)})
    print(f"\n{study['table']}")
    width = max(map(len, study["files"]))
    for name, path in study["files"].items():
        print(f"{name.replace('_', ' '):>{width}}  {os.path.relpath(path)}")
