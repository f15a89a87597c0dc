"""What alignment buys a recurrent network on moving digits: `python scripts/video_study.py [--seeds 0 1 2]`."""

from __future__ import annotations

from studies.command_line import run_and_report, study_parser
from studies.video import ARMS, run_study


def main() -> None:
    parser = study_parser(__doc__, "video_study", ARMS)
    parser.add_argument("--no-progress-bar", action="store_true")
    args = parser.parse_args()
    run_and_report(
        args, lambda options: run_study(args.work_dir, args.seeds, args.arms, options, not args.no_progress_bar)
    )


if __name__ == "__main__":
    main()
