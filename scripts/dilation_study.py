"""Where do receptive fields grow? `python scripts/dilation_study.py [--seeds 0 1 2] [--arms faster-rcnn] [--quick]`."""

from __future__ import annotations

from studies.command_line import CONFIGS, run_and_report, study_parser
from studies.dilation import ARMS, QUICK, run_study


def main() -> None:
    args = study_parser(__doc__, "dilation_study", ARMS, QUICK).parse_args()
    configs = CONFIGS / "detection"
    run_and_report(args, lambda options: run_study(configs, args.work_dir, args.seeds, args.arms, options))


if __name__ == "__main__":
    main()
