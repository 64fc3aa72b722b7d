"""What a bandwidth is judged by: leave-one-out error, AICc, and Silverman's rule."""

import torch
from torch import Tensor

from mixhead.regression.smoother import Smoother


def loo_error(smoother: Smoother, bandwidth: Tensor, sample: int | None = None) -> Tensor:
    r"""Mean squared leave-one-out error ``(..., T)`` at ``bandwidth (..., D)``.

    :math:`\frac1n \sum_i (y_i - \hat m_{-i}(x_i))^2`, or as its estimate the mean squared error at
    the first ``sample`` points, all of them left out.
    """
    if sample is None:
        predicted = smoother.left_out(bandwidth)
    else:
        predicted = smoother.held_out(bandwidth, sample)
    error = smoother.values[:sample] - predicted
    return smoother.mean_of(error.square(), sample)


def aicc(smoother: Smoother, bandwidth: Tensor, sample: int | None = None) -> Tensor:
    r"""The corrected AIC of Hurvich, Simonoff and Tsai (1998) ``(..., T)``; inf where none.

    :math:`\log \hat\sigma^2 + 1 + 2 (\operatorname{tr} H + 1) / (n - \operatorname{tr} H - 2)`
    with :math:`\hat\sigma^2 = \frac1n \sum_i (y_i - \hat m(x_i))^2`, as in R's np and statsmodels;
    or its estimate from the first ``sample`` points.
    """
    fitted, leverage = smoother.at_points(bandwidth, sample)
    trace = smoother.total_weight * smoother.mean_of(leverage.unsqueeze(-1), sample)
    rest = smoother.total_weight - trace - 2.0
    variance = smoother.mean_of((smoother.values[:sample] - fitted).square(), sample)
    value = variance.log() + 1.0 + 2.0 * (trace + 1.0) / rest
    return torch.where(rest > 0.0, value, torch.inf)


def deviations(smoother: Smoother) -> Tensor:
    """The standard deviation ``(D,)`` of each column, 0 exactly where it is constant."""
    points, total = smoother.points, smoother.total_weight
    spread = smoother.mean_of((points - smoother.mean_of(points)).square())
    constant = (points == points[0]).all(0)
    return (spread * total / max(total - 1.0, 1.0)).sqrt().masked_fill(constant, 0.0)


def silverman(smoother: Smoother) -> Tensor:
    r"""Silverman's rule (1986, eq. 4.14) ``(D,)``, as in `scipy.stats.gaussian_kde`.

    :math:`h_j = \hat\sigma_j \left(\frac{4}{(d + 2) n}\right)^{1/(d+4)}`.
    """
    dimensions = smoother.points.shape[1]
    factor = (4.0 / ((dimensions + 2.0) * smoother.total_weight)) ** (1.0 / (dimensions + 4.0))
    return deviations(smoother) * factor
