"""Fine-tune, validate, test or predict with a config: `python scripts/finetune.py CONFIG [--cfg-options k=v ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dcn_plugin.finetune import load_config, run
from dcn_plugin.finetune.command_line import add_options, errors_in_one_line, parse_options
from dcn_plugin.finetune.run import ACTIONS, quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file, such as configs/classification/resnet10-dcn_digits-warped.py")
    parser.add_argument("--task", choices=ACTIONS, default="fit")
    parser.add_argument("--work-dir", help="default: work_dirs/<name of the config>")
    parser.add_argument("--resume", nargs="?", const="auto", help="continue from a checkpoint, or from last.ckpt")
    parser.add_argument("--checkpoint", help="checkpoint to validate, test or predict with (default: best.ckpt)")
    add_options(parser, "overrides, e.g. trainer.max_epochs=3")
    args = parser.parse_args()
    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}")
    checkpoint = args.resume if args.task == "fit" else args.checkpoint
    if args.task != "fit" and checkpoint is None and (work_dir / "best.ckpt").is_file():
        checkpoint = work_dir / "best.ckpt"
    with errors_in_one_line():
        config = load_config(args.config, parse_options(args.cfg_options))
        try:
            with quiet():
                results = run(config, work_dir, args.task, checkpoint)
        except SIGTERMException:
            sys.exit("stopped by SIGTERM; the same command with --resume continues from last.ckpt")
        except SystemExit:  # Lightning's answer to Ctrl+C, without a word where its remarks are hidden
            sys.exit("interrupted; the same command with --resume continues from last.ckpt")
    if rank_zero_only.rank != 0:
        return
    for name, value in results.items():
        print(f"{name:>12}  {value:.4f}" if isinstance(value, float) else f"{name:>12}  {value}")


if __name__ == "__main__":
    main()
