"""The search for the bandwidth that minimises a criterion."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from mixhead.regression.criteria import aicc, deviations, loo_error, silverman
from mixhead.regression.descent import Descent, Minimum
from mixhead.regression.smoother import Smoother

#: Kernels of bounded support: a point that enters the window makes a kink or a jump in a criterion.
_COMPACT = ("epanechnikov", "tricube", "boxcar")
#: With more than four times as many points, the search begins with the criterion's estimate from
#: this many of them.
_SAMPLE = 256
#: So many bandwidths of the grid are judged at once.
_BATCH = 32
#: AICc, a logarithm, below which a fit counts as exact: its residuals are rounding errors, 1e-9 of
#: the targets' deviation.
_EXACT = -40.0
#: What Nelder-Mead is told where a criterion has no finite value.
_STEEP = 1e6


def search(
    smoother: Smoother, criterion: str, restarts: int, report: Callable[[Tensor, Tensor], None]
) -> Tensor:
    """The bandwidths of the columns that minimise ``"loo"`` or ``"aicc"``.

    A grid of multiples of Silverman's bandwidths finds the valleys, L-BFGS-B on log h their
    lowest points. Columns must vary. Several targets count alike, whatever their units; where
    all are constant any bandwidth fits, and Silverman's is taken. ``report`` is told values
    ``(...)`` found and their bandwidths ``(..., D)``.

    Raises:
        ValueError: no bandwidth has a value, as with AICc and too few points.
    """
    varying = (smoother.values != smoother.values[0]).any(0)
    if not varying.any():
        return _log_range(smoother)[0].exp()
    # Of residuals only, so free of the targets' origin, and made free of their units.
    values = smoother.values[:, varying]
    values = values - smoother.mean_of(values)
    values = values / smoother.mean_of(values.square()).sqrt()
    points, unit = smoother.points, torch.ones(())
    if smoother.kernel not in ("dot", "cosine"):  # a function of a distance
        unit = points.amax(0) - points.amin(0)
        points = (points - smoother.mean_of(points)) / unit

    def in_units(found: Tensor, bandwidth: Tensor) -> None:
        report(found, bandwidth * unit)

    with torch.enable_grad():
        search = _Search(replace(smoother, points=points, values=values), criterion, in_units)
        return search.run(restarts) * unit


def _log_range(smoother: Smoother) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of Silverman's bandwidths and of the narrowest and widest to consider ``(D,)``.

    From a tenth of the typical distance of neighbours, where a fit is its nearest point, to ten
    times the extent of the data, where it is flat (or of degree 1 a plane).
    """
    if smoother.kernel == "cosine":  # its bandwidth has no unit
        base = torch.ones(1, dtype=torch.float64)
        return base.log(), (0.01 * base).log(), (100.0 * base).log()
    points = smoother.points
    spacing = deviations(smoother) * smoother.total_weight ** (-1.0 / points.shape[1])
    extent = points.amax(0) - points.amin(0)
    return silverman(smoother).log(), (0.1 * spacing).log(), (10.0 * extent).log()


class _Estimate(NamedTuple):
    """A criterion in the smoother's dtype, from all points or the first of them."""

    smoother: Smoother
    sample: int | None = None


