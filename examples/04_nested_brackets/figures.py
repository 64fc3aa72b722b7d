"""The figures: a string peeled layer by layer, the grid of layers and depths, what was learned."""

import math
from pathlib import Path

import torch
from brackets import PYTHON_BRACKETS, python_bracket_ids
from matplotlib import colormaps
from matplotlib import pyplot as plt
from peeling import Peeler, PeelLayer
from shared.figures import save_figure
from torch import Tensor

COLORS = colormaps["viridis"]


def draw_peeling(peeler: Peeler, text: str, types: int, path: Path) -> None:
    """What is left of `text` after each layer; the pairs as arcs in the color of their layer."""
    ids = python_bracket_ids(types)
    tokens = torch.tensor([[ids.get(character, 0) for character in text]])
    layers = len(text) // 2
    survivors, partner = peeler(tokens, layers)
    depth = int(survivors.any(-1).sum()) if not survivors[-1].any() else layers
    figure, (arcs, rows) = plt.subplots(
        2, 1, figsize=(0.16 * len(text), 1.6 + 0.3 * depth), sharex=True, height_ratios=(2, 3)
    )
    for opening, closing in enumerate(partner[0].tolist()):
        if closing > opening:
            layer = int(survivors[:, 0, opening].sum())
            angle = torch.linspace(0, math.pi, 60)
            x = (opening + closing) / 2 - (closing - opening) / 2 * angle.cos()
            arcs.plot(
                x, layer * angle.sin(), color=COLORS((layer - 1) / max(1, depth)), linewidth=1.5
            )
    for layer in range(depth + 1):
        for place, character in enumerate(text):
            bracket = int(tokens[0, place]) > 0
            if bracket and not survivors[layer, 0, place]:
                continue
            going = bracket and layer < depth and not survivors[layer + 1, 0, place]
            rows.text(
                place, -layer, character, ha="center", va="center", family="monospace", fontsize=8,
                color=COLORS(layer / max(1, depth)) if going else "0.2" if bracket else "0.75",
                weight="bold" if going else "normal",
            )  # fmt: skip
    arcs.axis("off")
    rows.set(ylim=(-depth - 0.6, 0.6), yticks=range(0, -depth - 1, -1), xticks=())
    rows.set_yticklabels([f"after {layer}" if layer else "text" for layer in range(depth + 1)])
    rows.tick_params(length=0)
    rows.spines[:].set_visible(False)
    arcs.set_title("Each layer removes the innermost pairs", loc="left", fontsize=10)
    save_figure(figure, path)


def draw_grid(accepted: Tensor, path: Path) -> None:
    """accepted (layers, depths): the share of well-formed strings that nothing is left of."""
    layers, depths = accepted.shape
    figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    image = axis.imshow(accepted, origin="lower", vmin=0, vmax=1, cmap="viridis")
    axis.plot([-0.5, min(layers, depths) - 0.5], [-0.5, min(layers, depths) - 0.5], "w--")
    axis.set(xlabel="depth of nesting", ylabel="layers")
    axis.set_xticks(range(depths), range(1, depths + 1))
    axis.set_yticks(range(layers), range(1, layers + 1))
    axis.set_title("Share accepted", loc="left", fontsize=10)
    figure.colorbar(image, shrink=0.8)
    save_figure(figure, path)


def draw_learned(layer: PeelLayer, types: int, path: Path) -> None:
    """Which bracket closes which, by the learned layer."""
    embedded = layer.embedding.weight.detach()[1:]
    score = torch.sigmoid(embedded @ layer.pair.detach() @ embedded.T + layer.bias.detach())
    names = [PYTHON_BRACKETS[i] if types == 3 else str(i % types + 1) for i in range(2 * types)]
    figure, axis = plt.subplots(figsize=(4.2, 3.8), layout="constrained")
    image = axis.imshow(score, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(2 * types), names)
    axis.set_yticks(range(2 * types), names)
    axis.set(xlabel="right neighbour", ylabel="bracket")
    axis.set_title("Learned: probability that the two are a pair", loc="left", fontsize=10)
    figure.colorbar(image, shrink=0.8)
    save_figure(figure, path)
