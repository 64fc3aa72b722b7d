"""Choosing a bandwidth by leave-one-out: KernelRegressor against statsmodels' KernelReg.

statsmodels takes many seconds for one search, so its search is timed once, and ours is the median
of searches before and after it. Both begin from the data alone; the note has the leave-one-out
errors that both end at.
"""

import statistics
import time
import warnings
from collections.abc import Iterator

import mixhead
import numpy as np
from harness import Ceilings, Result

POINTS = 2000


def data(columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (POINTS, columns))
    return X, np.sin(2 * X[:, 0]) + X[:, -1] + 0.3 * rng.normal(size=POINTS)


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def search(ceilings: Ceilings) -> Iterator[Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what statsmodels says of its own future
        from statsmodels.nonparametric.kernel_regression import KernelReg

        for columns, degree, goal in ((1, 0, 300.0), (2, 0, 300.0), (1, 1, None)):
            X, y = data(columns)
            regression = "ll" if degree else "lc"

            def ours(X=X, y=y, degree=degree):
                return mixhead.KernelRegressor(degree=degree, bandwidth="loo").fit(X, y)

            ours()
            mine = [timed(ours)[0] for _ in range(5)]
            peer_seconds, model = timed(
                lambda X=X, y=y, regression=regression: KernelReg(
                    y, X, "c" * X.shape[1], reg_type=regression, bw="cv_ls"
                )
            )
            found = [timed(ours) for _ in range(5)]
            seconds = statistics.median(mine + [each for each, _ in found])
            error = found[0][1].loo_error_
            theirs = mixhead.KernelRegressor(degree=degree, bandwidth=model.bw).fit(X, y).loo_error_
            yield Result(
                "LOO bandwidth search", f"n = {POINTS}, d = {columns}, {regression}", "float64",
                "statsmodels", peer_seconds, seconds, peer_seconds / seconds, goal,
                note=f"error {error:.6f}, theirs {theirs:.6f}",
            )  # fmt: skip


GROUPS = {"regression": search}
