"""The figures: fits with intervals, the course of a learned bandwidth, attention as regression."""

from pathlib import Path

import mixhead
import numpy as np
from matplotlib import pyplot as plt
from shared.figures import save_figure

DEGREES = ("Nadaraya-Watson", "local linear")


def draw_fits(data: dict, fits: dict, path: Path) -> None:
    """Each data set with both fits, at the bandwidth of least leave-one-out error."""
    figure, rows = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for axes, (name, (X, y, labels)) in zip(rows, data.items(), strict=True):
        for degree, axis in enumerate(axes):
            found = fits[name, degree]
            mixhead.plot.fit(found, X, y, ax=axis)
            axis.set(xlabel=labels[0], ylabel=labels[1])
            axis.set_title(
                f"{name}, {DEGREES[degree]}: h = {found.bandwidth_[0]:.4f}, "
                f"{found.effective_dof_:.1f} degrees of freedom",
                loc="left",
                fontsize=9,
            )
    save_figure(figure, path)


def draw_bandwidths(data: dict, fits: dict, courses: dict, path: Path) -> None:
    """The leave-one-out error over h, and the way of gradient descent to its minimum."""
    figure, axes = plt.subplots(1, len(data), figsize=(10, 3.6), layout="constrained")
    for axis, (name, (X, y, _)) in zip(axes, data.items(), strict=True):
        best = fits[name, 0]
        start = courses[name][0][0]
        grid = np.geomspace(best.bandwidth_[0] / 3, 1.3 * start, 60)
        errors = [mixhead.KernelRegressor(bandwidth=h).fit(X, y).loo_error_ for h in grid]
        axis.plot(grid, errors, color="0.6", label="leave-one-out error")
        axis.plot(*np.transpose(courses[name]), ".", color="#d9822b", label="learned, step by step")
        axis.plot(
            best.bandwidth_[0], best.loo_error_, "o", color="#3b7dd8", label="KernelRegressor"
        )
        axis.set(xlabel="bandwidth h", ylabel="mean squared error")
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_attention(predictions: dict, path: Path) -> None:
    """What attention answers against what kernel regression does, with and without the key bias."""
    figure, axis = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    smoothed = predictions["regression"].flatten()
    for name, color in (("no key bias", "#d9822b"), ("key bias", "#3b7dd8")):
        axis.plot(smoothed, predictions[name].flatten(), ".", color=color, label=name)
    axis.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    axis.set(
        xlabel="gaussian kernel regression, $h^2 = \\sqrt{d}$",
        ylabel="scaled dot-product attention",
    )
    axis.set_title("diabetes, held-out patients", loc="left", fontsize=10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
