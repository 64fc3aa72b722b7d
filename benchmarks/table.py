"""The table of docs/performance.md from several runs of benchmarks/run.py.

    python benchmarks/table.py RUN ... > table.md

A RUN is a folder with one or more results.json below it. A line shows the ratio of each run and
the times of the last.
"""

import json
import sys
from pathlib import Path


def results_of(folder: Path) -> dict[tuple[str, ...], dict]:
    found = {}
    for path in sorted(folder.rglob("results.json")):
        for row in json.loads(path.read_text())["results"]:
            found[row["group"], row["work"], row["dtype"], row["peer"]] = row
    return found


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds else ""


def main() -> None:
    runs = [results_of(Path(folder)) for folder in sys.argv[1:]]
    print("| work | shape | dtype | against | its ms | ours | ratios | goal | roof | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for key, row in runs[-1].items():
        every = [run[key] for run in runs if key in run]
        goal = "" if row["goal"] is None else f"{row['goal']:.2g}"
        short = [each for each in every if not each["met"]]
        mark = "" if row["goal"] is None else f"short in {len(short)}" if short else "met"
        ratios = ", ".join(f"{each['ratio']:.2f}" for each in every)
        times = f"{milliseconds(row['peer_seconds'])} | {milliseconds(row['seconds'])}"
        group, work, dtype, peer = key
        roof = f"{row['roof']:.2f}" if row.get("roof") else ""
        line = [group, work, dtype, peer, times, ratios, goal, roof, mark]
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
