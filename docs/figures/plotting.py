"""Draws docs/figures/plotting.png: one layer that looks letters up, kernels, a fit, a matching."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import mixhead
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

LETTERS, DIGITS, WIDTH = 12, 10, 32
NAMES = [*"ABCDEFGHIJKL"[:LETTERS], *map(str, range(DIGITS))]


class Reader(torch.nn.Module):
    """A letter's meaning is in the memory, where it changes with every batch; a digit's is the
    token in front of it."""

    def __init__(self, length):
        super().__init__()
        self.token = torch.nn.Embedding(LETTERS + DIGITS, WIDTH)
        self.place = torch.nn.Parameter(0.3 * torch.randn(length, WIDTH))
        self.meaning = torch.nn.Embedding(LETTERS + DIGITS, WIDTH)
        self.head = mixhead.MixedMultiheadAttention(WIDTH, 2, batch_first=True, gate="token")
        self.answer = torch.nn.Linear(WIDTH, LETTERS + DIGITS)

    def forward(self, tokens, meanings):
        self.x = self.token(tokens) + self.place
        memory = self.token(torch.arange(LETTERS)) + self.meaning(meanings)
        heads, weights = self.head(
            self.x, self.x, self.x, average_attn_weights=False, memory=memory
        )
        return self.answer(heads), weights


def batch(size, length):
    tokens = torch.randint(LETTERS + DIGITS, (size, length))
    meanings = torch.randint(LETTERS + DIGITS, (LETTERS,))
    before = tokens.roll(1, 1)
    looked_up = meanings[tokens.clamp(max=LETTERS - 1)]
    return tokens, meanings, torch.where(tokens < LETTERS, looked_up, before)


def trained_reader(length, steps=1200):
    reader = Reader(length)
    optimizer = torch.optim.AdamW(mixhead.recommended_parameter_groups(reader, lr=5e-3))
    for _ in range(steps):
        tokens, meanings, target = batch(32, length)
        answer, _ = reader(tokens, meanings)
        loss = F.cross_entropy(answer.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader


def draw(path):
    torch.manual_seed(0)
    reader = trained_reader(length=14)
    tokens, meanings, target = batch(1, 14)
    with torch.no_grad():
        answer, weights = reader(tokens, meanings)
    print(f"{(answer.argmax(-1) == target).sum()} of {target.numel()} answers are right")
    names = [NAMES[token] for token in tokens[0]]

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained", dpi=130)
    top, bottom = axes
    facts = [f"{NAMES[i]}={NAMES[meaning]}" for i, meaning in enumerate(meanings)]
    mixhead.plot.reads(weights, ax=top[:2], tokens=names, memory=facts)
    mixhead.plot.gates(reader.head, reader.x[0], ax=top[2], tokens=names)
    top[2].set_title("gates: letters look up, digits do not", loc="left", fontsize=10)

    kernels = ["gaussian", "laplacian", "epanechnikov", "cauchy"]
    mixhead.plot.kernels(kernels, [1.0, 0.5, 2.0, 0.3], ax=bottom[0])
    rng = np.random.default_rng(3)
    X = np.sort(rng.uniform(0, 1, (120, 1)), axis=0)
    y = np.sin(2.2 * np.pi * X[:, 0] ** 2) + 0.25 * rng.normal(size=120)
    mixhead.plot.fit(mixhead.KernelRegressor(degree=1).fit(X, y), X, y, ax=bottom[1])
    jobs, candidates = torch.randn(2, 16, 3).unbind()
    layer = mixhead.SoftAssignment([3])
    mixhead.plot.assignment(layer.log_plan(jobs, candidates).exp(), ax=bottom[2])
    bottom[2].set(xlabel="candidate", ylabel="job")
    for ax, title in zip(bottom, ("kernels", "fit", "assignment"), strict=True):
        ax.set_title(title, loc="left", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
