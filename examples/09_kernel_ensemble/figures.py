"""The figures: errors side by side, diversity against gain, which inputs a head reads."""

from pathlib import Path

import matplotlib
import torch
from data import Regression
from ensemble import KernelEnsemble
from matplotlib.figure import Figure
from shared.example import atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"single": "#6b7280", "ard": "#0369a1", "same": "#0f766e", "mixed": "#c2410c"}
LABELS = {
    "single": "best single kernel",
    "ard": "single kernel, a bandwidth an input",
    "same": "ensemble, the same kernel",
    "mixed": "ensemble, mixed kernels",
}


def save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_errors(
    regressions: list[Regression],
    errors: dict[str, dict[str, float]],
    ensembles: dict[str, KernelEnsemble],
    path: Path,
) -> None:
    """Test errors of each contender; the dots are the heads of the mixed ensemble, each alone."""
    figure, axes = plt.subplots(1, len(regressions), figsize=(10, 3.2), layout="constrained")
    for axis, data in zip(axes, regressions, strict=True):
        of = errors[data.name]
        axis.barh(
            [LABELS[key] for key in of], list(of.values()), color=[COLORS[key] for key in of],
            alpha=0.75,
        )  # fmt: skip
        alone = [data.error(head) for head in ensembles[data.name](data.test_inputs)]
        axis.scatter(alone, len(alone) * [LABELS["mixed"]], s=14, color="black", zorder=3)
        axis.set(xlabel="test error, in variances of the target")
        axis.set_title(data.name, loc="left", fontsize=10)
        axis.invert_yaxis()
    axes[1].set_yticks([])
    save(figure, path)


def draw_diversity(pairs: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(pairs), figsize=(10, 3.6), layout="constrained")
    for axis, (name, points) in zip(axes, pairs.items(), strict=True):
        axis.scatter(*zip(*points, strict=True), s=18, color=COLORS["mixed"], alpha=0.7)
        axis.set(
            xlabel="ambiguity of leave-one-out predictions", ylabel="share of error averaged away"
        )
        axis.set_title(f"{name}: {len(points)} random sets of projections", loc="left", fontsize=10)
    save(figure, path)


def draw_projections(model: KernelEnsemble, path: Path) -> None:
    """How strongly each head reads each input: the norm of its row of the projection."""
    strength = model.projection.detach().norm(dim=2)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    image = axis.imshow(strength, cmap="Oranges", aspect="auto", vmin=0)
    axis.set_yticks(range(len(model.kernels)), model.kernels)
    inputs = torch.arange(strength.size(1))
    axis.set_xticks(inputs, [f"x{number + 1}" for number in inputs.tolist()])
    axis.set_title("How strongly each head reads each input (x6 to x10 are noise)", fontsize=10)
    figure.colorbar(image, ax=axis, label="norm of the projection's row")
    save(figure, path)
