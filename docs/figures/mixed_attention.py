"""Draws docs/figures/mixed_attention.png: what one mixed-attention head reads and how it mixes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SEQUENCE, MEMORY, GATE = "#22272e", "#3b7dd8", "#d9822b", "#4a9d5b"


def box(axes, x, y, width, height, color, text, size=11, fill=0.14):
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=(*matplotlib.colors.to_rgb(color), fill),
            edgecolor=color,
            linewidth=1.6,
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=INK)


def arrow(axes, start, end, color=INK, bend=0.0):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            linewidth=1.6,
            color=color,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=2,
            shrinkB=2,
        )
    )


def cells(axes, x, y, count, color, shades):
    for i in range(count):
        axes.add_patch(
            plt.Rectangle(
                (x + 0.42 * i, y),
                0.36,
                0.5,
                facecolor=(*matplotlib.colors.to_rgb(color), shades[i % len(shades)]),
                edgecolor=color,
                linewidth=1.0,
            )
        )


def draw(path):
    figure, axes = plt.subplots(figsize=(9.2, 3.9), dpi=160)
    axes.set(xlim=(0, 13.2), ylim=(0, 5.6))
    axes.axis("off")

    box(axes, 0.2, 2.3, 1.5, 1.0, INK, "query", fill=0.05)

    axes.text(2.6, 5.3, "the sequence: S keys and values", color=SEQUENCE, size=10.5, va="center")
    cells(axes, 2.6, 4.5, 8, SEQUENCE, [0.1, 0.15, 0.75, 0.2, 0.1, 0.4, 0.1, 0.1])
    axes.text(
        2.6, 0.3, "the memory: M slots, thousands or millions", color=MEMORY, size=10.5, va="center"
    )
    cells(axes, 2.6, 0.65, 14, MEMORY, [0.08, 0.1, 0.08, 0.08, 0.12, 0.08, 0.8, 0.1, 0.08, 0.3])

    box(axes, 6.7, 3.35, 2.2, 0.9, SEQUENCE, "$A_s,\\ l_s$")
    box(axes, 6.7, 1.5, 2.2, 0.9, MEMORY, "$A_m,\\ l_m$")
    arrow(axes, (1.75, 2.95), (6.65, 3.75), SEQUENCE)
    arrow(axes, (1.75, 2.65), (6.65, 1.95), MEMORY)
    arrow(axes, (5.4, 4.45), (6.65, 4.0), SEQUENCE)
    arrow(axes, (5.4, 1.2), (6.65, 1.65), MEMORY)
    axes.text(4.2, 3.72, "softmax", color=SEQUENCE, size=9.5, ha="center", rotation=9)
    axes.text(4.2, 1.93, "softmax", color=MEMORY, size=9.5, ha="center", rotation=-8)

    box(axes, 10.2, 2.2, 2.8, 1.4, GATE, "$(1-w)\\,A_s + w\\,A_m$", size=12)
    arrow(axes, (8.95, 3.75), (10.15, 3.15), SEQUENCE)
    arrow(axes, (8.95, 1.95), (10.15, 2.65), MEMORY)
    axes.text(11.6, 4.75, "gate:  $w = \\sigma(mix)$", size=10.5, ha="center", color=INK)
    axes.text(
        11.6, 4.2, "joint:  $w = \\sigma(mix + l_m - l_s)$", size=10.5, ha="center", color=INK
    )
    axes.text(11.6, 1.7, "output", size=10.5, ha="center", color=GATE)

    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
