"""The figures: how the gates moved, and what each head reads."""

from pathlib import Path

import matplotlib
import torch
from citations import QUESTIONS
from matplotlib import pyplot as plt
from shared.figures import save_figure
from torch import Tensor

COLORS = ("#c2410c", "#0369a1", "#0f766e")
COLUMNS = 72


def draw_gates(course: list[list[float]], gate: Tensor, path: Path) -> None:
    """`course`: rows [step, gate of each question]; `gate` (N, 3): of test texts after training."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.8), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    steps, *curves = zip(*course, strict=True)
    for curve, question, color in zip(curves, QUESTIONS, COLORS, strict=True):
        left.plot(steps, curve, color=color, label=f"{question}?", linewidth=2)
    left.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
    left.set(xlabel="training step", ylabel="gate", ylim=(-0.03, 1.03), xlim=(0, steps[-1]))
    left.set_title("The gate of each question while training", loc="left", fontsize=10)
    left.legend(frameon=False, loc="center right")
    for number, color in enumerate(COLORS):
        jitter = torch.rand(len(gate), generator=torch.Generator().manual_seed(number)) - 0.5
        right.scatter(number + 0.7 * jitter, gate[:, number], s=3, color=color, alpha=0.3)
    right.set_xticks(range(3), [f"{question}?" for question in QUESTIONS])
    right.set_title(f"... and afterwards, in {len(gate)} unseen texts", loc="left", fontsize=10)
    right.annotate("look up: reads the memory", (1.5, 0.97), ha="center", color="0.35")
    right.annotate("think: reads the text", (1.5, 0.09), ha="center", color="0.35")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_text(axis, text: str, weights: Tensor, color: str) -> None:
    """The text in lines, each character on a ground as dark as its weight."""
    ground = matplotlib.colors.LinearSegmentedColormap.from_list("ground", ["white", color])
    shade = (weights / weights.max().clamp(min=1e-9)).sqrt() * weights.sum().clamp(max=1)
    for place, character in enumerate(text):
        row, column = divmod(place, COLUMNS)
        axis.add_patch(
            plt.Rectangle(
                (column, -row), 1, 1, color=ground(0.75 * float(shade[place])), linewidth=0
            )
        )
        axis.text(
            column + 0.5,
            0.5 - row,
            character,
            ha="center",
            va="center",
            fontsize=6,
            family="monospace",
        )
    axis.set(xlim=(0, COLUMNS), ylim=(-((len(text) - 1) // COLUMNS), 1.05))
    axis.axis("off")


def draw_reads(text: str, finder: Tensor, mixer: Tensor, entries: list[str], path: Path) -> None:
    """One text: what each head of the finder (H, 3, L) and the mixer (H, 3, L + M) reads."""
    heads = len(finder)
    length = finder.size(-1)
    figure = plt.figure(figsize=(14, 1.2 + 0.95 * 3 * heads), layout="constrained")
    rows = figure.subfigures(3, 1)
    for number, (question, color) in enumerate(zip(QUESTIONS, COLORS, strict=True)):
        rows[number].suptitle(f"{question}?", x=0.005, ha="left", color=color, weight="bold")
        axes = rows[number].subplots(heads, 3, width_ratios=(5, 5, 3), squeeze=False)
        for head in range(heads):
            draw_text(axes[head, 0], text, finder[head, number, : len(text)], color)
            in_text = mixer[head, number, : len(text)]
            draw_text(axes[head, 1], text, in_text, color)
            in_memory = mixer[head, number, length:]
            share = float(in_memory.sum())
            axes[head, 0].set_title(f"finder, head {head + 1}", loc="left", fontsize=8)
            axes[head, 1].set_title(
                f"mixer, head {head + 1}: {1 - share:.2f} in the text", loc="left", fontsize=8
            )
            top = in_memory.topk(min(4, len(entries)))
            axis = axes[head, 2]
            axis.barh(range(len(top.values)), top.values, color=color, alpha=0.6)
            for bar, slot in enumerate(top.indices.tolist()):
                axis.text(0.02, bar, entries[slot], va="center", fontsize=7)
            axis.set(xlim=(0, 1), xticks=(0, 1), yticks=())
            axis.invert_yaxis()
            axis.tick_params(labelsize=6)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.set_title(f"... and {share:.2f} in the memory", loc="left", fontsize=8)
    save_figure(figure, path)
