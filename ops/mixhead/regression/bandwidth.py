"""The search for the bandwidth that minimises a criterion."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from mixhead.regression.criteria import aicc, deviations, loo_error, silverman
from mixhead.regression.smoother import Smoother

#: Kernels of bounded support: a point that enters the window makes a kink or a jump in a criterion.
_COMPACT = ("epanechnikov", "tricube", "boxcar")
#: With more than four times as many points, the search begins with the criterion's estimate from
#: this many of them.
_SAMPLE = 256
#: So many bandwidths of the grid are judged at once.
_BATCH = 32
#: What the minimiser is told where a criterion has no finite value.
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
    smoother = replace(smoother, values=smoother.values[:, varying])
    with torch.enable_grad():
        return _Search(smoother, criterion, report).run(restarts)


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


class _Minimum(NamedTuple):
    value: float
    place: Tensor  # the logarithms of the bandwidths
    axes: np.ndarray | None  # (D, D): columns along which the criterion curves alike


class _Search:
    def __init__(
        self, smoother: Smoother, criterion: str, report: Callable[[Tensor, Tensor], None]
    ) -> None:
        self.smoother, self.criterion, self.report = smoother, criterion, report
        self.scale = smoother.mean_of((smoother.values - smoother.mean_of(smoother.values)) ** 2)
        self.log_base, self.low, self.high = _log_range(smoother)
        #: Logarithm of the ratio of neighbours in the grid.
        self.step = math.log(1.1 if smoother.kernel in _COMPACT else 1.5)

    def run(self, restarts: int) -> Tensor:
        count = len(self.smoother.points)
        sample = None
        if count > 4 * _SAMPLE:
            order = np.random.default_rng(0).permutation(count)
            sample = torch.from_numpy(order[:_SAMPLE].copy())
        found = [self._descend(start, sample) for start in self._starts(restarts, sample)]
        best = min(found, key=lambda minimum: minimum.value)
        if sample is not None:
            best = self._polish(best)
        if not math.isfinite(best.value):
            raise ValueError(
                f"KernelRegressor: bandwidth={self.criterion!r} finds no bandwidth with a finite "
                f"criterion for n_samples={count}; give a number"
            )
        return best.place.exp()

    def value(self, log_bandwidth: Tensor, sample: Tensor | None) -> Tensor:
        """The criterion (...), free of the targets' units, of ``log_bandwidth (..., D)``."""
        bandwidth = log_bandwidth.exp()
        if self.criterion == "aicc":
            value = (aicc(self.smoother, bandwidth, sample) - self.scale.log()).mean(-1)
        else:
            value = (loo_error(self.smoother, bandwidth, sample) / self.scale).mean(-1)
        self.report(value.detach(), bandwidth.detach())
        return value

    def _starts(self, restarts: int, sample: Tensor | None) -> list[Tensor]:
        """The lowest valleys of the grid; where they are few, beside the lowest some with columns
        of different widths."""
        low, high = (self.low - self.log_base).min(), (self.high - self.log_base).max()
        shifts = torch.arange(float(low), float(high) + self.step, self.step, dtype=torch.float64)
        grid = self.clip(self.log_base + shifts.unsqueeze(-1))
        with torch.no_grad():
            # All of one batch are smoothed by one call of the operator.
            values = torch.cat([self.value(batch, sample) for batch in grid.split(_BATCH)])
        starts = list(grid[_valleys(values.numpy())])
        if len(self.log_base) > 1:
            offsets = np.random.default_rng(0).normal(size=(restarts, len(self.log_base)))
            starts += [self.clip(starts[0] + torch.from_numpy(row)) for row in offsets]
        return starts[: restarts + 1]

    def clip(self, log_bandwidth: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(log_bandwidth, self.low), self.high)

    def _descend(self, start: Tensor, sample: Tensor | None) -> _Minimum:
        """The lowest value near a start, from the grid's step as the unit of length."""
        objective = _Objective(self, sample)
        bounds = torch.stack([self.low - start, self.high - start], -1).numpy() / self.step
        count = len(start)

        def shifted(shift: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = objective(start.numpy() + self.step * shift)
            return value, self.step * gradient

        if self.smoother.kernel == "boxcar":  # a criterion of steps, without a gradient
            scipy.optimize.minimize(
                lambda shift: shifted(shift)[0], np.zeros(count), method="Nelder-Mead",
                bounds=bounds, options={"initial_simplex": np.eye(count + 1, count)},
            )  # fmt: skip
            return objective.best
        found = scipy.optimize.minimize(
            shifted, np.zeros(count), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 100, "ftol": 1e-13, "gtol": 1e-7 if sample is None else 1e-5},
        )  # fmt: skip
        return objective.best._replace(axes=self.step * _root(found.hess_inv.todense()))

    def _polish(self, minimum: _Minimum) -> _Minimum:
        """The lowest value by all points, near the minimum by a sample and along its axes.

        By these the criterion has unit curvature, so that BFGS begins with Newton's step.
        """
        if minimum.axes is None:
            return self._descend(minimum.place, None)
        objective, origin, axes = _Objective(self, None), minimum.place.numpy(), minimum.axes

        def along_axes(shift: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = objective(origin + axes @ shift)
            return value, axes.T @ gradient

        # A step of the gradient's length leads to the minimum: by then less than 0.1 % of h.
        tolerance = 1e-3 / np.linalg.norm(axes, 2)
        scipy.optimize.minimize(
            along_axes, np.zeros(len(origin)), jac=True, method="BFGS",
            options={"gtol": tolerance, "maxiter": 100},
        )  # fmt: skip
        return objective.best


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


def _root(inverse_hessian: np.ndarray) -> np.ndarray:
    """A matrix A with A A' the inverse Hessian, but no axis much shorter than the unit."""
    variances, directions = np.linalg.eigh((inverse_hessian + inverse_hessian.T) / 2)
    return directions * np.sqrt(np.maximum(variances, 0.01))


class _Objective:
    """Value and gradient for SciPy's minimisers; remembers the best place it was asked about.

    Outside the range criteria are flat: such a place stands for the nearest within.
    """

    def __init__(self, search: _Search, sample: Tensor | None) -> None:
        self.search, self.sample = search, sample
        self.best = _Minimum(math.inf, (search.low + search.high) / 2, None)

    def __call__(self, place: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.from_numpy(place).requires_grad_()
        inside = self.search.clip(theta)
        value = self.search.value(inside, self.sample)
        number = float(value.detach())
        if not math.isfinite(number):
            return _STEEP, np.zeros_like(place)
        if number < self.best.value:
            self.best = _Minimum(number, inside.detach(), None)
        (gradient,) = torch.autograd.grad(value, theta)
        # Of degree 1 and in windows of one point, where nothing depends on h any more, a gradient
        # may be lost to rounding.
        return number, gradient.nan_to_num(0.0, 0.0, 0.0).numpy()
