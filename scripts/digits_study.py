"""Plain against deformable on warped handwritten digits: `python scripts/digits_study.py [--seeds 0 1 2]`."""

from __future__ import annotations

from studies.command_line import CONFIGS, run_and_report, study_parser
from studies.digits import run_study


def main() -> None:
    parser = study_parser(__doc__, "digits_study")
    parser.add_argument("--upright-arms", action="store_true", help="also fine-tune both networks without warps")
    args = parser.parse_args()
    configs = CONFIGS / "classification"
    run_and_report(args, lambda options: run_study(configs, args.work_dir, args.seeds, args.upright_arms, options))


if __name__ == "__main__":
    main()
