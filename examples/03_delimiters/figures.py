"""The figures: clauses of unseen English, and how sure the heads are of every period."""

from pathlib import Path

import english
import torch
from matplotlib import pyplot as plt
from model import DelimiterHeads
from shared.figures import save_figure

GROUNDS = ("#fde2cf", "#d4e6f4")
COLORS = ("#c2410c", "#0369a1", "#0f766e")
COLUMNS = 90


@torch.no_grad()
def draw_clauses(model: DelimiterHeads, text: english.Text, path: Path, length: int = 900) -> None:
    """The stretch with the most marks that end nothing: ground by clause, delimiters found."""
    mark = torch.isin(text.characters, torch.tensor([ord(c) for c in ".?!"], dtype=torch.uint8))
    inside = (mark & ~text.delimiters[:, english.STOP]).float().cumsum(0)
    length = min(length, len(inside) - 1)
    start = int((inside[length:] - inside[:-length]).argmax()) + 1
    characters = text.characters[start : start + length]
    scores, pointers = model(characters.unsqueeze(0))
    found = scores[0] > 0
    clause = pointers[0, 0].unique(return_inverse=True)[1]
    rows = -(-length // COLUMNS)
    figure, axis = plt.subplots(figsize=(13, 0.3 * rows + 0.6))
    for place, code in enumerate(characters.tolist()):
        row, column = divmod(place, COLUMNS)
        ground = GROUNDS[int(clause[place]) % 2]
        axis.add_patch(plt.Rectangle((column, -row), 1, 0.9, color=ground, linewidth=0))
        kinds = [kind for kind in range(3) if found[kind, place]]
        character = chr(code) if code != ord("\n") else "¶"
        axis.text(
            column + 0.5, 0.4 - row, character, ha="center", va="center", family="monospace",
            fontsize=9, color=COLORS[kinds[-1]] if kinds else "0.15",
            weight="bold" if kinds else "normal",
        )  # fmt: skip
    for kind, name in enumerate(english.NAMES):
        axis.text(12 * kind, 1.3, name, color=COLORS[kind], weight="bold", fontsize=9)
    axis.set(xlim=(0, COLUMNS), ylim=(-rows + 0.9, 2))
    axis.axis("off")
    save_figure(figure, path)


@torch.no_grad()
def draw_scores(model: DelimiterHeads, text: english.Text, window: int, path: Path) -> None:
    """The full-stop head's scores of the held-out documents' marks."""
    characters, truth = english.windows(text, window)
    scores = torch.cat([model.scores(part)[:, english.STOP] for part in characters.split(64)])
    mark = torch.isin(characters, torch.tensor([ord(c) for c in ".?!"], dtype=torch.uint8))
    final = truth[..., english.STOP]
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    bins = torch.linspace(float(scores[mark].min()), float(scores[mark].max()), 60).tolist()
    for chosen, color, name in (
        (mark & ~final, COLORS[0], "ends nothing"),
        (final, COLORS[1], "ends a sentence"),
    ):
        axis.hist(scores[chosen].tolist(), bins=bins, color=color, alpha=0.6, label=name)
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.set(yscale="log", xlabel="score of the full-stop head", ylabel="marks . ? !")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(figure, path)
