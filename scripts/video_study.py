"""What alignment buys a recurrent network on moving digits: `python scripts/video_study.py [--seeds 0 1 2]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies.video import ARMS, run_study

from dcn_plugin.finetune.command_line import add_options, errors_in_one_line, parse_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="three or more give mean and spread")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--work-dir", default="work_dirs/video_study")
    parser.add_argument("--no-progress-bar", action="store_true")
    add_options(parser, "values in place of those of DEFAULTS in scripts/studies/video.py")
    args = parser.parse_args()
    with errors_in_one_line(also=Path(__file__).resolve().parent / "studies"):
        options = parse_options(args.cfg_options)
        study = run_study(args.work_dir, args.seeds, args.arms, options, not args.no_progress_bar)
    print(f"\n{study['table']}")
    for name, path in study["files"].items():
        print(f"{name:>10}  {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
