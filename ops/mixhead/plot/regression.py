"""A fitted regression with its interval."""

from statistics import NormalDist

import numpy as np

from mixhead.plot.frame import GREY, check_axes, new_axes

_LINE = "#3b7dd8"


def fit(regressor, X, y, *, ax=None, column=0, target=0, confidence=0.95, points=200):
    """Draw data, the fitted regression along one column, and its pointwise confidence interval.

    The interval is the prediction plus and minus its standard error times the normal quantile: for
    the mean, not for new observations, and without the bias of smoothing. Columns other than
    ``column`` are held at their medians.

    Args:
        regressor: a fitted `mixhead.KernelRegressor`.
        X, y: the data to draw, ``(n, d)`` and ``(n,)`` or ``(n, t)``.
        ax: matplotlib axes to draw into; a new figure's where None.
        column: the column of X along the horizontal axis.
        target: the column of y, where it has several.
        confidence: of the interval, between 0 and 1; None for no interval.
        points: at how many places the regression is drawn.

    Returns:
        The axes.

    Example:
        >>> fitted = mixhead.KernelRegressor(degree=1).fit(X, y)
        >>> mixhead.plot.fit(fitted, X, y).figure.savefig("fit.png")
    """
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"plot.fit: confidence must be between 0 and 1, got {confidence}")
    ax = new_axes() if ax is None else check_axes("fit", ax)[0]
    frame, X, y = X, np.asarray(X), np.asarray(y)
    grid = np.tile(np.median(X, axis=0), (points, 1))
    grid[:, column] = np.linspace(X[:, column].min(), X[:, column].max(), points)
    named = type(frame)(grid, columns=frame.columns) if hasattr(frame, "columns") else grid
    mean, deviation = (
        part if part.ndim == 1 else part[:, target]
        for part in regressor.predict(named, return_std=True)
    )
    ax.scatter(X[:, column], y if y.ndim == 1 else y[:, target], s=10, color=GREY, linewidths=0)
    if confidence is not None:
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * deviation
        ax.fill_between(
            grid[:, column], mean - half, mean + half, color=_LINE, alpha=0.2, linewidth=0
        )
    ax.plot(grid[:, column], mean, color=_LINE, linewidth=2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
