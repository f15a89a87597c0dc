"""Plain against deformable on warped handwritten digits: `python scripts/digits_study.py [--seeds 0 1 2]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies.digits import run_study

from dcn_plugin.finetune.command_line import add_options, errors_in_one_line, parse_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="three or more give mean and spread")
    parser.add_argument("--upright-arms", action="store_true", help="also fine-tune both networks without warps")
    parser.add_argument("--work-dir", default="work_dirs/digits_study")
    add_options(parser, "overrides for every stage's config")
    args = parser.parse_args()
    scripts = Path(__file__).resolve().parent
    configs = scripts.parent / "configs" / "classification"
    with errors_in_one_line(also=scripts / "studies"):
        options = parse_options(args.cfg_options)
        study = run_study(configs, args.work_dir, args.seeds, args.upright_arms, options)
    print(f"\n{study['table']}")
    for name, path in study["files"].items():
        print(f"{name.replace('_', ' '):>20}  {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
