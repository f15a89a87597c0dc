"""Time the operators against their peers, interleaved in one process, and write medians and ratios.

    python benchmarks/run.py              # CPU, one thread and all threads
    python benchmarks/run.py --quick      # two shapes of each family
    python benchmarks/run.py --family roi_pool
    python benchmarks/run.py --device cuda

Each shape is checked against torchvision before it is timed. Rounds alternate between the contestants, so that a noisy
machine disturbs them alike; a ratio is the median over rounds. With one thread, CPU time of the thread is counted.
"""

import argparse
import json
from pathlib import Path
from types import ModuleType

import conv
import roi
import torch
from harness import describe

FAMILIES = {module.NAME: module for module in (conv, roi)}


def markdown(result: dict, family: ModuleType) -> str:
    about = result["about"]
    lines = [
        f"# {family.NAME} on {about['device']}",
        "",
        f"`{result['command']}`, {about['date']}; torch {about['torch']}, torchvision {about['torchvision']}, "
        f"dcn_plugin {about['dcn_plugin']}; {result['dtype']}; {family.ABOUT}",
        "",
        f"Milliseconds are medians over alternating rounds; {family.COLUMNS}",
    ]
    for threads, rows in result["rows"].items():
        head = ["shape", "layout", "task", *family.figures(rows[0])]
        lines += ["", f"## {threads}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in rows:
            cells = [row["shape"], row["layout"], row["task"], *family.figures(row).values()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(family: ModuleType, args: argparse.Namespace) -> None:
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    options = (f" --family {family.NAME}" if args.family else "") + (" --device cuda" if cuda else "")
    result = {
        "about": describe(args.device),
        "dtype": str(dtype).removeprefix("torch."),
        "command": "python benchmarks/run.py" + options,
        "rows": {},
    }
    for count in [1] if cuda else args.threads or sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(count)
        title = "GPU" if cuda else f"{count} thread{'s' * (count > 1)}"
        rows = result["rows"][title] = []
        for shape in family.QUICK if args.quick else family.SHAPES:
            found = family.rows_for(shape, args.device, dtype, args.rounds)
            rows += found
            for row in found:
                shown = "  ".join(f"{name} {value}" for name, value in family.figures(row).items())
                print(f"{title:10} {row['shape']:46} {row['layout']:14} {row['task']:17} {shown}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{family.NAME}-{args.device}" + ("-quick" if args.quick else "")
    (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1))
    (args.out / f"{stem}.md").write_text(markdown(result, family))
    print(f"wrote {args.out / stem}.json and .md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one family of operators (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes of each family, under a minute")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", help="CPU thread counts (default: 1 and all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and Markdown"
    )
    args = parser.parse_args()
    all_threads = torch.get_num_threads()
    for name, family in FAMILIES.items():
        if args.family in (None, name):
            torch.set_num_threads(all_threads)
            run(family, args)


if __name__ == "__main__":
    main()
