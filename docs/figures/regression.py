"""Draws docs/figures/regression.png: one data set, both degrees, and how a bandwidth is chosen."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import mixhead
import numpy as np
from matplotlib import pyplot as plt


def data():
    """A smooth curve that ends steeply at the right, with noise."""
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(0, 1, 120))
    return x[:, None], np.sin(2.2 * np.pi * x**2) + 1.5 * x + 0.25 * rng.normal(size=120)


def draw(path):
    X, y = data()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", dpi=150)
    for degree, axis in enumerate(axes[:2]):
        fit = mixhead.KernelRegressor(degree=degree).fit(X, y)
        mixhead.plot.fit(fit, X, y, ax=axis)
        axis.set_title(
            f"degree={degree}: bandwidth_ {fit.bandwidth_[0]:.3f}, effective_dof_ "
            f"{fit.effective_dof_:.1f}",
            loc="left",
            fontsize=9,
        )
    grid = np.geomspace(0.006, 0.3, 60)
    for degree, color in enumerate(("#d9822b", "#3b7dd8")):
        errors = [
            mixhead.KernelRegressor(bandwidth=h, degree=degree).fit(X, y).loo_error_ for h in grid
        ]
        axes[2].plot(grid, errors, color=color, label=f"degree={degree}")
        best = mixhead.KernelRegressor(degree=degree).fit(X, y)
        axes[2].plot(best.bandwidth_[0], best.loo_error_, "o", color=color)
    axes[2].set(xscale="log", xlabel="bandwidth", ylim=(0.05, 0.2))
    axes[2].set_title("leave-one-out error, and its minimum", loc="left", fontsize=9)
    axes[2].legend(frameon=False, loc="upper center")
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
