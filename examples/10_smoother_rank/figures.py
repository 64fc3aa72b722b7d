"""The figures: singular values of the smoothers, errors against the best of their rank."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from shared.example import atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"linear": "#c2410c", "wide": "#0f766e", "softmax": "#0369a1"}
LABELS = {
    "linear": "linear part, one channel a head",
    "wide": "linear part, wide heads",
    "softmax": "softmax",
}


def save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_ranks(spectra: dict, path: Path) -> None:
    """Singular values of the deviation from uniform, over the largest; the line is rank h."""
    figure, axes = plt.subplots(
        1, len(spectra), figsize=(2.6 * len(spectra), 3.2), sharey=True, layout="constrained"
    )
    for axis, (heads, matrices) in zip(axes, spectra.items(), strict=True):
        for name, values in matrices.items():
            shown = (values / values[0])[: 3 * max(spectra)].clamp(min=1e-18)
            axis.semilogy(
                range(1, len(shown) + 1), shown, ".-", markersize=3, linewidth=0.8,
                color=COLORS[name], label=LABELS[name],
            )  # fmt: skip
        axis.axvline(heads + 0.5, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(f"{heads} head{'s' if heads > 1 else ''}", loc="left", fontsize=10)
        axis.set(xlabel="number of the singular value")
    axes[0].set(ylabel="singular value over the largest")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def draw_errors(errors: dict, points: list[tuple[float, float]], slope: float, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    heads = list(errors)
    bound = [of["bound"] for of in errors.values()]
    left.semilogy(
        heads, bound, "-", color="0.6", linewidth=5, label="best of rank h (Eckart-Young)"
    )
    left.semilogy(
        heads, [of["trained"] for of in errors.values()], "o-", color=COLORS["linear"],
        label="trained heads, a weight for each digit",
    )  # fmt: skip
    left.semilogy(
        heads, [of["pixels"] for of in errors.values()], "s-", color=COLORS["softmax"],
        label="trained heads that see the pixels",
    )  # fmt: skip
    left.set(xlabel="heads", ylabel="error, Frobenius norm")
    left.set_title("Heads as the digits' Gaussian kernel smoother", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    right.loglog(*zip(*points, strict=True), "o-", color=COLORS["softmax"])
    right.set(xlabel="largest score", ylabel="softmax minus its linear part")
    right.set_title(f"Leaving the linear part: slope {slope:.3f}", loc="left", fontsize=10)
    save(figure, path)
