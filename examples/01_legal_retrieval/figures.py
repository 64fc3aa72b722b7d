"""The figure: one document, and what either head reads in it."""

from pathlib import Path

import torch
from documents import PRECEDENT, STATUTE, Documents
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from model import Retriever
from shared.figures import save_figure
from torch import Tensor

NAMES = ("case", "statute")
COLORS = ("#c2410c", "#0369a1")
COLUMNS = 130


@torch.no_grad()
def draw_document(
    model: Retriever, documents: Documents, heads: tuple[int, int], length: int, path: Path
) -> None:
    """Citations in their type's color, on a ground as dark as the head's weight."""
    batch = documents.batch(1, length)
    _, weights = model(batch.strings, batch.tokens, batch.question, batch.citations)
    words = [bytes(row.tolist()).rstrip(b"\0").decode("latin-1") for row in batch.strings]
    tokens = [words[row] for row in batch.tokens[0].tolist()]
    figure, axes = plt.subplots(2, 1, figsize=(16, 13), layout="constrained")
    for kind, head in ((PRECEDENT, heads[0]), (STATUTE, heads[1])):
        cited = [set(batch.places[0, other].tolist()) for other in range(2)]
        draw_tokens(axes[kind], tokens, weights[0, head], cited, COLORS[kind])
        axes[kind].set_title(
            f"head {head + 1}: the {NAMES[kind]} for “{words[int(batch.question[0])]}”, "
            f"weight {float(weights[0, head, batch.places[0, kind, 0]]):.2f}",
            loc="left", color=COLORS[kind], fontsize=11,
        )  # fmt: skip
    save_figure(figure, path)


def draw_tokens(
    axis, tokens: list[str], weights: Tensor, cited: list[set[int]], color: str
) -> None:
    ground = LinearSegmentedColormap.from_list("ground", ["white", color])
    row, column = 0, 0
    for place, token in enumerate(tokens):
        if column + len(token) > COLUMNS:
            row, column = row + 1, 0
        weight = float(weights[place])
        if weight > 0.005:
            box = plt.Rectangle((column, -row - 0.5), len(token), 1, color=ground(weight**0.5))
            axis.add_patch(box)
        kind = next((kind for kind in range(2) if place in cited[kind]), None)
        shade = "0.6" if kind is None else "white" if weight > 0.3 else COLORS[kind]
        axis.text(
            column, -row, token, va="center", family="monospace", fontsize=11, color=shade,
            weight="normal" if kind is None else "bold",
        )  # fmt: skip
        column += len(token) + 1
    axis.set(xlim=(0, COLUMNS), ylim=(-row - 1, 1))
    axis.axis("off")
