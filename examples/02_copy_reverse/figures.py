"""The figure: what each head reads while a string is copied and said backwards."""

from pathlib import Path

import mixhead
import torch
from matplotlib import pyplot as plt
from model import CopyReverse
from sequences import Alphabet, draw
from shared.figures import save_figure

TITLES = (
    ("layer 1, head 1: the last boundary", "layer 1, head 2: the payload's end"),
    ("layer 2, head 1: the element to copy", "layer 2, head 2: the element, backwards"),
)


@torch.no_grad()
def draw_reads(model: CopyReverse, alphabet: Alphabet, path: Path, seed: int) -> None:
    length = 10
    batch = draw(alphabet, length, 1, torch.Generator().manual_seed(seed))
    _, reads = model(batch.tokens)
    marks = {alphabet.start: "S", alphabet.copy: "C", alphabet.reverse: "R", alphabet.end: "E"}
    names = [marks.get(token, str(token)) for token in batch.tokens[0].tolist()]
    figure, axes = plt.subplots(2, 2, figsize=(11, 11), layout="constrained")
    for layer in range(2):
        query, key, lse = reads[3 * layer : 3 * layer + 3]
        weights = (query @ key.transpose(2, 3) - lse.unsqueeze(3)).exp()[0].tril()
        for head in range(2):
            axis = axes[layer, head]
            mixhead.plot.reads(weights, head=head, tokens=names, vmax=1, ax=axis)
            axis.set_title(TITLES[layer][head], loc="left", fontsize=10)
            for boundary in (length + 0.5, 2 * length + 1.5):
                axis.axhline(boundary, color="0.7", linewidth=0.8)
                axis.axvline(boundary, color="0.7", linewidth=0.8)
    save_figure(figure, path)
