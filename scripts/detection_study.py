"""Plain against deformable RoI pooling in detectors of digits: `python scripts/detection_study.py [--seeds 0 1 2]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies.detection import ARMS, run_study

from dcn_plugin.finetune.command_line import add_options, errors_in_one_line, parse_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="three or more give mean and spread")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--work-dir", default="work_dirs/detection_study")
    add_options(parser, "overrides for every arm's config")
    args = parser.parse_args()
    scripts = Path(__file__).resolve().parent
    configs = scripts.parent / "configs" / "detection"
    with errors_in_one_line(also=scripts / "studies"):
        options = parse_options(args.cfg_options)
        study = run_study(configs, args.work_dir, args.seeds, args.arms, options)
    print(f"\n{study['table']}")
    for name, path in study["files"].items():
        print(f"{name:>33}  {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
