"""A smoother: training points, and what the operators make of them at any bandwidth."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mixhead.functional import kernel_attention, local_linear_attention

#: A point that has all but this share of its window's weight is without neighbours.
_ALONE = 1e-9
#: With more channels than this, moments take longer than a backward pass.
_MOMENTS = 64


class Fit(NamedTuple):
    """At each of ``L`` queries; ``leverage`` is the weight of one unit of data put at the query.

    For ``G`` bandwidths at once all have a leading dimension ``G``.
    """

    mean: Tensor  # (L, T)
    leverage: Tensor  # (L,)
    log_mass: Tensor  # (L,), -inf where the window holds no point
    slope: Tensor | None  # (L, D, T), of degree 1


@dataclass
class Smoother:
    """Training data, all float64, and the kernel that smooths it.

    ``dtype`` is what the operators compute in; results are float64.
    ``points (N, D)``, ``values (N, T)``, ``weights (N,)`` or None for ones. A weight counts
    observations: weight 2 is the row twice. A bandwidth is ``(D,)``, or ``(1,)`` for ``cosine``;
    where it is ``(G, D)`` all results of `at`, `at_points` and `left_out` have ``G`` in front.
    """

    points: Tensor
    values: Tensor
    weights: Tensor | None
    kernel: str
    degree: int
    dtype: torch.dtype = torch.float64
    _rest: dict[int, "Smoother"] = field(default_factory=dict, init=False, repr=False)

    @property
    def total_weight(self) -> float:
        return len(self.points) if self.weights is None else float(self.weights.sum())

    def mean_of(self, each: Tensor, sample: int | None = None) -> Tensor:
        """The weighted mean of ``(..., N, T)`` over the points, or ``(..., M, T)`` of a sample."""
        if self.weights is None:
            return each.mean(-2)
        weights = self.weights[:sample]
        return weights @ each / weights.sum()

    def at(self, query: Tensor, bandwidth: Tensor, exclude_self: bool = False) -> Fit:
        """The fit at ``query (L, D)``, by all points or for query ``i`` by all but point ``i``."""
        if self._has_moments(bandwidth):
            several = bandwidth.dim() == 2
            heads = bandwidth if several else bandwidth.unsqueeze(0)
            mean, log_mass = _GaussianMean.apply(heads, query, self, exclude_self)
            fit = Fit(mean, log_mass.neg().exp(), log_mass, None)
            return fit if several else Fit(mean[0], fit.leverage[0], log_mass[0], None)
        return self._apply(
            query[None], self.points[None], self.values[None], bandwidth, exclude_self
        )

    @cached_property
    def log_weights(self) -> Tensor | None:
        return None if self.weights is None else self.weights.log().to(self.dtype)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """A centre ``(D,)``, around which squares of the points cancel least; the points ``(N, D)``
        and, for each, the channels y and for each column x, x y, x^2, x^2 y."""
        centre = self.points.mean(0)
        x = (self.points - centre)[:, :, None, None]
        one_and_values = torch.cat([torch.ones_like(self.values[:, :1]), self.values], 1)
        products = torch.cat([x, x.square()], 2) * one_and_values[:, None, None]  # (N, D, 2, 1 + T)
        channels = torch.cat([self.values, products.flatten(1)], 1)
        return centre, self.points.to(self.dtype), channels.to(self.dtype)

    def at_points(self, bandwidth: Tensor, sample: int | None = None) -> tuple[Tensor, Tensor]:
        """Fitted values ``(N, T)`` and the weight ``(N,)`` of an observation in its own.

        Summed over the observations these weights are the trace of the hat matrix. Both may be of
        a sample alone, the first ``M`` points.
        """
        fit = self.at(self.points[:sample], bandwidth)
        return fit.mean, fit.leverage

    def left_out(self, bandwidth: Tensor) -> Tensor:
        """What the fit without an observation says of it: ``(N, T)``.

        One unit of weight is left out, or all of it where there is less. A point that leaves an
        empty window behind is predicted by the mean of the others.
        """
        fit = self.at(self.points, bandwidth, exclude_self=True)
        predicted, empty = fit.mean, fit.log_mass.isneginf().unsqueeze(-1)
        if empty.any():
            predicted = torch.where(empty, self._mean_of_others(), predicted)
        if self.weights is None:
            return predicted
        heavy = (self.weights > 1.0).nonzero().squeeze(-1)  # what is left of these takes part
        return predicted.index_copy(-2, heavy, self._downdated(bandwidth, heavy))

    def held_out(self, bandwidth: Tensor, sample: int) -> Tensor:
        """What the fit without the first ``M`` points says of them: ``(M, T)``."""
        if sample not in self._rest:
            weights = None if self.weights is None else self.weights[sample:]
            self._rest[sample] = replace(
                self, points=self.points[sample:], values=self.values[sample:], weights=weights
            )
        rest = self._rest[sample]
        fit = rest.at(self.points[:sample], bandwidth)
        empty = fit.log_mass.isneginf().unsqueeze(-1)
        return torch.where(empty, rest.mean_of(rest.values), fit.mean) if empty.any() else fit.mean

    def _downdated(self, bandwidth: Tensor, rows: Tensor) -> Tensor:
        """`left_out` at some points, from the fit by all: with l the weight of a point in its own
        fit m, a linear smoother of weights that sum to 1 is (m - l y) / (1 - l) without it."""
        fit = self.at(self.points[rows], bandwidth)
        own = fit.leverage.unsqueeze(-1)
        if self.weights is not None:
            own = own * self._unit()[rows]
        alone = own > 1.0 - _ALONE
        rest = (fit.mean - own * self.values[rows]) / (1.0 - own).masked_fill(alone, 1.0)
        return torch.where(alone, self._mean_of_others()[rows], rest) if alone.any() else rest

    def _unit(self) -> Tensor:
        """The weight ``(N, 1)`` of each point that is left out as one observation."""
        return self.weights.clamp(max=1.0).unsqueeze(-1)

    def _mean_of_others(self) -> Tensor:
        """The mean ``(N, T)`` of all values but one observation of each."""
        unit = 1.0 if self.weights is None else self._unit()
        total = self.total_weight
        return (total * self.mean_of(self.values) - unit * self.values) / (total - unit)

    def equivalent_kernel(self, query: Tensor, bandwidth: Tensor) -> Tensor:
        """The weights ``(L, N)`` with which each prediction adds up the values.

        The prediction is linear in the values, so its weights are its gradient in them: with the
        queries as a batch, each with values of its own, one backward pass gives all.
        """
        with torch.enable_grad():
            rows, keys = len(query), len(self.points)
            values = torch.zeros(rows, 1, keys, 1, dtype=torch.float64, requires_grad=True)
            points = self.points.expand(rows, 1, -1, -1)
            mean = self._apply(query[:, None, None], points, values, bandwidth).mean
            return torch.autograd.grad(mean.sum(), values)[0].view(rows, keys)

    def _apply(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bandwidth: Tensor,
        exclude_self: bool = False,
    ) -> Fit:
        several = bandwidth.dim() == 2
        heads = bandwidth if several else bandwidth.unsqueeze(0)
        if several:
            query, key, value = (each.expand(len(heads), -1, -1) for each in (query, key, value))
        options = {"attn_mask": self.log_weights, "exclude_self": exclude_self}
        heads = heads[:, 0] if self.kernel == "cosine" else heads
        arguments = (each.to(self.dtype) for each in (query, key, value, heads))
        if self.degree == 1:
            results = local_linear_attention(*arguments, self.kernel, **options)
            mean, slope, leverage, log_mass = (each.double() for each in results)
        else:
            slope = None
            results = kernel_attention(*arguments, self.kernel, return_mass=True, **options)
            mean, log_mass = (each.double() for each in results)
            leverage = (self._log_kernel_at_zero(query, bandwidth) - log_mass).exp()
        if several:
            return Fit(mean, leverage, log_mass, slope)
        slope = slope if slope is None else slope.squeeze(0)
        return Fit(mean.squeeze(0), leverage.squeeze(0), log_mass.squeeze(0), slope)

    def _has_moments(self, bandwidth: Tensor) -> bool:
        """Whether the gradient in the bandwidth, if wanted, comes from `moments`."""
        if not (torch.is_grad_enabled() and bandwidth.requires_grad):
            return False
        channels = 2 * self.points.shape[1] * (self.values.shape[1] + 1)
        return self.kernel == "gaussian" and self.degree == 0 and channels <= _MOMENTS

    def _log_kernel_at_zero(self, query: Tensor, bandwidth: Tensor) -> Tensor:
        """log K(q, q), which is 0 for every kernel of a distance."""
        if self.kernel == "dot":
            return (query / bandwidth.unsqueeze(-2)).square().sum(-1)
        if self.kernel == "cosine":
            return query.ne(0).any(-1) / bandwidth.square()
        return query.new_zeros(())


class _GaussianMean(torch.autograd.Function):
    r"""Means ``(G, L, T)`` and log masses ``(G, L)`` of a smoother's gaussian kernel at queries
    ``(L, D)`` and bandwidths ``(G, D)``, whose gradient in these takes no backward pass.

    With :math:`E_i` the kernel-weighted mean around query i and :math:`u_d = (q_d - k_d) / h_d`,
    d log K / d log h_d is :math:`u_d^2`, so

    .. math::
        \partial \text{log\_mass}_i / \partial \log h_d = E_i[u_d^2], \qquad
        \partial \text{mean}_i / \partial \log h_d = E_i[u_d^2 y] - E_i[u_d^2]\, \text{mean}_i,

    and the forward gives these from the means of :math:`k_d, k_d^2, k_d y, k_d^2 y` beside that of
    y. No other argument gets a gradient.
    """

    @staticmethod
    def forward(ctx, bandwidth, query, smoother, exclude_self):
        centre, key, channels = smoother.moments
        heads, targets = len(bandwidth), smoother.values.shape[1]
        means, log_mass = kernel_attention(
            *(each.expand(heads, -1, -1) for each in (query.to(key.dtype), key, channels)),
            bandwidth.to(key.dtype), "gaussian", return_mass=True,
            attn_mask=smoother.log_weights, exclude_self=exclude_self,
        )  # fmt: skip
        means = means.double()
        mean = means[..., :targets].contiguous()
        ctx.save_for_backward(bandwidth, query - centre, means, mean)
        return mean, log_mass.double()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean, grad_log_mass):
        bandwidth, query, means, mean = ctx.saved_tensors
        own = grad_log_mass.unsqueeze(-1)
        # What multiplies E[u^2] and E[u^2 y], whose terms in q^2 leave grad_log_mass alone.
        factors = torch.cat([own - (grad_mean * mean).sum(-1, keepdim=True), grad_mean], -1)
        products = means[..., mean.shape[-1] :].unflatten(-1, (query.shape[-1], 2, -1))
        first, second = (products * factors[:, :, None, None]).sum(-1).unbind(-1)  # (G, L, D)
        squares = (query.square() * own - 2.0 * query * first + second).sum(1)
        return squares / bandwidth**3, None, None, None