class _Search:
    def __init__(
        self, smoother: Smoother, criterion: str, report: Callable[[Tensor, Tensor], None]
    ) -> None:
        self.smoother, self.criterion, self.report = smoother, criterion, report
        self.log_base, self.low, self.high = _log_range(smoother)
        #: Logarithm of the ratio of neighbours in the grid.
        self.step = math.log(1.1 if smoother.kernel in _COMPACT else 1.5)

    def run(self, restarts: int) -> Tensor:
        exact, count = _Estimate(self.smoother), len(self.smoother.points)
        if count <= 4 * _SAMPLE:
            best = self._lowest(exact, self._starts(exact, restarts), 1e-13)
        else:
            rough = _in_random_order(replace(self.smoother, dtype=torch.float32))
            starts = self._starts(_Estimate(rough, _SAMPLE // 2), restarts)
            best = self._lowest(_Estimate(rough, _SAMPLE), starts, 1e-6)
            for estimate, tolerance in ((_Estimate(rough), 1e-8), (exact, 1e-9)):
                best = self._lowest(estimate, [best.place], tolerance, best.inverse_hessian)
        if not math.isfinite(best.value):
            raise ValueError(
                f"KernelRegressor: bandwidth={self.criterion!r} finds no bandwidth with a finite "
                f"criterion for n_samples={count}; give a number"
            )
        return torch.from_numpy(best.place).exp()

    def value(self, estimate: _Estimate, log_bandwidth: Tensor) -> Tensor:
        """The criterion (...) of ``log_bandwidth (..., D)``."""
        bandwidth = log_bandwidth.exp()
        if self.criterion == "aicc":
            value = aicc(estimate.smoother, bandwidth, estimate.sample).clamp_min(_EXACT).mean(-1)
        else:
            value = loo_error(estimate.smoother, bandwidth, estimate.sample).mean(-1)
        self.report(value.detach(), bandwidth.detach())
        return value

    def _starts(self, estimate: _Estimate, restarts: int) -> list[np.ndarray]:
        """The lowest valleys of the grid; where they are few, beside the lowest some with columns
        of different widths."""
        low, high = (self.low - self.log_base).min(), (self.high - self.log_base).max()
        shifts = torch.arange(float(low), float(high) + self.step, self.step, dtype=torch.float64)
        grid = self.clip(self.log_base + shifts.unsqueeze(-1))
        with torch.no_grad():
            # All of one batch are smoothed by one call of the operator.
            values = torch.cat([self.value(estimate, batch) for batch in grid.split(_BATCH)])
        starts = list(grid[_valleys(values.numpy())])
        if len(self.log_base) > 1:
            offsets = np.random.default_rng(0).normal(size=(restarts, len(self.log_base)))
            starts += [self.clip(starts[0] + torch.from_numpy(row)) for row in offsets]
        return [start.numpy() for start in starts[: restarts + 1]]

    def clip(self, log_bandwidth: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(log_bandwidth, self.low), self.high)

    def _lowest(
        self,
        estimate: _Estimate,
        starts: list[np.ndarray],
        tolerance: float,
        inverse: np.ndarray | None = None,
    ) -> Minimum:
        """The lowest value near the starts, until a step promises to gain less than this."""
        if self.smoother.kernel == "boxcar":  # a criterion of steps, without a gradient
            found = [self._nelder_mead(estimate, start) for start in starts]
        else:
            descent = Descent(self.low.numpy(), self.high.numpy(), tolerance)
            objective = partial(self._with_gradient, estimate)
            found = descent.minima(objective, starts, inverse, first_step=0.5 * self.step)
        return min(found, key=lambda minimum: minimum.value)

    def _with_gradient(
        self, estimate: _Estimate, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values ``(R,)``, inf where there is none, and gradients ``(R, D)`` at ``(R, D)``."""
        theta = torch.from_numpy(places).requires_grad_()
        values = self.value(estimate, theta)
        (gradients,) = torch.autograd.grad(values.sum(), theta)
        # Of degree 1 and in windows of one point, where nothing depends on h any more, a gradient
        # may be lost to rounding.
        return (
            values.detach().nan_to_num(math.inf, math.inf, math.inf).numpy(),
            gradients.nan_to_num(0.0, 0.0, 0.0).numpy(),
        )

    def _nelder_mead(self, estimate: _Estimate, start: np.ndarray) -> Minimum:
        def value(place: np.ndarray) -> float:
            number = float(self.value(estimate, torch.from_numpy(place)))
            return number if math.isfinite(number) else _STEEP

        count = len(start)
        with torch.no_grad():
            found = scipy.optimize.minimize(
                value, start, method="Nelder-Mead",
                bounds=np.stack([self.low, self.high], -1),
                options={"initial_simplex": start + self.step * np.eye(count + 1, count)},
            )  # fmt: skip
        return Minimum(found.fun if found.fun < _STEEP else math.inf, found.x, np.eye(count))


def _in_random_order(smoother: Smoother) -> Smoother:
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(smoother.points)))
    weights = None if smoother.weights is None else smoother.weights[order]
    return replace(
        smoother, points=smoother.points[order], values=smoother.values[order], weights=weights
    )


def _valleys(values: np.ndarray) -> np.ndarray:
    """Where a curve is lowest locally, at most a tenth of the way to its median; lowest first."""
    values = np.where(np.isfinite(values), values, np.inf)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.zeros(1, dtype=int)
    padded = np.concatenate([[np.inf], values, [np.inf]])
    found = np.flatnonzero((values <= padded[:-2]) & (values < padded[2:]))
    found = found[values[found] <= finite.min() + 0.1 * (np.median(finite) - finite.min())]
    return found[values[found].argsort(kind="stable")]
