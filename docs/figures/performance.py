"""How time grows with tokens and slots, and the rooflines of the two main kernels.

Drawn from performance.json, which holds the results of one run of benchmarks/run.py.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BYTES = {"float32": 4, "bfloat16": 2}
COLOURS = {"float32": "#3b7dd8", "bfloat16": "#d8593b"}


def work_of(shape: tuple[int, ...], dtype: str) -> tuple[float, float]:
    """(floating-point operations, bytes read or written once) of a forward."""
    batch, heads, rows, slots, depth = shape
    operations = 4.0 * batch * heads * depth * (rows * slots + rows * (rows + 1) / 2)
    numbers = heads * depth * (4 * batch * rows + 2 * slots)
    return operations, numbers * BYTES[dtype]


def draw_roofline(run: dict, axes) -> None:
    about = run["about"]
    low, high = 0.3, 3000.0
    for dtype, peak in about["multiply_gflops"].items():
        ridge = peak / about["read_gbs"]
        axes.plot(
            [low, ridge, high],
            [low * about["read_gbs"], peak, peak],
            color=COLOURS[dtype],
            label=f"{dtype}: sum reads {about['read_gbs']:.0f} GB/s, mm {peak:.0f} GFLOP/s",
        )
    names = {"gate forward": "dense", "one query": "one query"}
    drawn = set()
    for row in run["results"]:
        place = row["group"], row["work"], row["dtype"]
        if row["group"] not in names or row["peer"] != "two SDPA" or place in drawn:
            continue
        shape = tuple(json.loads(row["work"].replace("(", "[").replace(")", "]")))
        if row["group"] == "gate forward" and shape != (2, 8, 1024, 4096, 64):
            continue
        drawn.add(place)
        operations, size = work_of(shape, row["dtype"])
        at = operations / size, operations / row["seconds"] / 1e9
        axes.plot(*at, "o", color=COLOURS[row["dtype"]])
        side = "right" if at[0] > 100 else "left"
        label = f"{names[row['group']]}, batch {shape[0]}"
        axes.annotate(label, at, (0, -14), textcoords="offset points", ha=side)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.set_title("Forward against the machine's ceilings")
    axes.legend(fontsize=8)


def draw_growth(run: dict, axes) -> None:
    for row in run["results"]:
        if not row["group"].startswith("growth"):
            continue
        sizes, seconds = zip(*json.loads(row["note"]), strict=True)
        axes.plot(sizes, seconds, "o-", label=row["group"].removeprefix("growth "))
    ends = [sizes[0], sizes[-1]]
    axes.plot(
        ends, [seconds[-1] * end / ends[1] for end in ends], ":", color="grey", label="linear"
    )
    axes.set(xscale="log", yscale="log", xlabel="slots M or tokens L", ylabel="seconds")
    axes.set_title("Time against size, 64 queries or 64 keys, D = 64, float32")
    axes.legend(fontsize=8)


def main() -> None:
    run = json.loads((HERE / "performance.json").read_text())
    for name, draw in (("roofline", draw_roofline), ("growth", draw_growth)):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        draw(run, axes)
        figure.tight_layout()
        figure.savefig(HERE / f"{name}.png", dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
