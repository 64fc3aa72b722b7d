"""Measure every row of the table and say which goals are met.

    python benchmarks/run.py [--groups dense one_query ...] [--time-scale 0.3] [--out build/bench]

Ends with the table and exit code 1 where a ratio falls short of its goal by more than 10 %.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import growth
import harness
import kernel_attention
import matching
import mixed_attention
import regression
import topk_keys
import torch
from harness import Ceilings, Result
from tqdm import tqdm

GROUPS = (
    mixed_attention.GROUPS
    | kernel_attention.GROUPS
    | growth.GROUPS
    | regression.GROUPS
    | topk_keys.GROUPS
    | matching.GROUPS
)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def line_of(result: Result) -> str:
    goal = "" if result.goal is None else f"{result.goal:.2f}"
    roof = "" if result.roof is None else f"{result.roof:.2f}"
    mark = "" if result.goal is None else ("met" if result.met else "SHORT")
    peer = f"{result.peer_seconds * 1e3:10.2f}" if result.peer_seconds else " " * 10
    note = result.note if len(result.note) < 60 else ""
    return (
        f"{result.group:32} {result.work:24} {result.dtype:9} {result.peer:14} {peer}"
        f" {result.seconds * 1e3:10.3f} {result.ratio:7.2f} {goal:>6} {roof:>6} {mark:5} {note}"
    )


HEADER = (
    f"{'work':32} {'shape':24} {'dtype':9} {'peer':14} {'peer ms':>10} {'ours ms':>10} "
    f"{'ratio':>7} {'goal':>6} {'roof':>6}"
)


def draw(results: list[Result], path: Path) -> None:
    """Each ratio as a bar over its goal: 1 is the goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [result for result in results if result.goal]
    figure, axes = plt.subplots(figsize=(10, 0.24 * len(shown) + 1))
    axes.barh(
        range(len(shown)),
        [result.ratio / result.goal for result in shown],
        color=["#3b7dd8" if result.met else "#d8593b" for result in shown],
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(
        range(len(shown)),
        [f"{r.group} {r.work} {r.dtype} vs {r.peer}" for r in shown],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlabel("ratio / goal (1 = goal reached)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=sorted(GROUPS), default=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--time-scale", type=float, default=1.0, help="of the measuring time")
    arguments = parser.parse_args()
    harness.time_scale = arguments.time_scale
    ceilings = Ceilings.measure()
    about = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "multiply_gflops": ceilings.multiply,
        "read_gbs": ceilings.read,
    }
    print(json.dumps(about))
    results: list[Result] = []
    print(HEADER)
    for name in tqdm(arguments.groups, disable=not sys.stderr.isatty()):
        for result in GROUPS[name](ceilings):
            results.append(result)
            print(line_of(result), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"about": about, "results": [result.as_dict() for result in results]}
    (arguments.out / "results.json").write_text(json.dumps(report, indent=1))
    draw(results, arguments.out / "ratios.png")
    short = [result for result in results if result.failed]
    print(f"\n{len(results)} rows, {len(short)} short of their goal by more than 10 %")
    for result in short:
        print(line_of(result))
    print(f"Figures and picture: {arguments.out}/results.json, {arguments.out}/ratios.png")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
