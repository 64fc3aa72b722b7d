"""KernelRegressor: kernel regression as a scikit-learn estimator."""

import contextlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from mixhead._kernels import KERNELS
from mixhead.functional import kernel_attention
from mixhead.regression import bandwidth as selection
from mixhead.regression import criteria
from mixhead.regression.smoother import Smoother

CRITERIA = ("loo", "aicc", "silverman")
#: Weights of this many query-point pairs are held at once for standard errors.
_PAIRS = 2**21


class _TrainingFit(NamedTuple):
    fitted: Tensor  # (N, T)
    trace: float
    residual_variance: Tensor  # (T,)


class KernelRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    r"""Nadaraya-Watson and local linear regression.

    At a query x the data points :math:`(x_j, y_j)` are weighed by
    :math:`w_j = K(x, x_j)` with the kernels of `mixhead.kernel_attention`. Degree 0 predicts
    their weighted mean (Nadaraya 1964, Watson 1964); degree 1 the value at x of the plane that
    fits them best by weighted least squares (Stone 1977; Fan 1992), which is not pulled towards
    the inside at the edge of the data. All computation is in float64; no n x n matrix is made.

    Args:
        kernel: ``"gaussian"``, ``"laplacian"``, ``"matern32"``, ``"matern52"``, ``"cauchy"``,
            ``"epanechnikov"``, ``"tricube"``, ``"boxcar"``, ``"cosine"`` or ``"dot"``.
        bandwidth: in the units of the columns of X. A number for all columns or an array of one
            for each (inf leaves a column out), or how to choose them, one for each column:

            - ``"loo"``: the least leave-one-out error
              :math:`\frac1n \sum_i (y_i - \hat m_{-i}(x_i))^2`;
            - ``"aicc"``: the least corrected AIC (Hurvich, Simonoff & Tsai 1998)
              :math:`\log \hat\sigma^2 + 1 + 2 (\operatorname{tr} H + 1) /
              (n - \operatorname{tr} H - 2)`;
            - ``"silverman"``: :math:`\hat\sigma_j (4 / ((d + 2) n))^{1/(d+4)}`, made for the
              gaussian kernel (Silverman 1986).

            ``cosine`` has one bandwidth, without a unit. Where a choice is made, a column that is
            constant in the data is left out, and where all targets are constant ``"loo"`` and
            ``"aicc"`` take Silverman's.
        degree: 0 or 1.
        empty: what is predicted where no data point has weight, as happens with
            ``epanechnikov``, ``tricube`` and ``boxcar``: ``"nan"``, ``"zero"``, or ``"nearest"``,
            the value of the nearest data point.
        n_restarts: how many more local searches ``"loo"`` and ``"aicc"`` make beside the first.
        verbose: show the progress of the search (needs tqdm).

    Attributes:
        bandwidth_: ``(n_features_in_,)``, or ``(1,)`` with ``cosine``; inf for a column left out.
        effective_dof_: the trace of the hat matrix H, that takes y to the fitted values.
        residual_variance_: :math:`\sum_i (y_i - \hat m(x_i))^2 / (n - \operatorname{tr} H)`.
        loo_error_, aicc_: what ``"loo"`` and ``"aicc"`` minimise, at ``bandwidth_``.
        r_squared_: the squared correlation form of R's np (Doksum & Samarov 1995),
            :math:`(\sum (y - \bar y)(\hat m - \bar y))^2 / (\sum (y - \bar y)^2
            \sum (\hat m - \bar y)^2)`; `score` gives scikit-learn's.
        n_features_in_: columns of X.

        All between ``bandwidth_`` and ``n_features_in_`` take a pass over all pairs of data points
        when first read. Where y is ``(n, t)`` those about residuals are arrays of ``t``.

    Example:
        >>> x = np.linspace(0, 6, 200)[:, None]
        >>> y = np.sin(x[:, 0]) + 0.3 * np.random.default_rng(0).normal(size=200)
        >>> fit = mixhead.KernelRegressor(degree=1).fit(x, y)
        >>> mean, std, slope = fit.predict(x, return_std=True, return_slope=True)
    """

    def __init__(
        self,
        kernel="gaussian",
        bandwidth="loo",
        degree=0,
        empty="nan",
        *,
        n_restarts=2,
        verbose=False,
    ):
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.degree = degree
        self.empty = empty
        self.n_restarts = n_restarts
        self.verbose = verbose

    def fit(self, X, y, sample_weight=None):
        """Keep the data and choose the bandwidth.

        Args:
            X: ``(n, d)``.
            y: ``(n,)``, or ``(n, t)`` for several targets, which share the bandwidth.
            sample_weight: ``(n,)``, not negative. A weight counts observations: a row of weight 2
                is as good as the row twice, and one of weight 0 is not there. Leave-one-out
                leaves one unit of weight out, or the whole row where it weighs less.

        Raises:
            ValueError: an argument has the wrong shape or value, or the data are too few for the
                choice of bandwidth asked for.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
            if weights.min() < 0:
                raise ValueError(
                    f"KernelRegressor: sample_weight must not be negative, got {weights.min():g}"
                )
            X, y, weights = X[weights > 0], y[weights > 0], weights[weights > 0]
        self._single_target = y.ndim == 1
        # A copy, so that what the caller writes into X later does not change the fit.
        self._points = np.array(X)
        self._values = np.array(y, dtype=np.float64).reshape(len(y), -1)
        self._weights = weights
        self.__dict__.pop("_training_fit", None)
        self.bandwidth_ = self._choose_bandwidth()
        return self

    def predict(self, X, return_std=False, return_slope=False):
        r"""The regression at ``X (m, d)``, and what is asked for beside it, as a tuple.

        Args:
            return_std: also the standard error of the prediction as an estimate of the mean
                (not of a new observation), :math:`\hat\sigma (\sum_j l_j^2)^{1/2}` with
                :math:`l_j` the weights of the data in it and :math:`\hat\sigma^2` the
                `residual_variance_`, the same everywhere. The bias of smoothing is not in it.
            return_slope: also the marginal effects: of degree 1 the slopes of the local planes, of
                degree 0 the derivative of the regression in x.

        Returns:
            mean and std ``(m,)``, or ``(m, t)`` for several targets; slope ``(m, d)`` or
            ``(m, d, t)``. Standard error and slope are nan where no data point has weight, and
            slope is 0 for a column left out.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        smoother, bandwidth = self._smoother, self._finite_bandwidth
        query = self._in_use(X)
        with torch.no_grad():
            fit = smoother.at(query, bandwidth)
        outside = fit.log_mass.isneginf()
        mean = fit.mean.clone()
        if self.degree == 0:
            # An average lies among its targets, whatever the rounding of the weights.
            lowest, highest = smoother.values.aminmax(dim=0)
            mean = mean.clamp(lowest, highest)
        if outside.any():
            mean[outside] = kernel_attention(
                query[None, outside], smoother.points[None], smoother.values[None],
                bandwidth.max(), smoother.kernel, empty=self.empty,
            )[0]  # fmt: skip
        results = [mean.numpy()]
        if return_std:
            results.append(self._standard_error(query, outside).numpy())
        if return_slope:
            slope = fit.slope if self.degree == 1 else _derivative(smoother, query, bandwidth)
            wide = np.zeros((*X.shape, slope.shape[-1]))
            wide[:, self._columns] = slope[:, : self._columns.sum()]
            wide[outside.numpy()] = np.nan
            results.append(wide)
        if self._single_target:
            results = [result[..., 0] for result in results]
        return tuple(results) if len(results) > 1 else results[0]

    @property
    def effective_dof_(self):
        return self._training_fit.trace

    @property
    def residual_variance_(self):
        return self._of_targets(self._training_fit.residual_variance)

    @property
    def loo_error_(self):
        check_is_fitted(self)
        with torch.no_grad():
            return self._of_targets(criteria.loo_error(self._smoother, self._finite_bandwidth))

    @property
    def aicc_(self):
        check_is_fitted(self)
        with torch.no_grad():
            return self._of_targets(criteria.aicc(self._smoother, self._finite_bandwidth))

    @property
    def r_squared_(self):
        smoother, fitted = self._smoother, self._training_fit.fitted
        centre = smoother.mean_of(smoother.values)
        y, m = smoother.values - centre, fitted - centre
        covariance = smoother.mean_of(y * m)
        return self._of_targets(
            covariance.square() / (smoother.mean_of(y.square()) * smoother.mean_of(m.square()))
        )

    @cached_property
    def _training_fit(self) -> _TrainingFit:
        check_is_fitted(self)
        smoother = self._smoother
        with torch.no_grad():
            fitted, leverage = smoother.at_points(self._finite_bandwidth)
        trace = smoother.total_weight * float(smoother.mean_of(leverage.unsqueeze(-1)))
        squares = smoother.mean_of((smoother.values - fitted).square()) * smoother.total_weight
        rest = smoother.total_weight - trace
        # A fit that interpolates leaves nothing to estimate the variance from.
        variance = squares / rest if rest > 1e-9 * smoother.total_weight else squares * np.nan
        return _TrainingFit(fitted, trace, variance)

    @property
    def _columns(self) -> np.ndarray:
        """The columns of X in use: those with a finite bandwidth."""
        if self.kernel == "cosine":
            return np.ones(self.n_features_in_, dtype=bool)
        return np.isfinite(self.bandwidth_)

    @property
    def _smoother(self) -> Smoother:
        return self._smoother_of(self._in_use(self._points))

    def _smoother_of(self, points: Tensor) -> Smoother:
        weights = None if self._weights is None else torch.from_numpy(self._weights)
        values = torch.from_numpy(self._values)
        return Smoother(points, values, weights, self.kernel, self.degree)

    @property
    def _finite_bandwidth(self) -> Tensor:
        finite = self.bandwidth_[np.isfinite(self.bandwidth_)]
        return torch.from_numpy(finite if len(finite) else np.ones(1))

    def _in_use(self, X: np.ndarray) -> Tensor:
        """The columns in use; where none is, all points lie in one place."""
        used = X[:, self._columns]
        return torch.from_numpy(used if used.shape[1] else np.zeros((len(X), 1)))

    def _of_targets(self, each: Tensor):
        return float(each) if self._single_target else each.numpy()

    def _check_parameters(self) -> None:
        def check(good, name, expected):
            if not good:
                raise ValueError(
                    f"KernelRegressor: {name} must be {expected}, got {getattr(self, name)!r}"
                )

        check(self.kernel in KERNELS, "kernel", "one of " + ", ".join(KERNELS))
        check(self.degree in (0, 1), "degree", "0 or 1")
        check(self.empty in ("nan", "zero", "nearest"), "empty", "nan, zero or nearest")
        check(
            isinstance(self.n_restarts, int | np.integer) and self.n_restarts >= 0,
            "n_restarts",
            "a whole number, 0 or more",
        )
        if isinstance(self.bandwidth, str):
            check(self.bandwidth in CRITERIA, "bandwidth", "a number or " + ", ".join(CRITERIA))

    def _choose_bandwidth(self) -> np.ndarray:
        if not isinstance(self.bandwidth, str):
            return self._given_bandwidth()
        if len(self._points) < 2:
            raise ValueError(
                f"KernelRegressor: bandwidth={self.bandwidth!r} needs at least 2 samples of "
                "positive weight, got n_samples=1; give it a number"
            )
        if self.kernel == "cosine":
            if self.bandwidth == "silverman":
                raise ValueError(
                    "KernelRegressor: bandwidth must be a number, 'loo' or 'aicc' with kernel "
                    "'cosine', which has no unit of length; got 'silverman'"
                )
            return self._search(self._smoother).numpy()
        chosen = np.full(self.n_features_in_, np.inf)
        varying = (self._points != self._points[0]).any(0)
        if varying.any():
            smoother = self._smoother_of(torch.from_numpy(self._points[:, varying]))
            silverman = self.bandwidth == "silverman"
            found = criteria.silverman(smoother) if silverman else self._search(smoother)
            chosen[varying] = found.numpy()
        return chosen

    def _given_bandwidth(self) -> np.ndarray:
        count = 1 if self.kernel == "cosine" else self.n_features_in_
        try:
            given = np.asarray(self.bandwidth, dtype=np.float64)
            fits = given.shape in ((), (count,)) and bool((given > 0).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"KernelRegressor: bandwidth must be a positive number, {count} of them (one for "
                f"each column; one in all with kernel 'cosine'), or one of {', '.join(CRITERIA)}; "
                f"got {self.bandwidth!r}"
            )
        return np.broadcast_to(given, (count,)).copy()

    def _search(self, smoother: Smoother) -> Tensor:
        with _progress(self.verbose, f"bandwidth by {self.bandwidth}") as report:
            return selection.search(smoother, self.bandwidth, self.n_restarts, report)

    def _standard_error(self, query: Tensor, outside: Tensor) -> Tensor:
        smoother, bandwidth = self._smoother, self._finite_bandwidth
        squares = []
        for rows in query.split(max(_PAIRS // len(smoother.points), 1)):
            weights = smoother.equivalent_kernel(rows, bandwidth).square()
            if smoother.weights is not None:  # a weight of w is w observations with a share each
                weights = weights / smoother.weights
            squares.append(weights.sum(-1))
        deviation = torch.cat(squares).masked_fill(outside, torch.nan).sqrt().unsqueeze(-1)
        return deviation * self._training_fit.residual_variance.sqrt()


def _derivative(smoother: Smoother, query: Tensor, bandwidth: Tensor) -> Tensor:
    """The derivative ``(L, D, T)`` of the regression in the query."""
    query = query.clone().requires_grad_()
    mean = smoother.at(query, bandwidth).mean
    slopes = [
        torch.autograd.grad(target.sum(), query, retain_graph=True)[0] for target in mean.unbind(-1)
    ]
    return torch.stack(slopes, -1)


@contextlib.contextmanager
def _progress(verbose: bool, title: str):
    """Gives what is to be called with values found (...) and their bandwidths (..., D)."""
    if not verbose:
        yield lambda values, bandwidths: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("KernelRegressor: verbose=True needs tqdm: pip install tqdm") from error
    best = np.inf
    with tqdm(desc=title, unit=" evaluations") as bar:

        def report(values, bandwidths):
            nonlocal best
            bar.update(values.numel())
            lowest = values.flatten().argmin()
            value = float(values.flatten()[lowest])
            if value < best:
                best = value
                found = bandwidths.flatten(0, -2)[lowest] if bandwidths.dim() > 1 else bandwidths
                shown = ", ".join(f"{each:.4g}" for each in found.tolist()[:4])
                bar.set_postfix_str(f"{value:.6g} at {shown}")

        yield report
