"""A smoother: training points, and what the operators make of them at any bandwidth."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixhead.functional import kernel_attention, local_linear_attention

#: A sampled point that has all but this share of its window's weight is without neighbours.
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

    ``points (N, D)``, ``values (N, T)``, ``weights (N,)`` or None for ones. A weight counts
    observations: weight 2 is the row twice. A bandwidth is ``(D,)``, or ``(1,)`` for ``cosine``;
    where it is ``(G, D)`` all results of `at`, `at_points` and `left_out` have ``G`` in front.
    """

    points: Tensor
    values: Tensor
    weights: Tensor | None
    kernel: str
    degree: int

    @property
    def total_weight(self) -> float:
        return len(self.points) if self.weights is None else float(self.weights.sum())

    def values_of(self, sample: Tensor | None) -> Tensor:
        return self.values if sample is None else self.values[sample]

    def mean_of(self, each: Tensor, sample: Tensor | None = None) -> Tensor:
        """The weighted mean of ``(..., N, T)`` over the points, or ``(..., M, T)`` of a sample."""
        if self.weights is None:
            return each.mean(-2)
        weights = self.weights if sample is None else self.weights[sample]
        return weights @ each / weights.sum()

    def at(self, query: Tensor, bandwidth: Tensor, exclude_self: bool = False) -> Fit:
        """The fit at ``query (L, D)``, by all points or for query ``i`` by all but point ``i``."""
        return self._apply(
            query[None], self.points[None], self.values[None], bandwidth, exclude_self
        )

    def at_points(self, bandwidth: Tensor, sample: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fitted values ``(N, T)`` and the weight ``(N,)`` of an observation in its own.

        Summed over the observations these weights are the trace of the hat matrix. Both may be of
        a sample alone, the indices ``(M,)`` of some points.
        """
        fit = self.at(self.points if sample is None else self.points[sample], bandwidth)
        return fit.mean, fit.leverage

    def left_out(self, bandwidth: Tensor, sample: Tensor | None = None) -> Tensor:
        """What the fit without an observation says of it: ``(N, T)``, or ``(M, T)`` of a sample.

        One unit of weight is left out, or all of it where there is less. A point that leaves an
        empty window behind is predicted by the mean of the others.
        """
        if sample is not None:
            return self._downdated(bandwidth, sample)
        fit = self.at(self.points, bandwidth, exclude_self=True)
        predicted, empty = fit.mean, fit.log_mass.isneginf().unsqueeze(-1)
        if empty.any():
            predicted = torch.where(empty, self._mean_of_others(), predicted)
        if self.weights is None:
            return predicted
        heavy = (self.weights > 1.0).nonzero().squeeze(-1)  # what is left of these takes part
        return predicted.index_copy(-2, heavy, self._downdated(bandwidth, heavy))

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
        mask = None if self.weights is None else self.weights.log()
        options = {"attn_mask": mask, "exclude_self": exclude_self}
        arguments = (query, key, value, heads[:, 0] if self.kernel == "cosine" else heads)
        if self.degree == 1:
            mean, slope, leverage, log_mass = local_linear_attention(
                *arguments, self.kernel, **options
            )
        else:
            slope = None
            smooth = _GaussianMean.apply if self._has_moments(bandwidth) else _mean
            mean, log_mass = smooth(*arguments, self.kernel, options)
            leverage = (self._log_kernel_at_zero(query, heads) - log_mass).exp()
        if several:
            return Fit(mean, leverage, log_mass, slope)
        slope = slope if slope is None else slope.squeeze(0)
        return Fit(mean.squeeze(0), leverage.squeeze(0), log_mass.squeeze(0), slope)

    def _has_moments(self, bandwidth: Tensor) -> bool:
        wanted = torch.is_grad_enabled() and bandwidth.requires_grad
        columns, targets = self.points.shape[1], self.values.shape[1]
        return wanted and self.kernel == "gaussian" and 2 * columns * (targets + 1) <= _MOMENTS

    def _log_kernel_at_zero(self, query: Tensor, bandwidth: Tensor) -> Tensor:
        """log K(q, q), which is 0 for every kernel of a distance."""
        if self.kernel == "dot":
            return (query / bandwidth.unsqueeze(-2)).square().sum(-1)
        if self.kernel == "cosine":
            return query.ne(0).any(-1) / bandwidth.square()
        return query.new_zeros(())


def _mean(
    query: Tensor, key: Tensor, value: Tensor, bandwidth: Tensor, kernel: str, options: dict
) -> tuple[Tensor, Tensor]:
    return kernel_attention(query, key, value, bandwidth, kernel, return_mass=True, **options)


class _GaussianMean(torch.autograd.Function):
    r"""`_mean` of the gaussian kernel, whose gradient in the bandwidth takes no backward pass.

    With :math:`E_i` the kernel-weighted mean around query i and :math:`u_d = (q_d - k_d) / h_d`,
    d log K / d log h_d is :math:`u_d^2`, so

    .. math::
        \partial \text{log\_mass}_i / \partial \log h_d = E_i[u_d^2], \qquad
        \partial \text{mean}_i / \partial \log h_d = E_i[u_d^2 y] - E_i[u_d^2]\, \text{mean}_i,

    and the forward gives these from the means of :math:`k_d, k_d^2, k_d y, k_d^2 y` beside that of
    y. The points are the same for all heads; query, key and value get no gradient.
    """

    @staticmethod
    def forward(ctx, query, key, value, bandwidth, kernel, options):
        # The squares cancel least around the middle of the data.
        centre = key[0].mean(0)
        centred, offset = key[0] - centre, (query - centre).unsqueeze(-1)
        powers = torch.stack([centred, centred.square()], -1).unsqueeze(-1)  # (S, D, 2, 1)
        products = powers * _with_one(value[0]).unsqueeze(1)
        channels = torch.cat([value[0], products.flatten(1)], -1)  # (S, T + 2 D (1 + T))
        means, log_mass = _mean(
            query, key, channels.expand(len(key), -1, -1), bandwidth, kernel, options
        )
        mean, products = means.split([value.shape[-1], products[0].numel()], -1)
        first, second = products.unflatten(-1, (key.shape[-1], 2, -1)).unbind(-2)
        squares = offset.square() * _with_one(mean) - 2.0 * offset * first + second
        squares = squares / bandwidth[:, None, :, None].square()
        spread, products = squares.split([1, mean.shape[-1]], -1)  # E[u^2], E[u^2 y]
        ctx.save_for_backward(bandwidth, products - spread * mean.unsqueeze(-2), spread.squeeze(-1))
        return mean.contiguous(), log_mass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean, grad_log_mass):
        bandwidth, mean_slope, mass_slope = ctx.saved_tensors
        in_log = torch.einsum("gldt,glt->gd", mean_slope, grad_mean)
        in_log += torch.einsum("gld,gl->gd", mass_slope, grad_log_mass)
        return None, None, None, in_log / bandwidth, None, None


def _with_one(values: Tensor) -> Tensor:
    """(..., T) as (..., 1, 1 + T), a 1 in front."""
    return torch.cat([torch.ones_like(values[..., :1]), values], -1).unsqueeze(-2)
