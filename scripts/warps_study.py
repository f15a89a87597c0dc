"""Does deformation replace augmentation? `python scripts/warps_study.py [--seeds 0 1 2] [--arms plain] [--quick]`."""

from __future__ import annotations

from studies.command_line import CONFIGS, run_and_report, study_parser
from studies.warps import ARMS, QUICK, run_study


def main() -> None:
    args = study_parser(__doc__, "warps_study", ARMS, QUICK).parse_args()
    configs = CONFIGS / "classification"
    run_and_report(args, lambda options: run_study(configs, args.work_dir, args.seeds, args.arms, options))


if __name__ == "__main__":
    main()
